"""Corpora for criteria that ask for more than texts: pairs of image and caption, instructions, and sequences of items.

usage: python -m bench.planted.corpora DIR [--seed 0]

Pairs (`pairs.parquet`). A picture is one coloured figure, or two, on a coloured ground; its caption names them, and one
in four has an aside whose words could be spatial and are not ("left unsigned").

| role | share | what it is |
| --- | --- | --- |
| plain | most | figures without a word on where they are |
| spatial | 15 % | two figures, and how they stand to each other, in phrases that English has for it |
| swapped | 10 % | a plain picture with the caption of another one |
| broken | 10 % | a plain picture; of its caption the words are shuffled, letters are lost, or each word stutters |
| short, file_name, stock | 4, 4, 5 % | a caption of one or two words, the name of a file, one that all of these share |
| small, strip | 5 % each | a shorter side below 200 pixels; a longer one of more than three times the shorter |

`trusted.parquet` has 600 right pairs, and `judged.parquet` 1,500 captions with what a judge should answer: 90, or 10
for a broken one. They are drawn apart from the corpus, but captions of so few words recur.

Instructions (`instructions.parquet`). Prompt and response walk through a concept of `bench.planted.generator`, in the
same language (same seed). In the response of a `usual` row the next word is mostly the frequent successor, as in the
corpus that models learn from; in a `rare` one mostly the other, so a model is sure and wrong; a `noise` response is of
random syllables, words of no concept.

Sequences (`sequences.parquet`). A user runs through one of six cycles of ten items and skips one now and then; a
`random` user (8 %) takes any item.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.planted.generator import CONCEPTS, FUNCTION, SYLLABLES, Language, written

PAIRS, TRUSTED, JUDGED = 400, 600, 1500
SHARES = {
    "spatial": 0.15,
    "swapped": 0.1,
    "broken": 0.1,
    "short": 0.04,
    "file_name": 0.04,
    "stock": 0.05,
    "small": 0.05,
    "strip": 0.05,
}
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 70, 215),
    "yellow": (235, 220, 50),
    "purple": (140, 50, 165),
    "orange": (240, 140, 30),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
FIGURES = ("circle", "square", "triangle", "cross")
RELATIONS = {
    "left of": (-1, 0),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "on the right side of": (1, 0),
    "beside": (1, 0),
    "next to": (-1, 0),
    "above": (0, -1),
    "over": (0, -1),
    "higher than": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
    "lower than": (0, 1),
}
"""Phrases, and the direction (x, y downwards) from the second figure to the first."""
ASIDES = ("left unsigned", "drawn right away", "over two years old", "on show since Monday", "made by hand")
STOCK = "picture of the day"
GOOD, BAD = 90, 10
SHORT_SIDE, ASPECT = 200, 3

INSTRUCTIONS, RARE, NOISE = 300, 0.25, 0.2
FREQUENT = {"usual": 0.8, "rare": 0.1}
"""How often the frequent successor comes next; 0.8 is that of the corpus that models learn from."""

USERS, RANDOM_USERS = 400, 0.08
CYCLES, CYCLE = 6, 10


def scene(rng: np.random.Generator, spatial: bool) -> tuple[str, tuple[int, int]]:
    """A caption that says what is to be seen, and the direction from its second figure to its first."""
    ground, first, second = rng.permutation(list(COLOURS))[:3]
    one, other = rng.choice(FIGURES, 2)
    told = f"a {first} {one}"
    toward = (0, 0)
    if spatial:
        phrase = str(rng.choice(list(RELATIONS)))
        told, toward = f"{told} {phrase} a {second} {other}", RELATIONS[phrase]
    elif rng.random() < 0.5:
        toward = tuple(RELATIONS.values())[int(rng.integers(len(RELATIONS)))]
        told = f"{told} and a {second} {other}"
    aside = f", {rng.choice(ASIDES)}" if rng.random() < 0.25 else ""
    return f"{told} in a {ground} picture{aside}", toward


def drawn(rng: np.random.Generator, caption: str, toward: tuple[int, int], width: int, height: int) -> bytes:
    """A PNG of what a caption of `scene` says, in colours that are never quite the same."""
    from PIL import Image, ImageDraw

    words = caption.replace(",", "").split()
    named = [w for w in words if w in COLOURS]
    colours = [tuple((np.array(COLOURS[c]) + rng.integers(-15, 16, 3)).clip(0, 255).tolist()) for c in named]
    image = Image.new("RGB", (width, height), colours[-1])
    pen, size = ImageDraw.Draw(image), min(width, height) * rng.uniform(0.14, 0.2)
    for number, (figure, colour) in enumerate(zip([w for w in words if w in FIGURES], colours[:-1], strict=True)):
        way = 0.25 * (1 - 2 * number)
        x, y = width * (0.5 + way * toward[0]), height * (0.5 + way * toward[1])
        box = (x - size, y - size, x + size, y + size)
        if figure == "circle":
            pen.ellipse(box, fill=colour)
        elif figure == "square":
            pen.rectangle(box, fill=colour)
        elif figure == "triangle":
            pen.polygon([(x, y - size), (x + size, y + size), (x - size, y + size)], fill=colour)
        else:
            pen.rectangle((x - size, y - size / 3, x + size, y + size / 3), fill=colour)
            pen.rectangle((x - size / 3, y - size, x + size / 3, y + size), fill=colour)
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def broken(rng: np.random.Generator, caption: str) -> str:
    """A caption whose words are shuffled, that has lost letters, or that stutters."""
    words, kind = caption.split(), int(rng.integers(3))
    if kind == 0:
        return " ".join(rng.permutation(words))
    if kind == 1:
        return "".join(c for c in caption if c == " " or rng.random() < 0.7)
    return " ".join(w for w in words for _ in range(int(rng.integers(1, 4))))


def sides(rng: np.random.Generator, role: str) -> tuple[int, int]:
    """Width and height of a picture."""
    if role == "small":
        short = int(rng.integers(40, SHORT_SIDE))
        long = int(short * rng.uniform(1, 1.5))
    elif role == "strip":
        short = int(rng.integers(SHORT_SIDE, 240))
        long = int(short * rng.uniform(ASPECT + 0.1, 6))
    else:
        short = int(rng.integers(SHORT_SIDE, 280))
        long = int(short * rng.uniform(1, 1.5))
    return (short, long) if rng.random() < 0.5 else (long, short)


def pairs(seed: int) -> pa.Table:
    """The corpus of pairs: `id`, `image`, `text` and `role`."""
    rng = np.random.default_rng([seed, 1])
    roles = [role for role, share in SHARES.items() for _ in range(round(share * PAIRS))]
    roles = rng.permutation(roles + ["plain"] * (PAIRS - len(roles))).tolist()
    scenes = [scene(rng, role == "spatial") for role in roles]
    images = [drawn(rng, *told, *sides(rng, role)) for told, role in zip(scenes, roles, strict=True)]
    texts = []
    for role, (caption, _) in zip(roles, scenes, strict=True):
        if role == "swapped":
            texts.append(scene(rng, False)[0])
        elif role == "broken":
            texts.append(broken(rng, caption))
        elif role == "short":
            texts.append(" ".join(caption.split()[1 : 1 + int(rng.integers(1, 3))]))
        elif role == "file_name":
            texts.append(f"IMG_{rng.integers(10_000):04d}.PNG")
        else:
            texts.append(STOCK if role == "stock" else caption)
    ids = [f"{i:05d}" for i in range(PAIRS)]
    return pa.table({"id": ids, "image": pa.array(images, pa.binary()), "text": texts, "role": roles})


def trusted(seed: int) -> pa.Table:
    """Right pairs, `image` and `text`, of a few pixels: what encoders make of them is small anyway."""
    rng = np.random.default_rng([seed, 2])
    scenes = [scene(rng, rng.random() < 0.2) for _ in range(TRUSTED)]
    images = [drawn(rng, *told, *rng.integers(64, 97, 2).tolist()) for told in scenes]
    return pa.table({"image": pa.array(images, pa.binary()), "text": [caption for caption, _ in scenes]})


def judged(seed: int) -> pa.Table:
    """Captions, every second one broken, and the answer of a good judge: `text` and `answer`."""
    rng = np.random.default_rng([seed, 3])
    captions = [scene(rng, rng.random() < 0.2)[0] for _ in range(JUDGED)]
    texts = [broken(rng, caption) if i % 2 else caption for i, caption in enumerate(captions)]
    return pa.table({"text": texts, "answer": [BAD if i % 2 else GOOD for i in range(JUDGED)]})


def walk(rng: np.random.Generator, language: Language, concept: int, words: int, frequent: float) -> list[str]:
    """Words of a concept, with function words as in the generator's corpus."""
    known, (first, second) = language.words[concept], language.following[concept]
    at, found = int(rng.integers(len(known))), list[str]()
    for _ in range(words):
        if rng.random() < 0.25:
            found.append(FUNCTION[int(rng.integers(len(FUNCTION)))])
        else:
            found.append(known[at])
            at = int((first if rng.random() < frequent else second)[at])
    return found


