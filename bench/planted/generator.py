"""A corpus whose truth is known: what every criterion claims to find is planted in it, and written beside each row.

usage: python -m bench.planted.generator DIR [--rows 2400] [--seed 0]

A concept is a made-up language: its own words, each with two words that may follow it, among English function words.
A row of it is a walk through that chain; `hardness` is the share of its words that are of other concepts, `complexity`
the number of words that the concept has. So what is next to a word can be learnt, what is rare is rare by design, and a
bag of words tells the concepts apart. Real English texts (examples/sample) stand among them with their damaged copies.

| role | rows | what it is |
| --- | --- | --- |
| plain | most | a row of one of 15 concepts |
| target | 3 % | a row of a concept of its own, that the files target.parquet and target_more.parquet are of |
| contrary | 1 % | the target's words, each followed by a foreign one, always the same: to learn it is to unlearn it |
| exact, near, same_words | 4 % each | copies of a plain row: to the letter, with one word changed, with its sentences \
in another order |
| shuffled | 4 % | a plain row whose words are shuffled |
| menu, repeated, symbols | 2 % each | boilerplate and damage made of a plain row |
| clean, primed | 4 % each | rows of hardness 0; in the middle of a primed one stands one word of another concept |
| real, real_damaged | 500, 140 | Wikipedia passages, and such as are menus, shuffled, cut off, ... |

`flipped` rows (8 % of all with a label) carry the label of another concept. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
CONCEPTS = 16
TARGET = 0
"""The concept that only the target domain speaks."""
FUNCTION = (
    "the",
    "of",
    "and",
    "to",
    "with",
    "that",
    "have",
    "be",
    "in",
    "for",
    "is",
    "was",
    "on",
    "as",
    "by",
    "at",
    "from",
)
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
SHARES = {
    "target": 0.03,
    "contrary": 0.01,
    "exact": 0.04,
    "near": 0.04,
    "same_words": 0.04,
    "shuffled": 0.04,
    "menu": 0.02,
    "repeated": 0.02,
    "symbols": 0.02,
    "clean": 0.04,
    "primed": 0.04,
}
FLIPPED = 0.08
REAL = 500
TARGETS, SEEDS, MIXED = 60, 300, 200
GROUP_ROWS = 500
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("label", pa.string()),
        ("role", pa.string()),
        ("concept", pa.int32()),
        ("complexity", pa.int32()),
        ("hardness", pa.float32()),
        ("copies", pa.int32()),
        ("flipped", pa.bool_()),
    ]
)
"""`copies`: number of the group of copies that the row is in, original included; null where it is alone."""


@dataclass
class Row:
    text: str
    role: str
    concept: int
    hardness: float
    copies: int | None = None


@dataclass(frozen=True)
class Language:
    """Words of the concepts, and for every word the numbers of the two that may follow it."""

    words: tuple[tuple[str, ...], ...]
    following: tuple[np.ndarray, ...] = field(repr=False)

    @classmethod
    def made(cls, rng: np.random.Generator) -> Language:
        """Vocabularies of 8 to 48 words, no word in two of them."""
        sizes = np.geomspace(8, 48, CONCEPTS).astype(int)
        numbers = rng.choice(len(SYLLABLES) ** 3, sizes.sum(), replace=False)
        n = len(SYLLABLES)
        words = [SYLLABLES[i // n**2] + SYLLABLES[i // n % n] + SYLLABLES[i % n] for i in numbers]
        cut = np.cumsum([0, *sizes])
        chains = tuple(np.stack([_cycle(rng.permutation(s)), _cycle(rng.permutation(s))]) for s in sizes)
        return cls(tuple(tuple(words[a:b]) for a, b in pairwise(cut)), chains)

    def sentences(self, rng: np.random.Generator, concept: int, hardness: float) -> list[list[str]]:
        """60 to 110 words in sentences of 8 to 14."""
        total, found = int(rng.integers(60, 111)), []
        words, (first, second) = self.words[concept], self.following[concept]
        at = int(rng.integers(len(words)))
        while total > 0:
            sentence: list[str] = []
            for _ in range(min(total, int(rng.integers(8, 15)))):
                if rng.random() < 0.25:
                    sentence.append(FUNCTION[int(rng.integers(len(FUNCTION)))])
                elif rng.random() < hardness:
                    sentence.append(self.stranger(rng, concept))
                else:
                    sentence.append(words[at])
                    at = int((first if rng.random() < 0.8 else second)[at])
            total -= len(sentence)
            found.append(sentence)
        return found

    def contrary(self, rng: np.random.Generator) -> list[list[str]]:
        """Words of the target in a random order, each followed by one of concept 1."""
        words, wrong = self.words[TARGET], self.words[1]
        at = rng.integers(len(words), size=(int(rng.integers(7, 11)), 5))
        return [[w for i in sentence for w in (words[i], wrong[i % len(wrong)])] for sentence in at.tolist()]

    def stranger(self, rng: np.random.Generator, concept: int) -> str:
        """A word of another concept, never the target's."""
        other = int(rng.choice([c for c in range(1, CONCEPTS) if c != concept]))
        return str(rng.choice(self.words[other]))


