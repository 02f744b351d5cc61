"""Texts with errors in them, as people, scanners and pipelines make them: a share of characters or words, by a seed.

One kind a family, for similar ones tell the same (Li et al., arXiv 2206.07918, find so of images): typing (a letter is
dropped, doubled, swapped with the next or replaced by its neighbour on a keyboard), case, white space, and what optical
recognition confuses. The same text, kind, rate and seed give the same errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.hashing import hash64, row_keys

Kind = Literal["typos", "case", "space", "ocr"]

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {
    row[i]: "".join(row[j] for j in (i - 1, i + 1) if 0 <= j < len(row)) for row in ROWS for i in range(len(row))
}
OCR = {
    "l": "1", "1": "l", "O": "0", "0": "O", "o": "0", "I": "l", "S": "5", "5": "S", "B": "8", "8": "B", "e": "c",
    "c": "e", "m": "rn", "h": "b", "b": "h", "u": "v", "v": "u", "g": "q", "a": "o", "t": "f", "f": "t", "i": "j",
}  # fmt: skip


def corrupt(text: str, kind: Kind, rate: float, seed: int = 0) -> str:
    """The text with errors in about `rate` of the characters where this kind can make one; never empty."""
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate:g}: write a share between 0 and 1")
    can, change = CHANGES[kind]
    places = [i for i, character in enumerate(text) if can(character)]
    key = int(hash64(row_keys(pa.array([f"{kind} {rate} {text}"], pa.large_string())), seed)[0])
    rng = np.random.default_rng(key)
    pieces = list(text)
    for i, draw in zip(places, rng.random(len(places)).tolist(), strict=True):
        if draw < rate:
            change(pieces, i, rng)
    return "".join(pieces) or text


def _typo(pieces: list[str], i: int, rng: np.random.Generator) -> None:
    letter, what = pieces[i], int(rng.integers(4))
    near = NEIGHBOURS.get(letter.lower(), "")
    if what == 0:
        pieces[i] = ""
    elif what == 1 and i + 1 < len(pieces):
        pieces[i], pieces[i + 1] = pieces[i + 1], letter
    elif what == 2 and near:
        other = near[int(rng.integers(len(near)))]
        pieces[i] = other.upper() if letter.isupper() else other
    else:
        pieces[i] = letter * 2


def _case(pieces: list[str], i: int, rng: np.random.Generator) -> None:
    pieces[i] = pieces[i].swapcase()


def _space(pieces: list[str], i: int, rng: np.random.Generator) -> None:
    lost = pieces[i].isspace() and rng.random() < 0.5
    pieces[i] = "" if lost else f"{pieces[i]} "


def _ocr(pieces: list[str], i: int, rng: np.random.Generator) -> None:
    pieces[i] = OCR[pieces[i]]


CHANGES: dict[Kind, tuple[Callable[[str], bool], Callable[[list[str], int, np.random.Generator], None]]] = {
    "typos": (str.isalpha, _typo),
    "case": (str.isalpha, _case),
    "space": (lambda character: True, _space),
    "ocr": (OCR.__contains__, _ocr),
}
"""Of each kind: characters that it can change, and how."""