def instructions(seed: int) -> pa.Table:
    """`id`, `prompt`, `response` and `role`."""
    language = Language.made(np.random.default_rng(seed))
    rng = np.random.default_rng([seed, 4])
    noise, rare = round(NOISE * INSTRUCTIONS), round(RARE * INSTRUCTIONS)
    roles = rng.permutation(["noise"] * noise + ["rare"] * rare + ["usual"] * (INSTRUCTIONS - noise - rare)).tolist()
    prompts, responses = list[str](), list[str]()
    for role in roles:
        concept, size = int(rng.integers(1, CONCEPTS)), int(rng.integers(30, 61))
        prompts.append(written([walk(rng, language, concept, 12, FREQUENT["usual"])]))
        if role == "noise":
            response = ["".join(rng.choice(SYLLABLES, rng.integers(1, 5))) for _ in range(size)]
        else:
            response = walk(rng, language, concept, size, FREQUENT[role])
        responses.append(written(_sentences(response)))
    ids = [f"{i:05d}" for i in range(INSTRUCTIONS)]
    return pa.table({"id": ids, "prompt": prompts, "response": responses, "role": roles})


def _sentences(words: Sequence[str]) -> list[Sequence[str]]:
    return [words[i : i + 11] for i in range(0, len(words), 11)]


