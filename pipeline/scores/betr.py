"""BETR: rows like those nearest to benchmark examples, by a classifier that learnt which rows these are.

Source: Mizrahi et al. 2025, "Language Models Improve When Pretraining Data Matches Target Tasks", arXiv 2507.12466; no
code was published. Every example of the target benchmarks (training examples, question and answer in one text) ranks
the rows of a sample by cosine, 1 for the nearest. A row's value is its best rank over all examples, or with
`aggregation: mean` the mean of 1 / rank, with `mean_log` that of log2(1 / rank); in the paper's ablation the best rank
gave 62.2, the mean 58.2. Rows with an equal cosine have the same, least rank. The best `positive_share` of the sample
are the positives of a classifier, as many of the rest its negatives, and its probability is the score of every row.

- The sample is of distinct ids, or of distinct texts where the corpus has none. Copies of one close row under other ids
  tie and can fill the positives: remove duplicates first. The paper ranks 10,000,000 rows; below 10,000 (1,000
  positives) a classifier over-fits, which is warned of.
- The best ranks come from the `depth` nearest rows of every example, kept by one aggregate: 16 bytes times examples
  times depth. Positives are all within that depth, or it is quadrupled, so they are those of the full matrix; the means
  need the full matrix, and refuse a sample for which that is over 4 GB. `betr.json` says how many positives are owed to
  the examples to which most are: an odd example attracts junk, and there it shows.
- An odd example (a template, a stray heading) is near to pages that are all the same, and with the best rank it brings
  them in: one whose 10 nearest rows have a mean cosine above `constant` among themselves is left out and warned of. The
  paper does not say how to find them: number and measure are ours, and cost 20 bytes a dimension and example. Of 100
  real examples it left out 11, all of them entries of one medical database that fill in one form. Where more than half
  would go, vectors that near are no oddity, and none is left out.
- Benchmarks with more examples would count for more: `group` names the column that tells them apart, and all then give
  as many as the smallest.
- `classifier: fasttext` is the paper's, with DCLM's settings; `linear` is a logistic regression on the run's vectors,
  which costs no second pass over the text. The paper embeds the sample alone: that is `betr_sample`; here the run's
  embedding covers the corpus, and other steps use it, too.
- What is chosen for some tasks is worse for others: in the paper 44.2 against 46.3 (DCLM) on tasks not targeted. Target
  broadly. The share to keep grows with the model: `optimal_percent`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.errors import ConfigError, CorpusError
from pipeline.hashing import hash64, row_keys
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import Sample, draw, needs_fit, texts
from pipeline.scores._contamination import Contained, warn_contained
from pipeline.scores._seeds import identify, locate
from pipeline.scores._targets import embedded, listed, read_targets
from pipeline.scores.base import Score
from pipeline.scores.quality import DRAWN_BYTES, FastText, measure, open_classifier, train_classifier
from pipeline.scores.similarity import VECTOR, unit
from pipeline.vectors import matrix

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

log = logging.getLogger(__name__)

FIELDS = pa.schema([("score", pa.float32())])
Aggregation = Literal["max", "mean", "mean_log"]
KEY = "row.key"
VECTORS, HEAD, FACTS = "vectors.npy", "head.npz", "betr.json"
ENTRY = 16
"""Bytes of a row in the list of an example: its cosine, its hash and the example."""
MOST_BYTES = 4 << 30
NEIGHBOURS = 10
"""Rows nearest to an example that are compared with each other."""
ENOUGH_ROWS = 10_000
BLOCK = 1 << 22
"""Cosines that are worked out at once."""


def optimal_percent(flops: float) -> float:
    """Percent of the tokens to keep for a training run of so many FLOPs: the paper's fit, 4e-5 * C^0.25."""
    return float(4e-5 * flops**0.25)


