"""Where every criterion sits in the planted benchmark: its configuration, and the truth that it claims to find.

A kind of `pipeline.scores` without a seat fails `missing()`, so that none is forgotten. Settings are the recipe's own
defaults but for what they need (files, models, labels) and what 3,000 short rows cannot carry (a least number of tokens
or of occurrences, the size of a classifier). Nothing was tuned on the truth, but for two that were set twice and are
told with other seeds in README.md: the noise of `q_tuning`'s instructions and the epochs of `dealrec_sequences`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from bench.planted.pair_models import ASKED
from pipeline.config import kinds

PLAIN = ("plain", "exact", "near", "same_words", "clean", "primed")
DAMAGED = ("menu", "repeated", "symbols", "shuffled", "real_damaged")
COPIES = {"exact": ("exact",), "fuzzy": ("exact", "near"), "semantic": ("exact", "near", "same_words")}
SOUND = ("plain", "spatial", "swapped", "small", "strip")
"""Pairs whose captions are in order as texts."""
HARDEST = 0.8
FORGOTTEN = (5, 11)
"""Concepts whose words the model `pruned` has lost."""

Marks = Callable[[pa.Table, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Corpus and scores (n,) to the rows that count (n,) and, among all, those that are to be found (n,); both bool."""


@dataclass(frozen=True)
class Truth:
    """What is planted: a sentence, which end of the scores should find it, and the rows."""

    says: str
    end: Literal["top", "bottom"]
    marks: Marks


def role_in(*roles: str) -> Callable[[pa.Table], np.ndarray]:
    return lambda table: np.isin(np.array(table["role"].to_pylist()), roles)