def sequences(seed: int) -> pa.Table:
    """`id`, `items` (list of integers), the same as `text`, and `role`."""
    rng = np.random.default_rng([seed, 5])
    strange = round(RANDOM_USERS * USERS)
    roles = rng.permutation(["random"] * strange + ["pattern"] * (USERS - strange)).tolist()
    rows = []
    for role in roles:
        size = int(rng.integers(6, 21))
        steps = np.cumsum(rng.choice([1, 2], size, p=[0.9, 0.1])) + rng.integers(CYCLE)
        cycle = CYCLE * rng.integers(CYCLES) + steps % CYCLE
        rows.append((rng.integers(CYCLE * CYCLES, size=size) if role == "random" else cycle).tolist())
    texts = [" ".join(f"item{i}" for i in row) for row in rows]
    ids, items = [f"{i:05d}" for i in range(USERS)], pa.array(rows, pa.list_(pa.int32()))
    return pa.table({"id": ids, "items": items, "text": texts, "role": roles})


def generate(directory: Path, seed: int = 0) -> None:
    """Write the three corpora, and what models of pairs learn from."""
    directory.mkdir(parents=True, exist_ok=True)
    for made in (pairs, trusted, judged, instructions, sequences):
        pq.write_table(made(seed), directory / f"{made.__name__}.parquet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generate(options.directory, options.seed)