class Betr(Score):
    """P(among the rows of best rank), in [0, 1]."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "vectors"
    key: ClassVar[str] = KEY
    """Reference to what tells the rows of the sample apart."""
    claim = "like the rows that lie nearest to an example of the target benchmarks"
    cost = "that of the classifier; 2 m d FLOPs for m examples a row of the sample"
    source = "Mizrahi et al. 2025 (BETR), arXiv 2507.12466"
    kind: Literal["betr"] = "betr"
    targets: str | list[str] = Field(description="benchmark examples: Parquet, .jsonl or .txt files")
    target_text: str = Field("text", description="column of the targets that holds question and answer")
    group: str | None = Field(None, description="column of the targets that names the benchmark; all then count alike")
    sample: int = Field(10_000_000, ge=10, description="rows to rank; all where the corpus has fewer")
    positive_share: float = Field(0.1, gt=0, lt=1, description="share of the sample that is positive")
    aggregation: Aggregation = Field("max", description="best rank, or a mean over examples")
    depth: int = Field(1000, ge=1, description="nearest rows of every example to begin with")
    constant: float = Field(0.98, gt=0, le=1, description="examples whose nearest rows are so much alike are left out")
    examples: int = Field(100_000, ge=1, description="most rows a side to train on (DCLM's count)")
    classifier: Literal["fasttext", "linear"] = Field("fasttext", description="what learns the ranking")
    fasttext: FastText = Field(FastText(), description="how fastText is trained")
    seed: int | None = Field(None, description="seed of the sample (default: the run's)")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.classifier == "linear" and "fasttext" in self.model_fields_set:
            raise ValueError("`fasttext` is for `classifier: fasttext`: remove it")
        return self

    def fit(self, run: Run) -> None:
        self._classifier(run)

    def column(self, run: Run) -> Column:
        classifier = self._classifier(run)
        identity = fingerprint("betr", self.version, self.classifier, classifier.fingerprint)
        if self.classifier == "linear":
            return Column(self.column_name, (VECTOR,), FIELDS, partial(_open_linear, classifier), identity)
        return Column(self.column_name, ("text",), FIELDS, partial(open_classifier, classifier), identity)

    def _classifier(self, run: Run) -> Artifact:
        """Artifact with `model.bin` or `head.npz`, and `betr.json`."""
        seed = run.seed if self.seed is None else self.seed
        targets = self._targets(run)
        asked = self.model_dump(mode="json", exclude={"name", "targets", "target_text", "group", "seed", "fasttext"})
        asked |= self.fasttext.prints()
        identity = fingerprint("betr classifier", self.version, asked, seed, targets.fingerprint, self._reads(run))
        rows, positive, facts = State(), np.empty(0, np.uint64), dict[str, Any]()
        if needs_fit(run, self.column_name, identity):
            positive, negative, facts = self._label(run, targets, seed)
            value = "text" if self.classifier == "fasttext" else VECTOR
            chosen = np.union1d(positive, negative)
            wanted = Chosen((value,), len(chosen), run.rows, seed, self.key, max_bytes=DRAWN_BYTES, chosen=chosen)
            rows = run.aggregate(wanted, "betr examples")
        build = partial(_train, rows, positive, self.fasttext if self.classifier == "fasttext" else None, facts)
        return run.artifact(self.column_name, identity, build)

    def _targets(self, run: Run) -> Artifact:
        """Artifact `<name>-targets`: `vectors.npy` (m, d) float16, `targets.json` with the beginnings of the texts."""
        embed = self._embedding(run)
        uris = locate(listed(self.targets), "betr.targets")
        identity = fingerprint("betr targets", self.target_text, self.group, identify(uris), embed.identity)
        name = f"{self.column_name}-targets"
        examples, contained = pa.table({}), Contained(0, [])
        if needs_fit(run, name, identity):
            examples = read_targets(uris, self.target_text, "betr.targets", self.group, embed)
            contained = warn_contained(run, examples["text"].combine_chunks(), "betr.targets")
        return run.artifact(name, identity, partial(_embed, examples, embed, contained), embed.resources)

    def _embedding(self, run: Run) -> Column:
        """The embedding of rows and examples."""
        return run.plans["embed"].column

    def _reads(self, run: Run) -> str:
        """Identity of all that the ranking reads of rows."""
        return run.identity("text", VECTOR, KEY)

    def _sampled(self, run: Run, seed: int, last: int) -> tuple[str, str]:
        """References to key and vector of the rows whose hash is at most `last`; others may be there, too."""
        return KEY, VECTOR

    def _label(self, run: Run, targets: Artifact, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Hashes of the rows to train on, positive and negative, as many of each; and how they came about."""
        sample = draw(run, Sample((), self.sample, run.rows, seed, self.key))
        if not sample:
            raise CorpusError("betr: no row is usable; see quarantine/row for the reasons")
        hashes, count = sample["hash"], len(np.load(targets.local() / VECTORS, mmap_mode="r"))
        wanted = max(1, round(self.positive_share * len(hashes)))
        if len(hashes) < ENOUGH_ROWS:
            log.warning(
                "betr: %d rows are ranked, %d of them positive: below %d the classifier learns these rows more than "
                "their kind",
                len(hashes),
                wanted,
                ENOUGH_ROWS,
            )
        depth = len(hashes) if self.aggregation != "max" else max(self.depth, NEIGHBOURS, -(-wanted // count))
        key, vector = self._sampled(run, seed, int(hashes[-1]))
        likeness: np.ndarray | None = None
        while True:
            depth = min(depth, len(hashes))
            if count * depth * ENTRY > MOST_BYTES:
                raise ConfigError(
                    f"betr.sample: {count:,} examples times their {depth:,} nearest rows are more than "
                    f"{MOST_BYTES >> 30} GB: lower betr.sample, or give fewer examples"
                )
            nearest = run.aggregate(NearestRows(targets, depth, seed, int(hashes[-1]), key, vector), "betr ranks")
            if not nearest:
                raise CorpusError("betr: no row of the sample has a vector; see quarantine/ for the reasons")
            if likeness is None:
                near = np.unique(nearest["hash"][_place(nearest["target"]) < NEIGHBOURS])
                rows = run.aggregate(Chosen((vector,), len(near), run.rows, seed, key, chosen=near), "betr neighbours")
                likeness = alike(nearest, rows["hash"], unit(rows[vector]), count)
                odd = self._odd(likeness)
            nearest = {name: values[~odd[nearest["target"]]] for name, values in nearest.items()}
            ranked, value, owed = ranks(nearest, count - int(odd.sum()), self.aggregation)
            if depth == len(hashes) or is_certain(nearest, depth, value, wanted):
                break
            depth *= 4
        positive = ranked[:wanted]
        used = positive if wanted <= self.examples else np.sort(positive)[: self.examples]
        negative = hashes[~np.isin(hashes, positive)][: len(used)]
        begins = json.loads((targets.local() / FACTS).read_text())["begins"]
        most = np.bincount(owed[:wanted], minlength=count)
        facts = {
            "sample": len(hashes),
            "targets": count,
            "depth": depth,
            "positives": len(positive),
            "worst_value_of_a_positive": float(value[len(positive) - 1]),
            "positives_by_example": [
                {"example": begins[i], "positives": int(most[i])} for i in np.argsort(-most, kind="stable")[:10]
            ],
            "left_out": [{"example": begins[i], "likeness": float(likeness[i])} for i in np.flatnonzero(odd)[:100]],
        }
        return used, negative, facts

    def _odd(self, likeness: np.ndarray) -> np.ndarray:
        """Examples to leave out, bool (m,), and a warning where there are some; none where most would be."""
        odd = np.asarray(likeness > self.constant)
        usual = odd.mean() > 0.5
        if odd.any():
            log.warning(
                "betr.targets: the rows nearest to %d of %d examples are all alike (betr.constant); %s",
                int(odd.sum()),
                len(odd),
                "so many are no oddity, and none is left out" if usual else "these examples are left out",
            )
        return np.zeros_like(odd) if usual else odd


@dataclass(frozen=True)
class NearestRows:
    """Statistic: the `depth` rows nearest to each example, of the rows whose hash is at most `last`.

    State: `target` int32, `cosine` float32 and `hash` uint64, each (entries,), sorted by target, then by falling
    cosine, then by hash; a key counts once. Cosines are exact: a float16 is a multiple of 2^-24, so the products of
    unit vectors and their sums fit the 53 bits of a float64 in any order of summation, and equal vectors tie.
    """

    targets: Artifact
    depth: int
    seed: int
    last: int
    key: str = KEY
    vector: str = VECTOR

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.key, self.vector)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        hashes = hash64(batch.column(self.key), self.seed)
        drawn = np.flatnonzero(hashes <= np.uint64(self.last))
        examples = np.load(self.targets.local() / VECTORS).astype(np.float64)
        vectors, hashes = matrix(batch.column(self.vector))[drawn], hashes[drawn]
        least = self._least(state, len(examples))
        found, entries = [state] if state else [], 0
        step = max(1, BLOCK // len(examples))
        for start in range(0, len(drawn), step):
            x = vectors[start : start + step].astype(np.float64)
            cosine = ((examples @ x.T) / np.sqrt(np.vecdot(x, x))).astype(np.float32)
            target, row = np.nonzero(cosine >= least[:, None])
            near = {"target": target.astype(np.int32), "cosine": cosine[target, row], "hash": hashes[start + row]}
            found, entries = [*found, near], entries + len(row)
            if entries > max(BLOCK, len(examples) * self.depth):  # sorted now and then: lists fill up early
                found, entries = [self.merge(found)], 0
                least = self._least(found[0], len(examples))
        return self.merge(found) if found else {}

    def _least(self, state: State, examples: int) -> np.ndarray:
        """What a cosine must reach to be among the nearest so far; (m,)."""
        least = np.full(examples, -np.inf, np.float32)
        if state:
            targets, first, rows = np.unique(state["target"], return_index=True, return_counts=True)
            full = rows == self.depth
            least[targets[full]] = state["cosine"][(first + rows - 1)[full]]
        return least

    def merge(self, states: Sequence[State]) -> State:
        target, cosine, hashes = (np.concatenate([s[n] for s in states]) for n in ("target", "cosine", "hash"))
        order = np.lexsort((hashes, -cosine, target))
        target, cosine, hashes = target[order], cosine[order], hashes[order]
        again = (target[1:] == target[:-1]) & (hashes[1:] == hashes[:-1])
        fresh = np.concatenate([[True], ~again]) if len(target) else np.empty(0, bool)
        target, cosine, hashes = target[fresh], cosine[fresh], hashes[fresh]
        kept = _place(target) < self.depth
        return {"target": target[kept], "cosine": cosine[kept], "hash": hashes[kept]}


@dataclass(frozen=True)
class Chosen(Sample):
    """Statistic: the sample's values of the rows whose hashes are `chosen` (sorted uint64)."""

    chosen: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64), repr=False)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        keys = batch.column(self.key)
        hashes = hash64(row_keys(keys) if self.key == "text" else keys, self.seed)
        found = np.flatnonzero(np.isin(hashes, self.chosen))
        rows: State = {"hash": hashes[found]}
        for name in self.values:
            rows |= self._pack(name, batch.column(name).take(pa.array(found)))
        return self.merge([state, rows] if state else [rows])


