"""Build the sample corpus and the seed sets of this directory from a larger corpus of real text.

usage: python examples/build_sample.py CORPUS_DIR [OUT_DIR]

CORPUS_DIR holds Parquet files with the string columns id, text, source, lang, license, meta. Rows are taken only where
the licence column names one that allows redistribution (LICENSES), source by source in the order of sha256(id), so the
result depends on the input alone. Planted rows are made from taken rows by the functions below, each with a generator
seeded by the row's id and the kind of damage. What is planted and from which row stands in `planted` and `original`.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

LICENSES = {"Public domain (published before 1929)", "Public domain", "CC-BY-SA-3.0", "CC-BY-SA-4.0"}
NOT_FREE_EVERYWHERE = ("Forster_",)  # public domain where published before 1929, but its author died in 1970
TAKEN = {"book": 560, "us_speech": 260, "wikipedia_passage": 900, "wikipedia_wikitext": 26, "wikipedia_xquad": 600}
SEEDED = {"book": 90, "us_speech": 60, "wikipedia_passage": 420, "wikipedia_wikitext": 6, "wikipedia_xquad": 300}
PARAGRAPHS_FOR_SEEDS = 0.4  # xquad is one text in twelve languages: no paragraph is in the sample and in the seeds
FILES, GROUP_ROWS = 3, 250

NAVIGATION = ("Home", "About us", "Contact", "Login", "Register", "My account", "Cart (0)", "Sitemap", "Privacy policy")
FOOTERS = (
    "Read more",
    "Subscribe to our newsletter",
    "This site uses cookies. Accept all",
    "Share on social media",
    "You must be logged in to view this page",
    "Page 1 of 12. Next",
    "All rights reserved.",
)


@dataclass(frozen=True)
class Row:
    id: str
    text: str
    source: str
    lang: str
    license: str
    origin: str
    planted: str | None = None
    original: str | None = None


def words_of(text: str) -> tuple[list[str], str]:
    """Words and what joins them; characters where the script has no spaces."""
    words = text.split()
    return (words, " ") if len(words) * 20 > len(text) else (list(text), "")


def shuffled_words(text: str, rng: random.Random) -> str:
    words, space = words_of(text)
    rng.shuffle(words)
    return space.join(words)


def repeated_line(text: str, rng: random.Random) -> str:
    start = rng.randrange(max(1, len(text) - 120))
    line = " ".join(text[start : start + rng.randint(60, 120)].split())
    return "\n".join([line] * rng.randint(12, 30))


def symbols(text: str, rng: random.Random) -> str:
    return "".join(rng.choice("#@~^|%$*_+=<>") if rng.random() < 0.3 else c for c in text)


def truncated(text: str, rng: random.Random) -> str:
    return "\n".join([text[: rng.randint(50, 90)] + "...", *rng.sample(FOOTERS, 3)])


def menu(text: str, rng: random.Random) -> str:
    words, _ = words_of(text)
    topics = rng.sample(words, min(len(words), 24))
    items = [*NAVIGATION, *(w.strip(".,;:()\"'").title() for w in topics)]
    rng.shuffle(items)
    return "\n".join(" | ".join(items[i : i + 6]) for i in range(0, len(items), 6)) + "\n" + rng.choice(FOOTERS)


def mojibake(text: str, rng: random.Random) -> str:
    return text.encode().decode("cp1252", errors="replace")


def lightly_edited(text: str, rng: random.Random) -> str:
    """Of a hundred words about two are left out, two swapped with the next and two lose their punctuation or case."""
    words, space = words_of(text)
    edited: list[str] = []
    for word in words:
        draw = rng.random()
        if draw < 0.02:
            continue
        if draw < 0.04 and edited:
            edited.insert(len(edited) - 1, word)
        else:
            edited.append(word.strip(".,;:").lower() if draw > 0.98 else word)
    return space.join(edited)


DAMAGE: dict[str, Callable[[str, random.Random], str]] = {
    f.__name__: f for f in (shuffled_words, repeated_line, symbols, truncated, menu, mojibake)
}


def plant(row: Row, kind: str, make: Callable[[str, random.Random], str]) -> Row:
    text = make(row.text, random.Random(f"{row.id} {kind}"))
    return replace(row, id=f"{row.id}+{kind.removeprefix('damaged:')}", text=text, planted=kind, original=row.id)


def damaged(rows: list[Row], each: int) -> Iterator[Row]:
    """`each` rows of every kind of damage, no row damaged twice; mojibake only where most letters are not ASCII."""
    foreign = [r for r in rows if len(r.text.encode()) > 1.5 * len(r.text)]
    rest = [r for r in rows if r not in set(foreign)] + foreign[each:]
    yield from (plant(r, "damaged:mojibake", mojibake) for r in foreign[:each])
    for i, kind in enumerate(k for k in DAMAGE if k != "mojibake"):
        yield from (plant(r, f"damaged:{kind}", DAMAGE[kind]) for r in rest[i::5][:each])


def order(row: Row) -> bytes:
    return hashlib.sha256(row.id.encode()).digest()


def read(corpus: Path) -> list[Row]:
    table = ds.dataset(corpus, format="parquet").to_table(columns=["id", "text", "source", "lang", "license", "meta"])
    rows = [Row(*values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)]
    free = [r for r in rows if r.license in LICENSES and not r.origin.startswith(NOT_FREE_EVERYWHERE)]
    return sorted((r for r in free if 200 <= len(r.text) <= 30_000), key=order)


def for_seeds(row: Row) -> bool:
    """Whether a paragraph of xquad belongs to the seeds, in all its languages alike."""
    paragraph = row.id.split("/", 2)[2]
    return hashlib.sha256(paragraph.encode()).digest()[0] < 256 * PARAGRAPHS_FOR_SEEDS


def take(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of the sample and rows of the seeds; none in both."""
    sample, seeds = [], []
    for source, count in TAKEN.items():
        here = [r for r in rows if r.source == source]
        if source != "wikipedia_xquad":
            sample += here[:count]
            seeds += here[count : count + SEEDED[source]]
            continue
        for lang in sorted({r.lang for r in here}):
            alike = [r for r in here if r.lang == lang]
            sample += [r for r in alike if not for_seeds(r)][: count // 12]
            seeds += [r for r in alike if for_seeds(r)][: SEEDED[source] // 12]
    return sorted(sample, key=order), sorted(seeds, key=order)


def write(rows: list[Row], path: Path) -> None:
    columns = {f.name: pa.array([getattr(r, f.name) for r in rows], pa.string()) for f in fields(Row)}
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = ["source", "lang", "license", "planted"]
    pq.write_table(pa.table(columns), path, GROUP_ROWS, compression="zstd", compression_level=19, use_dictionary=tags)


def build(corpus: Path, out: Path) -> None:
    sample, seeds = take(read(corpus))
    planted = [plant(r, "near_duplicate", lightly_edited) for r in sample[0::17]]
    planted += [plant(r, "exact_duplicate", lambda text, _: text) for r in sample[1::59]]
    planted += damaged(sample[2::4], each=70)
    whole = sorted(sample + planted, key=order)
    for i in range(FILES):
        write(whole[i * len(whole) // FILES : (i + 1) * len(whole) // FILES], out / f"sample/part-{i}.parquet")
    write(seeds, out / "seeds/good.parquet")
    write(sorted(damaged(seeds, each=130), key=order), out / "seeds/bad.parquet")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent)
