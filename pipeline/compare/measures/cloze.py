"""Facts asked closed-book and with their passage at hand: the gap is what a model no longer knows.

Pruned models stay good at finding an answer in front of them long after they have lost it by heart (LLM-KICK, Jaiswal
et al. 2023, arXiv 2310.01382), so both are asked of the same facts. A fact is made from a text without a model or a
judge: a capitalised name or a number inside a sentence, with at least `LEAD` words before it, that occurs once in its
passage; the question is the sentence up to it. One fact a text, drawn by the hash of its passage: the same texts and
seed give the same facts in any order. To ask for what a model was taught, make them of training texts; of others it is
a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.compare.measures.base import Measured, continued
from pipeline.errors import ConfigError
from pipeline.hashing import hash64, row_keys

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer

LEAD = 4
"""Words of the sentence that come before the answer."""
PASSAGE = 600
"""Characters of a text that its fact is made from, back to the last end of a sentence."""
WORD = re.compile(r"\S+")
EDGES = "\"'“”‘’()[]{}<>.,;:!?…—–-*_"
SENTENCE_END = (".", "!", "?", ".”", '."', ":", ";")
LONGEST = 4
"""Words of an answer."""


@dataclass(frozen=True)
class Fact:
    """`prompt` is the beginning of a sentence of `passage`; `answer` comes next."""

    passage: str
    prompt: str
    answer: str


def facts(texts: Sequence[str], count: int, seed: int = 0) -> list[Fact]:
    """At most `count` facts, of the texts whose passages hash lowest. Raises ConfigError where no text has one."""
    passages = sorted({p for text in texts if (p := _passage(text))})
    if not passages:
        raise ConfigError("cloze: no text has a sentence")
    draws = hash64(row_keys(pa.array(passages, pa.large_string())), seed)
    found: list[Fact] = []
    prompts: set[str] = set()
    for i in np.argsort(draws, kind="stable"):
        spans = list(_spans(passages[i]))
        if spans:
            start, lead, end = spans[int(draws[i] % np.uint64(len(spans)))]
            fact = Fact(passages[i], passages[i][start:lead].rstrip(), passages[i][lead:end])
            if fact.prompt not in prompts:
                prompts.add(fact.prompt)
                found.append(fact)
        if len(found) == count:
            break
    if not found:
        raise ConfigError("cloze: no text has a name or a number inside a sentence, once: give others, or leave it out")
    return found


def cloze(model: nn.Module, tokenizer: Tokenizer, items: Sequence[Fact], name: str = "cloze") -> list[Measured]:
    """Of every fact: bits per byte of the answer closed-book and open-book, the gap between them, and for both whether
    greedy decoding writes the answer (`.exact`)."""
    closed = continued(model, tokenizer, [(f.prompt, f" {f.answer}") for f in items])
    opened = continued(model, tokenizer, [(f"{f.passage}\n\n{f.prompt}", f" {f.answer}") for f in items])
    return [
        Measured(f"{name}.closed", "knowledge", closed.bits_per_byte, False),
        Measured(f"{name}.open", "retrieval", opened.bits_per_byte, False),
        Measured(f"{name}.gap", "knowledge", closed.bits_per_byte - opened.bits_per_byte, False),
        Measured(f"{name}.closed.exact", "knowledge", (closed.right == 1).astype(float), True),
        Measured(f"{name}.open.exact", "retrieval", (opened.right == 1).astype(float), True),
    ]


def _passage(text: str) -> str:
    flat = " ".join(text[: 4 * PASSAGE].split())
    if len(flat) <= PASSAGE:
        return flat
    ends = [m.end() for m in re.finditer(r"[.!?](?= )", flat[:PASSAGE])]
    return flat[: ends[-1]] if ends else flat[:PASSAGE].rsplit(" ", 1)[0]


def _spans(passage: str) -> Iterator[tuple[int, int, int]]:
    """(start of the sentence, start and end of the answer) of everything in a passage that can be asked for."""
    words = list(WORD.finditer(passage))
    sentence = i = 0
    while i < len(words):
        if i and words[i - 1].group().endswith(SENTENCE_END):
            sentence = i
        length = 0
        while length < LONGEST and i + length < len(words) and _names(words[i + length].group()):
            length += 1
            if words[i + length - 1].group()[-1] in EDGES:
                break
        if length and i - sentence >= LEAD and words[i].group()[0] not in EDGES:
            start, end = words[i].start(), words[i + length - 1].end()
            end -= len(passage[start:end]) - len(passage[start:end].rstrip(EDGES))
            if passage.count(passage[start:end]) == 1:
                yield words[sentence].start(), start, end
        i += max(1, length)


def _names(word: str) -> bool:
    bare = word.strip(EDGES)
    return bool(bare) and (bare[0].isdigit() or (bare[0].isupper() and len(bare) > 1))
