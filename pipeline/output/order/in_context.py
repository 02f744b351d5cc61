"""In-context pretraining (Shi et al. 2024, arXiv 2310.10638): related rows follow one another, no row comes twice.

Every concept is a region. In it the k nearest neighbours of every row, by inner product of the run's vectors, make an
undirected graph, and the paper's greedy walk (`_walk`) strings all rows of it together. The string is cut into contexts
of about `context` tokens, and the contexts are shuffled: alike inside, diverse across, as the paper asks, since alike
neighbours in a batch make its gradient poor. With `shuffle: false` the contexts stay in the order of the walk, regions
in that of a walk over their centroids: for who packs the tokens end to end (`tamis pack --kind concat`) and shuffles
the packed sequences instead, which is the published procedure to the token.

What is traded for scale: the paper's graph is one for the whole corpus, here none of its edges leaves a concept. Which
share of a row's true neighbours is lost so is measured on `measure` rows and told (`edges_cut`). k = 50 as in the
paper, which searches with product quantisation; here vectors are exact. Fewer neighbours end a walk sooner, and every
new start is a jump: of 1,000 rows in 20 planted topics, neighbours in the order share their topic in 98 % of all cases
with k = 50, 94 % with 20, 90 % with 10, 4 % shuffled (tests). Of the paper's filter for adjacent near-duplicates only
the count is here (`near_duplicates`, cosine above 0.95): remove them in the curation, with `semantic_duplicates`, or
the model learns to copy.

Loss across document boundaries must not be masked, nor attention, or the order has no effect: leave `document` and the
reset of positions of packed sequences aside. In a concept of n <= k rows k is n - 1. A region is held whole by one
worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.concepts.kmeans import load_centroids
from pipeline.engine.regroup import ROW, SHARD, key_groups, unopened
from pipeline.errors import ConfigError
from pipeline.output.feeding import ORDINAL, FedRun
from pipeline.output.order._walk import neighbours, walk
from pipeline.output.order.base import Order, Places, Placing, drawn
from pipeline.recipe import Column, State, fingerprint
from pipeline.sample import Sample, draw, stored
from pipeline.vectors import as_float32, matrix

CONCEPT, VECTOR, TOKENS = "concept.concept", "embed.vector", "row.tokens"
FIELDS = pa.schema(
    [("position", pa.int64()), ("context", pa.int64()), ("similarity", pa.float32()), ("anew", pa.bool_())]
)
CENTROID_NEIGHBOURS = 20
NEAR_DUPLICATE = 0.95


class InContext(Order):
    kind: Literal["in_context"] = "in_context"
    k: int = Field(50, ge=1, description="neighbours of a row")
    context: int = Field(8192, ge=1, description="tokens a context, as the run counts them")
    shuffle: bool = Field(True, description="shuffle the contexts; false: walk on from one to the next")
    measure: int = Field(256, ge=0, description="rows whose true neighbours are looked up to measure what is cut")

    def placing(self, run: FedRun, seed: int) -> Placing:
        for name, key in (("embed", "embed: {kind: lsa}"), ("concept", "cluster: {k: auto}"), ("row", "")):
            if name not in run.manifest["columns"]:
                raise ConfigError(f"in_context walks over vectors inside concepts: add `{key}` and curate again")
            run.adopt(name)
        centroids = stored(run, "centroids")
        points = load_centroids(centroids)
        column = self._column(centroids.fingerprint, seed)
        run.regroup(column, CONCEPT, partial(string_together, self.k, self.context, seed))
        rank = np.empty(len(points), np.int64)
        rank[walk(neighbours(points, CENTROID_NEIGHBOURS, seed))[0]] = np.arange(len(points))
        fields = [f"{column.name}.{name}" for name in ("position", "context")]
        about = {"regions": len(points)} | self._walked(run, column) | self._cut(run, seed)
        return Placing((CONCEPT, *fields), partial(_by_walk, rank, self.shuffle, seed, (fields[0], fields[1])), about)

    def _column(self, centroids: str, seed: int) -> Column:
        identity = fingerprint("in context", self.version, self.k, self.context, seed, centroids)
        return Column(f"order-{self.stored_as}", (VECTOR, TOKENS, ORDINAL), FIELDS, unopened, identity)

    def _walked(self, run: FedRun, column: Column) -> dict[str, Any]:
        state = run.aggregate(Walked(column.name), label="walked")
        rows, starts, near = (int(state[name][0]) for name in ("rows", "starts", "near"))
        mean = float(state["similarity"][0]) / max(rows - starts, 1)
        return {"walks": starts, "near_duplicates": near, "mean_similarity": round(mean, 4)}

    def _cut(self, run: FedRun, seed: int) -> dict[str, Any]:
        """Share of the nearest neighbours of some rows that are in another region, and so are no edge."""
        if not self.measure:
            return {}
        sample = draw(run, Sample((VECTOR, CONCEPT, ORDINAL), self.measure, run.curated.rows, seed))
        near = Nearest(sample[VECTOR], sample[ORDINAL], self.k)
        state = run.aggregate(near, label="edges cut")
        found = np.isfinite(state["similarity"])
        away = (state["concept"] != sample[CONCEPT][:, None]) & found
        return {"edges_cut": round(float(away.sum() / max(found.sum(), 1)), 4)}


def string_together(k: int, context: int, seed: int, table: pa.Table) -> pa.Table:
    """Reduce of `Run.regroup` by concept: a walk over every concept, cut into contexts."""
    parts = [_region(k, context, seed, concept) for concept in key_groups(table, CONCEPT)]
    columns = [pa.array(np.concatenate([p[i] for p in parts]) if parts else [], f.type) for i, f in enumerate(FIELDS)]
    return pa.table([table[SHARD], table[ROW], *columns], [SHARD, ROW, *FIELDS.names])


def _region(k: int, context: int, seed: int, rows: pa.Table) -> tuple[np.ndarray, ...]:
    """Values of `FIELDS` for the rows of one concept, given by ordinal."""
    vectors = matrix(rows[VECTOR].combine_chunks())
    path, starts = walk(neighbours(vectors, k, seed))
    tokens = rows[TOKENS].to_numpy()[path]
    before = np.cumsum(tokens) - tokens
    position, contexts, similarity, anew = (np.empty(len(path), t) for t in (np.int64, np.int64, np.float32, bool))
    position[path], contexts[path], anew[path] = np.arange(len(path)), before // context, starts
    similarity[path[:1]] = 0
    for at in range(0, len(path) - 1, 4096):
        some = as_float32(vectors[path[at : at + 4097]])
        similarity[path[at + 1 : at + 4097]] = np.vecdot(some[1:], some[:-1])
    return position, contexts, similarity, anew


def _by_walk(rank: np.ndarray, shuffle: bool, seed: int, fields: tuple[str, str], batch: pa.RecordBatch) -> Places:
    concept = batch.column(CONCEPT).to_numpy()
    position, context = (batch.column(name).to_numpy() for name in fields)
    group = rank[concept] << 40 | context
    if not shuffle:
        return Places(np.arange(len(group)), (rank[concept] << 40 | position).astype(np.uint64), group=group)
    return Places(np.arange(len(group)), drawn(group, seed), position, group=group)


@dataclass(frozen=True)
class Walked:
    """Statistic: `rows`, `starts` (walks begun), `near` (near-duplicates of the row before), int64 (1,), and the sum of
    similarities to the row before, `similarity`, float64 (1,)."""

    column: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (f"{self.column}.similarity", f"{self.column}.anew")

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        similarity, anew = (batch.column(i).to_numpy(zero_copy_only=False) for i in (0, 1))
        new = {
            "rows": np.array([len(anew)]),
            "starts": np.array([anew.sum()]),
            "near": np.array([(similarity[~anew] > NEAR_DUPLICATE).sum()]),
            "similarity": np.array([similarity[~anew].sum(dtype=np.float64)]),
        }
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in states[0]}


@dataclass(frozen=True)
class Nearest:
    """Statistic: the k fed rows nearest to each of m vectors, itself excepted. State: `similarity` float32 (m, k), -inf
    where there are fewer, and `concept` int64 (m, k)."""

    vectors: np.ndarray
    ordinals: np.ndarray
    k: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (VECTOR, CONCEPT, ORDINAL)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        x = as_float32(matrix(batch.column(VECTOR)))
        similarity = as_float32(self.vectors) @ x.T
        similarity[self.ordinals[:, None] == batch.column(ORDINAL).to_numpy()] = -np.inf
        concept = np.broadcast_to(batch.column(CONCEPT).to_numpy().astype(np.int64), similarity.shape)
        new = self._best(similarity, concept)
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return self._best(*(np.concatenate([s[name] for s in states], axis=1) for name in ("similarity", "concept")))

    def _best(self, similarity: np.ndarray, concept: np.ndarray) -> State:
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : self.k]
        return {n: np.take_along_axis(v, order, 1) for n, v in (("similarity", similarity), ("concept", concept))}
