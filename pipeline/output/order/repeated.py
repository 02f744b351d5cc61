"""Repeats: every curated row as often as a plan says, spread evenly over the training and shuffled.

A row that is to be seen n times comes once in every n-th of the training, at a place drawn there: copies keep away from
one another, and the mixture is the same from the first batch to the last even where rows differ in n. Where all have
one n that is n shuffled epochs. A fraction is drawn: of `epochs: 1.7` seven rows in ten come twice, the others once.

How often comes from
- `epochs: plan`: what the compute-aware selection found (`select: {budget: {compute: ...}}`, Goyal et al. 2024; see
  `pipeline.select.compute`): the tokens that the training reads over the tokens that are kept;
- `epochs: NUMBER`; or
- `by` a score and `times: [4, 2, 1]`: buckets of equal rows, best first, each with its own number. A number of 0 is
  refused: what is not to be read is not to be kept.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.output.feeding import ORDINAL, FedRun
from pipeline.output.order._quantiles import edges, score_keys, score_reference
from pipeline.output.order.base import Order, Places, Placing, drawn

MOST = 1000
FRACTION, SPREAD = 1 << 40, 1 << 41
"""Streams of draws: which rows get one more, and where a pass of a row comes (one stream a pass)."""


class Repeated(Order):
    kind: Literal["repeated"] = "repeated"
    epochs: float | Literal["plan"] | None = Field(None, description="how often every row is seen, or `plan`")
    by: str | None = Field(None, description="score whose buckets are seen as often as `times` says")
    times: tuple[float, ...] = Field((), description="how often the rows of every bucket are seen, best bucket first")

    @model_validator(mode="after")
    def _one_plan(self) -> Self:
        if (self.epochs is None) == (self.by is None) or bool(self.times) != (self.by is not None):
            raise ValueError("say how often: `epochs: 4`, `epochs: plan`, or `by: SCORE` with `times: [4, 2, 1]`")
        given = [self.epochs] if isinstance(self.epochs, float) else list(self.times)
        if bad := [t for t in given if not 1 <= t <= MOST]:
            raise ValueError(f"{bad[0]:g} is not between 1 and {MOST}: every row is read at least once")
        return self

    def placing(self, run: FedRun, seed: int) -> Placing:
        if self.by is not None:
            reference = score_reference(run, self.by)
            cuts = edges(run, reference, True, [1 / len(self.times)] * len(self.times))
            return Placing((reference,), partial(_by_bucket, reference, cuts, self.times, seed))
        epochs = _planned(run) if self.epochs == "plan" else float(self.epochs or 1)
        return Placing((), partial(_evenly, epochs, seed), {"epochs": epochs})


def _planned(run: FedRun) -> float:
    import json

    training = json.loads(run.store.read("artifacts", "selection", "selection.json")).get("training")
    if not training:
        raise ConfigError(
            "epochs: plan needs a selection by compute: `select: {budget: {compute: ...}}`; or say a number"
        )
    if not 1 <= training["epochs"] <= MOST:
        raise ConfigError(
            f"epochs: plan: the training reads the kept tokens {training['epochs']:.3g} times, not 1 to {MOST}: "
            "keep less, or use the order `shuffled` and stop early"
        )
    return float(training["epochs"])


def _evenly(epochs: float, seed: int, batch: pa.RecordBatch) -> Places:
    return spread(batch.column(ORDINAL).to_numpy(), np.full(batch.num_rows, epochs), seed)


def _by_bucket(reference: str, cuts: np.ndarray, times: tuple[float, ...], seed: int, batch: pa.RecordBatch) -> Places:
    bucket = np.searchsorted(cuts, score_keys(batch, reference, descending=True), side="right")
    return spread(batch.column(ORDINAL).to_numpy(), np.array(times)[bucket], seed)


def spread(ordinals: np.ndarray, times: np.ndarray, seed: int) -> Places:
    """Places of rows that are to be seen so many times, float64 (n,): a fraction is drawn."""
    count = times.astype(np.int64)
    count += (drawn(ordinals, seed, FRACTION) >> np.uint64(11)) * 2.0**-53 < times - count
    row = np.repeat(np.arange(len(ordinals)), count)
    first = np.cumsum(count) - count
    nth = np.arange(len(row)) - first[row]
    place = np.empty(len(row))
    for i in range(int(count.max(initial=0))):
        place[nth == i] = (drawn(ordinals[count > i], seed, SPREAD + i) >> np.uint64(11)) * 2.0**-53
    key = ((nth + place) / count[row] * 2.0**53).astype(np.uint64) << np.uint64(11)
    return Places(row, key, times=nth)
