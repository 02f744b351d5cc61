"""Equal parts of the curated rows by a stored score: the values at which each begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.output.feeding import ORDINAL, FedRun
from pipeline.output.order.base import drawn
from pipeline.recipe import State
from pipeline.select.keys import order_keys

SAMPLED = 1 << 16
"""Rows that the edges are taken from: exact for fewer, else a part's share is off by about sqrt(share / SAMPLED)."""


def score_reference(run: FedRun, name: str) -> str:
    """Reference to a stored float32 score, `quality` or a field, `quality.score`. Raises ConfigError."""
    column, _, field = name.partition(".")
    found = run.adopt(column).fields
    field = field or "score"
    kind = found.field(field).type if field in found.names else None
    if kind != pa.float32():
        raise ConfigError(f"{name!r} is no score: {column} has {', '.join(f'{f.name} ({f.type})' for f in found)}")
    return f"{column}.{field}"


def score_keys(batch: pa.RecordBatch, reference: str, descending: bool) -> np.ndarray:
    """uint64 of every row, ascending with the score (descending: falling); rows of one score differ by a hash."""
    key = order_keys(batch.column(reference).to_numpy()).astype(np.uint64)
    ties = drawn(batch.column(ORDINAL).to_numpy(), 0) >> np.uint64(32)
    return (np.uint64(2**32 - 1) - key if descending else key) << np.uint64(32) | ties


def edges(run: FedRun, reference: str, descending: bool, shares: Sequence[float]) -> np.ndarray:
    """Keys at which all but the first of some shares of the rows begin, in the order of `score_keys`; uint64."""
    keys = np.sort(run.aggregate(ScoreSample(reference, descending), label="quantiles")["key"])
    at = np.round(np.cumsum(shares)[:-1] / np.sum(shares) * len(keys)).astype(np.int64)
    return np.asarray(keys[np.minimum(at, len(keys) - 1)])


@dataclass(frozen=True)
class ScoreSample:
    """Statistic: `score_keys` of the rows with the smallest hashes; state `hash` and `key`, uint64 (m,)."""

    reference: str
    descending: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        return (ORDINAL, self.reference)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        hashes = drawn(batch.column(ORDINAL).to_numpy(), 1)
        new = {"hash": hashes, "key": score_keys(batch, self.reference, self.descending)}
        return self.merge([state, new] if state else [new])

    def merge(self, states: Sequence[State]) -> State:
        joined = {name: np.concatenate([s[name] for s in states]) for name in ("hash", "key")}
        first = np.argsort(joined["hash"], kind="stable")[:SAMPLED]
        return {name: values[first] for name, values in joined.items()}
