"""Several scores, or a score and a draw, as one float32 column: `combined`, greater means keep.

`rank`, `geometric`, `minimum`, `maximum` and `rrf` work on percentiles, 1 - (rank - 1/2) / n, so the scale of a score
does not matter. `minimum` keeps the rows that are in the top fraction of every score, `maximum` of any, for the one
fraction that meets the budget. `zscore` keeps the scale: outliers count. A temperature adds Gumbel noise, which makes
the top rows a sample without replacement with weights exp(combined / temperature) (Efraimidis and Spirakis 2006).

Trade: percentiles come from a histogram of 65,536 bins a score (the top 16 bits of the float), interpolated between
the least and greatest score of a bin. They are exact where a bin holds one value, else off by less than the bin's
share of the rows: by 0.007 % at worst on a million standard normals, 0.011 % on a million uniform scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.errors import TamisError
from pipeline.hashing import uniform
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.select.keys import order_keys
from pipeline.select.ranking import numpy_of

if TYPE_CHECKING:
    from pipeline.run import Artifact, Run

NAME = "combined"
FIELDS = pa.schema([("score", pa.float32())])
TABLE = "table.npz"
BINS = 2**16
RRF_K = 60
"""Constant of reciprocal rank fusion, from Cormack et al. 2009."""


@dataclass(frozen=True)
class Percentiles:
    """Statistic: how many rows of each score fall into each bin, and the bin's least and greatest low half.

    State: `count` int64, `least` and `greatest` uint16, each (scores, 65536).
    """

    scores: tuple[str, ...]
    present: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.scores, *self.present)))

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        shape = (len(self.scores), BINS)
        if not state:
            full = np.full(shape, BINS - 1, np.uint16)
            state = {"count": np.zeros(shape, np.int64), "least": full, "greatest": np.zeros(shape, np.uint16)}
        for i, name in enumerate(self.scores):
            high, low = _halves(numpy_of(batch, name))
            np.add.at(state["count"][i], high, 1)
            np.minimum.at(state["least"][i], high, low)
            np.maximum.at(state["greatest"][i], high, low)
        return state

    def merge(self, states: Sequence[State]) -> State:
        return {
            "count": np.sum([s["count"] for s in states], axis=0),
            "least": np.min([s["least"] for s in states], axis=0),
            "greatest": np.max([s["greatest"] for s in states], axis=0),
        }


@dataclass(frozen=True)
class Moments:
    """Statistic: `n`, `mean`, sum of squared deviations `m2` of each score, float64 (scores,); merged as Chan does."""

    scores: tuple[str, ...]
    present: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.scores, *self.present)))

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        values = np.stack([numpy_of(batch, name) for name in self.scores]).astype(np.float64)
        for name, row in zip(self.scores, values, strict=True):
            if not np.isfinite(row).all():
                raise TamisError(f"{name} is infinite in a row and has no z-score: use `combine: rank`")
        mean = values.mean(axis=1)
        new = {"n": np.full(len(mean), float(batch.num_rows)), "mean": mean, "m2": ((values.T - mean) ** 2).sum(axis=0)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        n, mean, m2 = states[0]["n"], states[0]["mean"], states[0]["m2"]
        for s in states[1:]:
            total, delta = n + s["n"], s["mean"] - mean
            mean, m2 = mean + delta * s["n"] / total, m2 + s["m2"] + delta**2 * n * s["n"] / total
            n = total
        return {"n": n, "mean": mean, "m2": m2}


def percentile(table: State, number: int, scores: np.ndarray) -> np.ndarray:
    """Share of rows below each score, the row itself counting half; float64 (n,) in (0, 1), monotone in the score."""
    count, least = table["count"][number], table["least"][number]
    below = np.cumsum(count) - count
    high, low = _halves(scores)
    span = table["greatest"][number][high].astype(np.int64) - least[high] + 1
    inside = (low.astype(np.int64) - least[high] + 0.5) / span
    return np.asarray((below[high] + count[high] * inside) / count.sum())


@dataclass(frozen=True)
class Combination:
    """What `combined` is made of. `scores` are references, `table` holds the percentiles or moments."""

    rule: str
    scores: tuple[str, ...]
    weights: tuple[float, ...]
    temperature: float
    seed: int
    table: Artifact | None

    def apply(self, table: State, batch: pa.RecordBatch) -> np.ndarray:
        """The combined score before the draw; float64 (n,)."""
        values = [numpy_of(batch, name) for name in self.scores]
        weights = np.array(self.weights)
        if not table:
            return values[0].astype(np.float64)
        if self.rule == "zscore":
            scale = np.sqrt(table["m2"] / table["n"])
            scale[scale == 0] = np.inf  # a constant score says nothing about a row
            return np.asarray(weights / weights.sum() @ ((np.stack(values).T - table["mean"]) / scale).T)
        p = np.stack([percentile(table, i, v) for i, v in enumerate(values)])
        return mixed(self.rule, p, weights, int(table["count"][0].sum()))


def mixed(rule: str, p: np.ndarray, weights: np.ndarray, rows: int) -> np.ndarray:
    """One value from the percentiles `p` (scores, n) of `rows` rows; float64 (n,)."""
    share = weights / weights.sum()
    if rule == "geometric":
        return np.asarray(np.exp(share @ np.log(p)))
    if rule == "rrf":
        return np.asarray(weights @ (1 / (RRF_K + (1 - p) * rows + 0.5)))
    if rule in ("minimum", "maximum"):
        return np.asarray(p.min(axis=0) if rule == "minimum" else p.max(axis=0))
    return np.asarray(share @ p)


def combined(
    run: Run, rule: str, weights: dict[str, float], present: tuple[str, ...], temperature: float, seed: int
) -> Column:
    """The column `combined` from scores, given as references with weights; fits their table where none is stored."""
    scores = tuple(weights)
    table = None
    if len(scores) > 1:
        statistic = Moments(scores, present) if rule == "zscore" else Percentiles(scores, present)
        state, identity = {}, fingerprint(type(statistic).__name__, 1, run.identity(*statistic.inputs))
        if needs_fit(run, NAME, identity):
            state = run.aggregate(statistic)
            identity = fingerprint(type(statistic).__name__, 1, run.identity(*statistic.inputs))  # shards may be lost
        table = run.artifact(NAME, identity, partial(_write, state), resources=None)
    combination = Combination(rule, scores, tuple(weights.values()), temperature, seed, table)
    drawn = seed if temperature else 0
    identity = fingerprint(NAME, 1, rule, weights, temperature, drawn, table.fingerprint if table else "")
    inputs = (*scores, "row.key") if temperature else scores
    return Column(NAME, inputs, FIELDS, partial(_open, combination), identity, batch_rows=2**16)


def _write(table: State, directory: Path) -> None:
    np.savez(directory / TABLE, **table)  # type: ignore[arg-type]  # keywords are arrays


def _open(combination: Combination) -> Transform:
    table: State = {}
    if combination.table is not None:
        with np.load(combination.table.local() / TABLE, allow_pickle=False) as arrays:
            table = {name: arrays[name] for name in arrays.files}

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        value = combination.apply(table, batch)
        if combination.temperature:
            value = value / combination.temperature + gumbel(batch.column("row.key"), combination.seed)
        return pa.record_batch([pa.array(value.astype(np.float32))], schema=FIELDS)

    return transform


def gumbel(keys: pa.FixedSizeBinaryArray, seed: int) -> np.ndarray:
    """Standard Gumbel noise, one draw a key; finite float64 (n,)."""
    return np.asarray(-np.log(-np.log(uniform(keys, seed) + 2.0**-54)))


def _halves(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = order_keys(scores)
    return (keys >> np.uint32(16)).astype(np.intp), (keys & np.uint32(0xFFFF)).astype(np.uint16)
