"""Which tokens a trainer should learn from: those that a prior finds hardest beside a conditional model (Rho-1).

    excess_t = -ln p_prior(x_t | x_<t) + ln p_conditional(x_t | x_<t)

Lin et al. 2024, arXiv 2404.07965 (from memory, unverified) train on the top 60 % of a batch's tokens by this excess and
mask the loss of the others; the model in training is their prior. Here the prior is a model that is frozen, so the
excess is known beforehand, and the line is drawn once for the whole corpus, of which a batch is a sample. A row's mean
excess is its CoLoR-Filter score. Both read the models' stored token log-probabilities: no second forward pass. Of
instructions only the responses' tokens are ranked, and no other is ever kept.

Trades: a histogram of 65,536 bins over [-32, 32) nats draws the line, so tokens within 0.001 nats of it go with it; at
least the share asked for is kept, and everything where no token differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.models.causal import as_mask
from pipeline.recipe import State

BINS, LARGEST = 1 << 16, 32.0
"""Equal bins of the excess over [-32, 32) nats; what is beyond is in the first and the last."""


def excess(prior: pa.ListArray, conditional: pa.ListArray) -> np.ndarray:
    """Excess of every token with a loss, row after row, from log-probabilities (lists of one length); float32."""
    return np.asarray(conditional.flatten().to_numpy() - prior.flatten().to_numpy())


def bins_of(values: np.ndarray) -> np.ndarray:
    """Bins of excesses; int64 in [0, 65,536)."""
    return np.clip(np.floor((values + LARGEST) * (BINS / (2 * LARGEST))), 0, BINS - 1).astype(np.int64)


@dataclass(frozen=True)
class Excess:
    """Statistic: histogram of the excess. State: `tokens` (65,536,) int64."""

    prior: str
    conditional: str
    target: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.prior, self.conditional, *([self.target] if self.target else []))

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        values = excess(batch.column(0), batch.column(1))
        if self.target is not None:
            values = values[as_mask(batch.column(2))]
        new = {"tokens": np.bincount(bins_of(values), minlength=BINS)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {"tokens": np.sum([s["tokens"] for s in states], axis=0)}


def lowest_bin(tokens: np.ndarray, share: float) -> int:
    """The highest bin from which on at least a share of the tokens lies."""
    above = np.cumsum(tokens[::-1])[::-1]
    return int(np.flatnonzero(above >= share * above[0])[-1])


def masks(values: np.ndarray, tokens: np.ndarray, lowest: int, target: np.ndarray | None = None) -> pa.ListArray:
    """One list<bool> a row of `tokens` + 1 entries: whether each of its tokens counts, the first of a row never.

    `values`: excesses of all rows end to end; `tokens` (n,): how many a row has; `target`: bool like `values`, which of
    them may count.
    """
    kept = bins_of(values) >= lowest
    kept = kept if target is None else kept & target
    ends = np.cumsum(tokens + 1)
    counts = np.zeros(int(ends[-1]) if len(ends) else 0, bool)
    scored = np.ones(len(counts), bool)
    scored[ends - tokens - 1] = False
    counts[scored] = kept
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), pa.array(counts))
