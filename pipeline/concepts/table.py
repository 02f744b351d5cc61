"""The concept table: what every concept holds, how spread out it is and how far from the others.

Artifact `concepts`, file `table.parquet`, one row a concept in the order of their numbers:

| field | type | meaning |
| --- | --- | --- |
| concept | int32 | number of the concept |
| n, bytes, tokens | int64 | rows, UTF-8 bytes and tokens of its rows |
| d_intra | float32 | mean over its rows of 1 - <x, c> |
| d_inter | float32 | mean of 1 - <c, c'> over the nearest other centroids |
| complexity | float64 | d_inter * d_intra (Abbas et al. 2024, arXiv 2401.04578); 0 for a concept without rows |

One pass over four thin columns; a state is 32 bytes a concept, whatever the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.concepts.kmeans import load_centroids
from pipeline.errors import ConfigError
from pipeline.recipe import State, fingerprint
from pipeline.sample import needs_fit, stored
from pipeline.vectors import flat_index

if TYPE_CHECKING:
    from pipeline.run import Run
    from pipeline.scores.base import Score

FILE = "table.parquet"
NEIGHBOURS = 20
COUNTS = ("n", "bytes", "tokens")
SCHEMA = pa.schema(
    [
        ("concept", pa.int32()),
        *((name, pa.int64()) for name in COUNTS),
        ("d_intra", pa.float32()),
        ("d_inter", pa.float32()),
        ("complexity", pa.float64()),
    ]
)


def concept_table(run: Run, scores: Sequence[Score] = ()) -> pa.Table:
    """The table of the concepts that the column `concept` names, stored as the artifact `concepts`.

    A score with a field `neighbours` (`density`) says how many other centroids d_inter averages over; 20 by default.
    """
    asked = {int(n) for s in scores if (n := getattr(s, "neighbours", None)) is not None}
    if len(asked) > 1:
        raise ConfigError(
            f"scores: there is one concept table, but they ask for {sorted(asked)} neighbours: give all the same"
        )
    neighbours = asked.pop() if asked else NEIGHBOURS
    centroids = stored(run, "centroids")
    points = load_centroids(centroids)
    totals = ConceptTotals(len(points))
    identity = fingerprint("concepts", 1, neighbours, centroids.fingerprint, run.identity(*totals.inputs))
    state = run.aggregate(totals) if needs_fit(run, "concepts", identity) else {}
    artifact = run.artifact("concepts", identity, partial(_write, state, points, neighbours), resources=None)
    return pq.read_table(artifact.local() / FILE)


@dataclass(frozen=True)
class ConceptTotals:
    """Statistic: sums by concept. State: `n`, `bytes`, `tokens` (k,) int64 and `distance` (k,) float64."""

    concepts: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("concept.concept", "concept.distance", "row.bytes", "row.tokens")

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        concept = batch.column("concept.concept").to_numpy()

        def total(name: str) -> np.ndarray:
            return np.bincount(concept, batch.column(name).to_numpy(), self.concepts)  # float64: exact below 2**53

        new = {
            "n": np.bincount(concept, minlength=self.concepts),
            "bytes": total("row.bytes").astype(np.int64),
            "tokens": total("row.tokens").astype(np.int64),
            "distance": total("concept.distance"),
        }
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in states[0]}


def inter_distances(points: np.ndarray, neighbours: int) -> np.ndarray:
    """Mean of 1 - <c, c'> over the nearest other centroids, of (k, d) unit centroids; float32 (k,).

    All k - 1 others where there are no more than `neighbours`; 0 for a single centroid. Costs 2 k^2 d FLOPs.
    """
    k = len(points)
    if k == 1:
        return np.zeros(1, np.float32)
    others = min(neighbours, k - 1)
    similarity, found = flat_index(points).search(points, others + 1)
    itself = found == np.arange(k)[:, None]
    itself[~itself.any(axis=1), -1] = True  # more duplicates of a centroid than neighbours: any one of them is left out
    return np.asarray(1.0 - similarity[~itself].reshape(k, others).mean(axis=1), dtype=np.float32).clip(0.0, 2.0)


def make_table(state: State, points: np.ndarray, neighbours: int) -> pa.Table:
    """The table from the state of `ConceptTotals` and (k, d) centroids."""
    n = state["n"]
    d_intra = (state["distance"] / np.maximum(n, 1)).astype(np.float32)
    d_inter = inter_distances(points, neighbours)
    complexity = d_intra.astype(np.float64) * d_inter
    values = [np.arange(len(n), dtype=np.int32), *(state[name] for name in COUNTS), d_intra, d_inter, complexity]
    return pa.Table.from_arrays([pa.array(v) for v in values], schema=SCHEMA)


def _write(state: State, points: np.ndarray, neighbours: int, directory: Path) -> None:
    pq.write_table(make_table(state, points, neighbours), directory / FILE)