def _place(target: np.ndarray) -> np.ndarray:
    """Place of every entry among those of its example, from 0; `target` is sorted."""
    return np.asarray(np.arange(len(target)) - np.searchsorted(target, target))


def alike(nearest: State, hashes: np.ndarray, vectors: np.ndarray, examples: int) -> np.ndarray:
    """Mean cosine between any two of the `NEIGHBOURS` rows nearest to each example; (m,), 0 with fewer than two.

    `hashes` (n,) ascending and unit `vectors` (n, d): the rows that `nearest` names, no other.
    """
    target, hashed = (nearest[name][_place(nearest["target"]) < NEIGHBOURS] for name in ("target", "hash"))
    rows = np.bincount(target, minlength=examples)
    sums = np.zeros((examples, vectors.shape[1]))
    for start in range(0, len(target), BLOCK >> 8):
        part = slice(start, start + (BLOCK >> 8))
        np.add.at(sums, target[part], vectors[np.searchsorted(hashes, hashed[part])])
    pairs = rows * (rows - 1)
    return np.asarray(np.divide(np.vecdot(sums, sums) - rows, pairs, out=np.zeros(examples), where=pairs > 0))


def ranks(nearest: State, examples: int, aggregation: Aggregation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the ranks say of every row that is in a list of `NearestRows`; best first, ties by hash.

    Returns its hash (uint64), its value (float64: the greatest or the mean 1 / rank, or the mean log2(1 / rank), over
    `examples`) and the example that ranks it best (int32), all (rows,). Equal cosines have the least rank of theirs.
    """
    rank = _ranks(nearest)
    best_first = np.lexsort((nearest["target"], rank))
    hashes, first, row = np.unique(nearest["hash"][best_first], return_index=True, return_inverse=True)
    owed = nearest["target"][best_first][first]
    rank = rank[best_first]
    if aggregation == "max":
        value = 1.0 / rank[first]
    else:
        value = np.bincount(row, 1.0 / rank if aggregation == "mean" else -np.log2(rank)) / examples
    order = np.lexsort((hashes, -value))
    return hashes[order], value[order], owed[order]


def _ranks(nearest: State) -> np.ndarray:
    """Rank of every entry, from 1, the same where the cosines of an example are equal."""
    target, cosine = nearest["target"], nearest["cosine"]
    place = _place(target)
    starts = np.concatenate([[True], (target[1:] != target[:-1]) | (cosine[1:] != cosine[:-1])])
    return np.asarray(1 + place[np.maximum.accumulate(np.where(starts, np.arange(len(target)), 0))])


def is_certain(nearest: State, depth: int, value: np.ndarray, wanted: int) -> bool:
    """Whether the first `wanted` rows by best rank are those of the full matrix.

    They are where all rank above the end of every list that was cut, since what is cut ranks there or below.
    """
    if len(value) < wanted:
        return False
    last = np.flatnonzero(np.diff(nearest["target"], append=-1))
    cut = last[_place(nearest["target"])[last] == depth - 1]
    return bool(not len(cut) or 1 / value[wanted - 1] < _ranks(nearest)[cut].min())


def _embed(examples: pa.Table, embed: Column, contained: Contained, directory: Path) -> None:
    vectors, taken = embedded(embed, examples, "betr.targets")
    np.save(directory / VECTORS, vectors)
    begins = pc.utf8_slice_codeunits(examples["text"].take(pa.array(taken)), 0, 100).to_pylist()
    facts = {"contained_rows": contained.rows, "contained_ids": contained.ids, "begins": begins}
    (directory / FACTS).write_text(json.dumps(facts, indent=2))


def _train(
    rows: State, positive: np.ndarray, fasttext: FastText | None, facts: dict[str, Any], directory: Path
) -> None:
    """Train the classifier on the chosen rows; `fasttext` None trains a logistic regression on their vectors."""
    is_good = np.isin(rows["hash"], positive) if rows else np.empty(0, bool)
    if is_good.all() or not is_good.any():
        raise ConfigError(
            f"betr: {int(is_good.sum())} positive and {int((~is_good).sum())} negative rows: raise betr.sample, or "
            "change betr.positive_share, so that there are some of both"
        )
    if fasttext is None:
        facts = facts | _train_linear(unit(rows[VECTOR]), is_good, directory)
    else:
        lines = pa.array(texts(rows), pa.large_string())
        sides = (lines.filter(pa.array(is_good)), lines.filter(pa.array(~is_good)))
        train_classifier(*sides, fasttext, directory)
    (directory / FACTS).write_text(json.dumps(facts, indent=2))


def _train_linear(vectors: np.ndarray, is_good: np.ndarray, directory: Path) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression

    held = np.arange(len(vectors)) < len(vectors) // 10  # their order is random: it is by hash
    if len(np.unique(is_good[~held])) < 2:
        held[:] = False
    head = LogisticRegression(max_iter=1000).fit(vectors[~held], is_good[~held])
    weights, intercept = head.coef_[0].astype(np.float32), head.intercept_.astype(np.float32)
    np.savez(directory / HEAD, weights=weights, intercept=intercept)
    return {"held_out": measure(sigmoid(vectors[held] @ weights + intercept), is_good[held])}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x))


def _open_linear(classifier: Artifact) -> Transform:
    with np.load(classifier.local() / HEAD, allow_pickle=False) as arrays:
        weights, intercept = arrays["weights"], arrays["intercept"]

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        value = sigmoid(np.vecdot(unit(matrix(batch.column(VECTOR))), weights) + intercept)
        return pa.record_batch([pa.array(value)], schema=FIELDS)

    return score