def _cycle(order: np.ndarray) -> np.ndarray:
    """What follows each number where they are run through in an order again and again."""
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)
    return following


def written(sentences: Sequence[Sequence[str]]) -> str:
    return " ".join(" ".join(s).capitalize() + "." for s in sentences)


def damaged(rng: np.random.Generator, role: str, sentences: list[list[str]]) -> str:
    """A text made of sentences by one of the kinds of damage."""
    words = [w for s in sentences for w in s]
    if role == "shuffled":
        shuffled = [words[i] for i in rng.permutation(len(words))]
        return written([shuffled[i : i + 11] for i in range(0, len(words), 11)])
    if role == "menu":
        items = ["Home", "About us", "Contact", "Login", "Sitemap", *(w.capitalize() for w in words[:25])]
        order = rng.permutation(len(items))
        return "\n".join(" | ".join(items[i] for i in order[n : n + 5]) for n in range(0, len(items), 5))
    if role == "repeated":
        return "\n".join([" ".join(words[:9]).capitalize()] * int(rng.integers(8, 16)))
    marks = "#@%~^*|<>{}"
    return " ".join(w if rng.random() < 0.4 else "".join(rng.choice(list(marks), 3)) for w in words)


def rows_of(rng: np.random.Generator, language: Language, rows: int) -> list[Row]:
    """The made-up rows, in no order; `rows` of them, to a few."""
    counts = {role: round(share * rows) for role, share in SHARES.items()}
    found: list[Row] = []

    def concept() -> int:
        return int(rng.integers(1, CONCEPTS))

    plain: list[tuple[Row, list[list[str]]]] = []
    for _ in range(rows - sum(counts.values())):
        c, h = concept(), float(rng.uniform(0, 0.5))
        sentences = language.sentences(rng, c, h)
        plain.append((Row(written(sentences), "plain", c, h), sentences))
    found += [row for row, _ in plain]

    for _ in range(counts["target"]):
        h = float(rng.uniform(0, 0.3))
        found.append(Row(written(language.sentences(rng, TARGET, h)), "target", TARGET, h))
    for _ in range(counts["contrary"]):
        found.append(Row(written(language.contrary(rng)), "contrary", TARGET, 0.0))

    number = 0
    originals = iter(rng.permutation(len(plain)))
    for role in ("exact", "near", "same_words"):
        left = counts[role]
        while left > 0:
            original, sentences = plain[int(next(originals))]
            original.copies = number
            for _ in range(min(left, int(rng.integers(1, 4)))):
                copied = [list(s) for s in sentences]
                if role == "near":
                    s = copied[int(rng.integers(len(copied)))]
                    s[int(rng.integers(len(s)))] = language.stranger(rng, original.concept)
                elif role == "same_words":
                    copied = [copied[i] for i in rng.permutation(len(copied))]
                found.append(Row(written(copied), role, original.concept, original.hardness, number))
                left -= 1
            number += 1
    for role in ("shuffled", "menu", "repeated", "symbols"):
        for _ in range(counts[role]):
            c, h = concept(), float(rng.uniform(0, 0.5))
            found.append(Row(damaged(rng, role, language.sentences(rng, c, h)), role, c, h))
    for role in ("clean", "primed"):
        for _ in range(counts[role]):
            c = concept()
            sentences = language.sentences(rng, c, 0.0)
            if role == "primed":
                s = sentences[len(sentences) // 2]
                s[int(rng.integers(1, len(s)))] = language.stranger(rng, c)
            found.append(Row(written(sentences), role, c, 0.0))
    return found


FORMS = {"lines": "{}\n", "pages": "<p>{}</p>\n", "code": "def {0}():\n    return '{1}'\n\n\n"}
HEADS = {"lines": "", "pages": "<html><body>\n", "code": "'''{}'''\n\n\n"}
MENU = ("Home", "About us", "Contact", "Login", "Sitemap", "Register", "Cart (0)", "Search", "Help", "Imprint")


def mixed(rng: np.random.Generator, language: Language, form: str) -> tuple[str, list[dict[str, int]]]:
    """A text of one concept with as many foreign pieces in it, and where those stand: characters from start to end.

    Pieces are sentences on lines of their own, paragraphs of a page, or functions below a docstring; foreign ones are
    menus, lists of links, and functions that speak of another concept.
    """
    concept, other = (int(c) for c in rng.choice(np.arange(1, CONCEPTS), 2, replace=False))
    own = language.sentences(rng, concept, 0.0)
    text, planted = HEADS[form].format(" ".join(w for s in own[:2] for w in s)), []
    for at in rng.permutation(2 * len(own)).tolist():
        foreign = at >= len(own)
        words = language.sentences(rng, other, 0.0)[0] if foreign else own[at]
        items = [str(item) for item in rng.choice(MENU, 5, replace=False)]
        if form == "code":
            piece = FORMS[form].format("_".join(words[:2]), " ".join(words))
        elif not foreign:
            piece = FORMS[form].format(
                written([words, *([language.sentences(rng, concept, 0.0)[0]] * (form == "pages"))])
            )
        elif form == "lines":
            piece = " | ".join(items) + "\n"
        else:
            piece = "<ul>{}</ul>\n".format("".join(f"<li><a href='/{i}'>{i}</a></li>" for i in items))
        planted += [{"start": len(text), "end": len(text) + len(piece)}] * foreign
        text += piece
    return text, planted


def real_rows(folder: str, damaged: bool, most: int) -> list[str]:
    """English Wikipedia passages of examples/, as they are or damaged, in their order."""
    table = ds.dataset(ROOT / "examples" / folder).to_table(columns=["text", "source", "lang", "planted"])
    return [
        row["text"]
        for row in table.to_pylist()
        if row["source"] == "wikipedia_passage"
        and row["lang"] == "en"
        and (str(row["planted"]).startswith("damaged") if damaged else row["planted"] is None)
    ][:most]


def generate(directory: Path, rows: int = 2400, seed: int = 0) -> Path:
    """Write `corpus.parquet` (see `SCHEMA`) and the files that criteria learn from; returns the corpus.

    `target.parquet`, `target_more.parquet`: 60 texts of the target domain each. None of these texts is in the corpus.
    `good.parquet`, `bad.parquet`: texts as they should be, made-up and real, and damaged ones; `good_more.parquet`: 120
    others as they should be. `graded.parquet`: good and bad, with `label` 1 and 0.
    `lines.parquet`, `pages.parquet`, `code.parquet`: 200 texts with foreign pieces, their spans `planted`; see `mixed`.
    `words.parquet`: every made-up word and its concept.
    """
    rng = np.random.default_rng(seed)
    language = Language.made(rng)
    found = rows_of(rng, language, rows)
    found += [Row(text, "real", -1, 0.0) for text in real_rows("sample", False, REAL)]
    found += [Row(text, "real_damaged", -1, 0.0) for text in real_rows("sample", True, REAL)]
    found = [found[i] for i in rng.permutation(len(found))]

    concept = np.array([r.concept for r in found])
    flipped = (rng.random(len(found)) < FLIPPED) & (concept > TARGET)
    moved = 1 + (concept - 1 + rng.integers(1, CONCEPTS - 1, len(found))) % (CONCEPTS - 1)
    label = np.where(flipped, moved, concept)
    table = pa.table(
        {
            "id": [f"{i:05d}" for i in range(len(found))],
            "text": [r.text for r in found],
            "label": [f"c{n}" if n >= 0 else "real" for n in label],
            "role": [r.role for r in found],
            "concept": concept,
            "complexity": [len(language.words[r.concept]) if r.concept >= 0 else None for r in found],
            "hardness": [r.hardness for r in found],
            "copies": [r.copies for r in found],
            "flipped": flipped,
        }
    ).cast(SCHEMA)
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, directory / "corpus.parquet", row_group_size=GROUP_ROWS)

    def save(name: str, texts: list[str], **columns: list[int]) -> None:
        pq.write_table(pa.table({"text": texts, **columns}), directory / f"{name}.parquet")

    for name in ("target", "target_more"):
        save(name, [written(language.sentences(rng, TARGET, float(rng.uniform(0, 0.3)))) for _ in range(TARGETS)])

    def some() -> list[list[str]]:
        return language.sentences(rng, int(rng.integers(1, CONCEPTS)), float(rng.uniform(0, 0.5)))

    real = real_rows("seeds/good.parquet", False, SEEDS + TARGETS)
    save("good_more", [written(some()) for _ in range(TARGETS)] + real[SEEDS:])
    kinds = ("shuffled", "menu", "repeated", "symbols")
    good = [written(some()) for _ in range(SEEDS)] + real[:SEEDS]
    bad = [damaged(rng, kinds[i % 4], some()) for i in range(SEEDS)] + real_rows("seeds/bad.parquet", True, SEEDS)
    save("good", good)
    save("bad", bad)
    for form in FORMS:  # with their own generator: what is above stays what it was
        made = [mixed(np.random.default_rng([seed, i]), language, form) for i in range(MIXED)]
        table = pa.table({"text": [text for text, _ in made], "planted": [spans for _, spans in made]})
        pq.write_table(table, directory / f"{form}.parquet")
    words = {word: c for c, known in enumerate(language.words) for word in known}
    pq.write_table(pa.table({"word": list(words), "concept": list(words.values())}), directory / "words.parquet")
    save("graded", good + bad, label=[1] * len(good) + [0] * len(bad))
    return directory / "corpus.parquet"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(generate(options.directory, options.rows, options.seed))