def _roles(found: tuple[str, ...], among: tuple[str, ...] | None = None, without: tuple[str, ...] = ()) -> Marks:
    """Rows of some roles, among those of others (all but `without` where nothing is said)."""

    def marks(table: pa.Table, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counted = ~role_in(*without)(table) if among is None else role_in(*found, *among)(table)
        return counted, role_in(*found)(table)

    return marks


def _copies(kind: str) -> Marks:
    """Copies, but for the one of each group that scores highest: one of them may stay, whichever it is."""

    def marks(table: pa.Table, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        group = table["copies"].fill_null(-1).to_numpy()
        copied = set(group[role_in(*COPIES[kind])(table)].tolist())
        member = np.isin(group, sorted(copied)) & (group >= 0)
        order = np.lexsort((-score, group))
        first = np.zeros(len(group), bool)
        first[order] = np.diff(group[order], prepend=-2) != 0
        alone = (group < 0) & role_in("plain", "target")(table)
        return member | alone, member & ~first

    return marks


def _hard(by_concept: bool) -> Marks:
    """The fifth of the plain rows with most words of other concepts, of each concept or of all."""

    def marks(table: pa.Table, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        plain, hardness = role_in(*PLAIN)(table), table["hardness"].to_numpy()
        concept = table["concept"].to_numpy() if by_concept else np.zeros(len(hardness), int)
        found = np.zeros(len(hardness), bool)
        for c in np.unique(concept[plain]):
            rows = plain & (concept == c)
            found |= rows & (hardness > np.quantile(hardness[rows], HARDEST))
        return plain, found

    return marks


def _flipped(table: pa.Table, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return table["concept"].to_numpy() > 0, table["flipped"].to_numpy(zero_copy_only=False)


def _forgotten(table: pa.Table, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return role_in("plain")(table), np.isin(table["concept"].to_numpy(), FORGOTTEN)


def _long(table: pa.Table, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = np.array([len(t.split()) for t in table["text"].to_pylist()])
    return np.ones(len(words), bool), words > np.median(words)


def _nothing(table: pa.Table, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(len(table), bool), np.zeros(len(table), bool)


def _human(table: pa.Table, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(len(table), bool), table["label"].to_numpy() == 1


TRUTHS: Mapping[str, Truth] = {
    "target": Truth("rows of the target domain", "top", _roles(("target",), without=("contrary",))),
    "lowers": Truth("rows of the target domain, the contrary ones among the rest", "top", _roles(("target",))),
    "raises": Truth("contrary rows: target words with wrong successors", "bottom", _roles(("contrary",))),
    "damaged": Truth("menus, repetitions, symbols, shuffled words", "bottom", _roles(DAMAGED)),
    "shuffled": Truth("shuffled words among plain rows", "bottom", _roles(("shuffled",), ("plain",))),
    "primed": Truth("one word of another concept in a row of none", "bottom", _roles(("primed",), ("clean",))),
    "hard in concept": Truth("the fifth with most foreign words in each concept", "top", _hard(True)),
    "hard": Truth("the fifth with most foreign words of all rows", "top", _hard(False)),
    "flipped": Truth("rows with the label of another concept", "top", _flipped),
    "mislabelled": Truth("rows with the label of another concept", "bottom", _flipped),
    "forgotten": Truth("rows of the two concepts whose words were cut from the model", "top", _forgotten),
    "exact": Truth("copies to the letter, but one of each group", "bottom", _copies("exact")),
    "fuzzy": Truth("those and copies with a word changed", "bottom", _copies("fuzzy")),
    "semantic": Truth("those and copies with sentences moved", "bottom", _copies("semantic")),
    "none": Truth("nothing planted: it judges sets of rows, not rows; cost only", "top", _nothing),
    "long": Truth("rows of more words than the median", "top", _long),
    "swapped": Truth(
        "captions of another picture among right ones", "bottom", _roles(("swapped",), ("plain", "spatial"))
    ),
    "no captions": Truth(
        "captions of a word or two, names of files, one caption of 20 pictures",
        "bottom",
        _roles(("short", "file_name", "stock")),
    ),
    "badly sized": Truth("pictures of less than 200 pixels a side, and strips", "bottom", _roles(("small", "strip"))),
    "spatial": Truth("captions that say how two figures stand to each other", "top", _roles(("spatial",), SOUND)),
    "broken": Truth("captions shuffled, without some letters or stuttering", "bottom", _roles(("broken",), SOUND)),
    "rare": Truth(
        "responses with the rare successors: the model is sure and wrong", "top", _roles(("rare",), ("usual",))
    ),
    "noise": Truth(
        "responses of random syllables among those with rare successors", "bottom", _roles(("noise",), ("rare",))
    ),
    "random users": Truth("users who take any item", "bottom", _roles(("random",))),
    "human": Truth("documents that people called good (real, 321 rows)", "top", _human),
}


@dataclass(frozen=True)
class Seat:
    """A criterion, what it is to find, in which corpus, and how it is configured; `@name` stands for a file or model of
    that name."""

    kind: str
    truths: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    corpus: str = "corpus"
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What the columns of the corpus mean, beside `id`."""
    flops: Callable[[float, float], float] | None = None
    """FLOPs a row by what the recipe states, for a model of N parameters and rows of T tokens."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.fields.get('keep', '')}".strip()

    @property
    def asks(self) -> set[str]:
        """Names of the files and models that it is configured with."""
        return named([self.fields, self.config])


LSA = {"kind": "lsa", "dims": 64, "features": 16384}
VECTORS = {"embed": LSA}
CONCEPTS = {"embed": LSA, "cluster": {"k": 17}}
SMALL_CLASSIFIER = {"dim": 16, "bucket": 50_000, "epoch": 10, "lr": 0.5}
SMALL_LM = {
    "shape": {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 192, "vocab": 1024, "context": 256},
    "steps": 200,
    "batch": 8,
}
SEEDED = {"positives": "@good", "negatives": "@bad", **SMALL_CLASSIFIER}
SHORT = {"max_tokens": 256}
SMALL_HEADS = {"dims": 64, "batch": 64}
SMALL_SASREC = {"length": 20, "steps": 500}
"""No sequence is longer, and a step of LiSSA forgets a hundredth of those before."""
PAIRS: Mapping[str, Any] = {"corpus": "pairs", "columns": {"image": "image"}}
INSTRUCTIONS: Mapping[str, Any] = {
    "corpus": "instructions",
    "columns": {"prompt": "prompt", "response": "response"},
}

SEATS: tuple[Seat, ...] = (
    Seat("random", ("target",)),
    Seat("length", ("long",)),
    Seat("heuristics", ("damaged",)),
    Seat("density", ("hard in concept",), config=CONCEPTS),
    Seat("prototypes", ("hard",), {"keep": "hard"}, CONCEPTS),
    Seat("quality", ("damaged",), SEEDED),
    Seat(
        "loss_reduction", ("target",), {"target": "@target", "train": SMALL_LM, **SHORT}, flops=lambda n, t: 4 * n * t
    ),
    Seat("perplexity", ("shuffled",), {"model": "@model", **SHORT}, flops=lambda n, t: 2 * n * t),
    Seat(
        "priming",
        ("primed",),
        {"model": "@model", "min_count": 5, "max_share": 0.01, **SHORT},
        flops=lambda n, t: 2 * n * t,
    ),
    Seat(
        "less",
        ("lowers", "raises"),
        {"target": "@target", "model": "@model", **SHORT},
        flops=lambda n, t: 4 * 4 * n * t,
    ),
    Seat(
        "tracin",
        ("lowers", "raises"),
        {"target": "@target", "checkpoints": ["@early", "@model"], **SHORT},
        flops=lambda n, t: 4 * n * t,
    ),
    Seat(
        "trak", ("lowers", "raises"), {"target": "@target", "models": ["@model"], **SHORT}, flops=lambda n, t: 6 * n * t
    ),
    Seat("el2n", ("flipped",), {"label": "label"}, VECTORS),
    Seat("grand", ("flipped",), {"label": "label"}, VECTORS),
    Seat("dsir", ("target",), {"targets": "@target", "min_tokens": 1}),
    Seat("betr", ("target",), {"targets": "@target", "fasttext": SMALL_CLASSIFIER}, VECTORS),
    Seat("betr_sample", ("target",), {"targets": "@target", "fasttext": SMALL_CLASSIFIER, "embed": LSA}),
    Seat("similarity", ("target",), {"targets": "@target"}, VECTORS),
    Seat("regression", ("damaged",), {"examples": "@graded"}, VECTORS),
    Seat("exact_duplicates", ("exact",)),
    Seat("fuzzy_duplicates", ("fuzzy",)),
    Seat("semantic_duplicates", ("semantic",), config=CONCEPTS),
    Seat("diversity", ("semantic",), config=CONCEPTS),
    Seat("dealrec", ("mislabelled",), {"label": "label"}, VECTORS),
    Seat("paser", ("forgotten",), {"original": "@model", "pruned": "@pruned"}, VECTORS, flops=lambda n, t: 4 * n * t),
    Seat(
        "verified_quality",
        ("damaged",),
        {
            "pools": {
                "good": {"positives": "@good", "negatives": "@bad"},
                "damaged": {"positives": "@bad", "negatives": "@good"},
            },
            "target": "@good_more",
            "fasttext": SMALL_CLASSIFIER,
            "prior": SMALL_LM,
        },
    ),
    Seat("calibration", ("none",), {"model": "@model"}),
    Seat("clip_score", ("swapped",), {"model": "@clip"}, **PAIRS),
    Seat(
        "dfn",
        ("swapped",),
        {"trusted": "@trusted", "image_encoder": "@vision", "text_encoder": "@reader", "train": SMALL_HEADS},
        **PAIRS,
    ),
    Seat("caption_rules", ("no captions",), {"max_shared": 10}, **PAIRS),
    Seat("image_size", ("badly sized",), **PAIRS),
    Seat("spatial_relations", ("spatial",), **PAIRS),
    Seat("mlm_filter", ("broken",), {"model": "@judge", "prompt": ASKED, "max_new_tokens": 4}, **PAIRS),
    Seat("q_tuning", ("rare", "noise"), {"model": "@model", "max_tokens": 256}, **INSTRUCTIONS),
    Seat("dealrec_sequences", ("random users",), {"items": "items", **SMALL_SASREC}, corpus="sequences"),
    Seat("random", ("human",), corpus="real"),
    Seat("length", ("human",), corpus="real"),
    Seat("heuristics", ("human",), corpus="real"),
    Seat("quality", ("human",), SEEDED, corpus="real"),
    Seat("perplexity", ("human",), {"train": SMALL_LM, **SHORT}, corpus="real"),
)


REWRITES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("sentences, rules of C4", "lines", {"kind": "sentences", "unit": "line", "rules": ["c4"]}),
    ("sentences, rules of RefinedWeb", "lines", {"kind": "sentences", "unit": "line", "rules": ["refinedweb"]}),
    ("sentences, quality", "lines", {"kind": "sentences", "unit": "line", "score": {"kind": "quality", **SEEDED}}),
    ("html_blocks", "pages", {"kind": "html_blocks"}),
    ("functions", "code", {"kind": "functions"}),
)
"""A rewrite, the texts that it is tried on (`generator.mixed`), and how it is configured."""


def missing() -> list[str]:
    """Kinds of `pipeline.scores` and `pipeline.rewrite` that have no seat."""
    rewrites = set(kinds("pipeline.rewrite")) - {r["kind"] for _, _, r in REWRITES}
    return sorted((set(kinds("pipeline.scores")) - {s.kind for s in SEATS}) | rewrites)


def characters(texts: pa.Table, rows: pa.Table) -> tuple[float, float]:
    """Shares of the planted letters and digits that are gone, and of the others that are left. `texts`: text and
    `planted`; `rows`: curated rows with `source`, the text as it was, and `tamis.kept`."""
    planted = {row["text"]: row["planted"] for row in texts.to_pylist()}
    total, left = np.zeros(2), np.zeros(2)
    for row in rows.to_pylist():
        foreign, kept = (np.zeros(len(row["source"]), bool) for _ in range(2))
        for mask, spans in ((foreign, planted[row["source"]]), (kept, row["tamis"]["kept"])):
            for span in spans:
                mask[span["start"] : span["end"]] = True
        for i, mask in enumerate((foreign, ~foreign)):
            mask &= np.array([c.isalnum() for c in row["source"]])  # markup and white space are nobody's
            total[i] += mask.sum()
            left[i] += (mask & kept).sum()
    return float(1 - left[0] / total[0]), float(left[1] / total[1])


def named(value: Any) -> set[str]:
    """What stands for files and models in a configuration, without the `@`."""
    if isinstance(value, str):
        return {value[1:]} if value.startswith("@") else set()
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return set[str]().union(*map(named, inner))


def resolved(value: Any, places: Mapping[str, str]) -> Any:
    """A configuration with the addresses of its files in place of `@name`."""
    if isinstance(value, str) and value.startswith("@"):
        return places[value[1:]]
    if isinstance(value, Mapping):
        return {k: resolved(v, places) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(v, places) for v in value]
    return value


@dataclass(frozen=True)
class Found:
    """How well scores find a truth: rows marked and rows that count, precision at as many rows as are marked, AUROC;
    None where nothing is marked."""

    marked: int
    rows: int
    precision: float | None
    auroc: float | None


def judge(truth: Truth, table: pa.Table, score: np.ndarray, seed: int = 0) -> Found:
    """`score` (n,) float, NaN where a row has none: such rows come last at the top, and first at the bottom.

    Ties at the edge of the budget are cut by a random order; in the AUROC a tie counts half.
    """
    from scipy.stats import rankdata

    score = np.where(np.isnan(score), -np.inf, score.astype(np.float64))
    counted, marked = truth.marks(table, score)
    value, found = (score if truth.end == "top" else -score)[counted], (marked & counted)[counted]
    budget = int(found.sum())
    if not budget:
        return Found(0, len(value), None, None)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(value)), -value))
    ranks = rankdata(value)
    auroc = (ranks[found].sum() - budget * (budget + 1) / 2) / (budget * (len(value) - budget))
    return Found(budget, len(value), float(found[order[:budget]].mean()), float(auroc))
