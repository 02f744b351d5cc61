"""Similarity: how near a row is to target examples, by the run's own vectors, on a scale that all examples share.

Cosines of different examples do not compare: one that is about everything is 0.5 from any row, another is 0.2 from all
but its own kind, and one cut through both keeps the neighbours of the first. Rossi et al. 2024, "Relevance Filtering
for Embedding-based Retrieval", arXiv 2408.04887, map each query's cosines by an increasing function that depends on the
query ("Cosine Adapter") and then cut all by one threshold. Of the paper the abstract and summaries were read; there a
network predicts the function's parameters (linear, square root or power) from the query's embedding, trained on labels
of relevance. There are none here, so what is built is the linear form with parameters that the corpus gives: with the
mean and deviation of an example's cosine over all rows,

    mapped = (cosine - mean) / deviation,

which is increasing for each example, and the same number means the same surprise for all: a cosine so many deviations
above that of a row of this corpus. `floors: {similarity: 3}` is then the one global threshold. Mean and deviation need
no cosine: they follow from the mean and second moments of the vectors, d + d^2 numbers from one pass, however many
examples there are. `calibrate: false` gives plain cosines.

What it trades away: rows that match are part of the mean and deviation, so an example of a large domain scores lower
than one of a rare domain. With `best: true` more examples make a high score likelier for any row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.errors import CorpusError
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores._contamination import warn_contained
from pipeline.scores._seeds import identify, locate
from pipeline.scores._targets import embedded, listed, read_targets
from pipeline.scores.base import Score
from pipeline.vectors import as_float32, flat_index, matrix

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

VECTOR = "embed.vector"
FIELDS = pa.schema([("score", pa.float32()), ("target", pa.int32())])
MAP, FACTS = "map.npz", "similarity.json"
BLOCK = 4096
"""Rows that are widened to float64 at once."""
LEAST_DEVIATION = 1e-3
"""Of a cosine, about the rounding of float16: below it there is nothing to calibrate by."""


class Similarity(Score):
    """Deviations above the usual cosine to the example (`target`) to which a row is nearest in these terms."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "vectors"
    claim = "nearer to a target example than the corpus's rows are"
    cost = "2 m d FLOPs for m examples, and 2 d^2 for the calibration"
    source = "Rossi et al. 2024, arXiv 2408.04887 (its linear form, calibrated on the corpus instead of labels)"
    kind: Literal["similarity"] = "similarity"
    targets: str | list[str] = Field(description="examples to be like: Parquet, .jsonl or .txt files")
    target_text: str = Field("text", description="column of the targets that holds the text")
    calibrate: bool = Field(True, description="in deviations from an example's mean cosine; else the cosine itself")
    best: bool = Field(True, description="the nearest example's score; else the mean over all examples")

    def fit(self, run: Run) -> None:
        self._map(run)

    def column(self, run: Run) -> Column:
        mapping = self._map(run)
        identity = fingerprint("similarity", self.version, self.best, mapping.fingerprint)
        return Column(self.column_name, (VECTOR,), FIELDS, partial(_open, mapping, self.best), identity)

    def _map(self, run: Run) -> Artifact:
        """Artifact with `map.npz`: `vectors` (m, d), `scale` and `shift` (m,): mapped = scale * cosine + shift."""
        embed = run.plans["embed"].column
        uris = locate(listed(self.targets), "similarity.targets")
        asked = [self.target_text, self.calibrate, identify(uris)]
        identity = fingerprint("similarity map", self.version, asked, embed.identity, run.identity("text", VECTOR))
        examples, moments, contained = pa.table({}), State(), 0
        if needs_fit(run, self.column_name, identity):
            examples = read_targets(uris, self.target_text, "similarity.targets", embed=embed)
            contained = warn_contained(run, examples["text"].combine_chunks(), "similarity.targets").rows
            if self.calibrate and not (moments := run.aggregate(Moments(), "mean and second moments")):
                raise CorpusError("similarity: no row has a vector; see quarantine/embed for the reasons")
        build = partial(_fit, examples, moments, embed, contained)
        return run.artifact(self.column_name, identity, build, embed.resources)


@dataclass(frozen=True)
class Moments:
    """Statistic: `rows` (1,), the sum of unit vectors `sum` (d,) and of their outer products `outer` (d, d)."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (VECTOR,)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        vectors = matrix(batch.column(VECTOR))
        dims = vectors.shape[1]
        new = {"rows": np.array([len(vectors)]), "sum": np.zeros(dims), "outer": np.zeros((dims, dims))}
        for start in range(0, len(vectors), BLOCK):
            x = unit(vectors[start : start + BLOCK]).astype(np.float64)
            new["sum"] += x.sum(axis=0)
            new["outer"] += x.T @ x
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in states[0]}


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, d) stored vectors as float32 of exact unit norm, which float16 leaves off by up to 5e-4."""
    x = as_float32(vectors)
    return np.asarray(x / np.sqrt(np.vecdot(x, x))[:, None])


def linear_map(vectors: np.ndarray, moments: State) -> tuple[np.ndarray, np.ndarray]:
    """`scale` and `shift`, both (m,) float32, that standardise the cosines of (m, d) examples over the corpus.

    No moments: 1 and 0. The deviation counts as 0.001 at least.
    """
    if not moments:
        return np.ones(len(vectors), np.float32), np.zeros(len(vectors), np.float32)
    x = vectors.astype(np.float64)
    rows = moments["rows"][0]
    mean = x @ moments["sum"] / rows
    variance = np.einsum("ij,jk,ik->i", x, moments["outer"] / rows, x, optimize=True) - mean**2
    scale = 1 / np.maximum(np.sqrt(np.maximum(variance, 0)), LEAST_DEVIATION)
    return scale.astype(np.float32), (-mean * scale).astype(np.float32)


def _fit(examples: pa.Table, moments: State, embed: Column, contained: int, directory: Path) -> None:
    vectors, taken = embedded(embed, examples, "similarity.targets")
    vectors = unit(vectors)
    scale, shift = linear_map(vectors, moments)
    np.savez(directory / MAP, vectors=vectors, scale=scale, shift=shift)
    facts = {"targets": len(vectors), "without_vector": len(examples) - len(taken), "contained_rows": contained}
    (directory / FACTS).write_text(json.dumps(facts, indent=2))


def _open(mapping: Artifact, best: bool) -> Transform:
    with np.load(mapping.local() / MAP, allow_pickle=False) as arrays:
        vectors, scale, shift = (arrays[name] for name in ("vectors", "scale", "shift"))
    weights = vectors * scale[:, None]
    # The shift rides along as one more dimension, in which every row is 1.
    index = flat_index(np.ascontiguousarray(np.column_stack([weights, shift]))) if best else None
    mean, offset = weights.mean(axis=0, dtype=np.float64).astype(np.float32), shift.mean(dtype=np.float64)

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        x = unit(matrix(batch.column(VECTOR)))
        if index is None:
            return _values(np.vecdot(x, mean) + np.float32(offset), pa.nulls(len(x), pa.int32()))
        at = index.search(np.column_stack([x, np.ones(len(x), np.float32)]), 1)[1][:, 0]
        # Worked out again row by row: products of matrices differ in the last bits with the rows beside them.
        return _values(np.vecdot(x, weights[at]) + shift[at], pa.array(at, pa.int32()))

    return score


def _values(score: np.ndarray, target: pa.Array) -> pa.RecordBatch:
    return pa.record_batch([pa.array(score.astype(np.float32)), target], schema=FIELDS)
