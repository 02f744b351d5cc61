"""Random: the baseline that every other criterion must beat at the same budget.

The score is a hash of the seed and of the row's key, so the draw is the same on any machine, for any number of workers,
and stays put when shards are added. Two seeds are two independent draws. Rows with the same key draw the same number.
Stratified by concept it is `select: {quotas: proportional}` over this score.

`weight: tokens` draws rows without replacement, each time in proportion to their tokens: the largest u ** (1 / tokens)
first (Efraimidis and Spirakis 2006).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.hashing import uniform
from pipeline.recipe import Column, Transform
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32())])


class Random(Score):
    """A reproducible draw; source: baselines of DataComp-LM and of Xie et al. 2023."""

    claim = "nothing: the line that every criterion has to beat"
    cost = "a hash"
    source = "baseline"
    kind: Literal["random"] = "random"
    seed: int | None = Field(None, description="seed of the draw (default: the run's)")
    weight: Literal["rows", "tokens"] = Field("rows", description="what has equal chances: every row, or every token")

    def column(self, run: Run) -> Column:
        seed = run.seed if self.seed is None else self.seed
        inputs = ("row.key", "row.tokens") if self.weight == "tokens" else ("row.key",)
        return Column(self.column_name, inputs, FIELDS, partial(_open, seed, self.weight), self.identity(str(seed)))


def _open(seed: int, weight: str) -> Transform:
    def draw(batch: pa.RecordBatch) -> pa.RecordBatch:
        u = uniform(batch["row.key"], seed)
        if weight == "tokens":
            tokens = np.maximum(batch["row.tokens"].to_numpy(), 1)
            u = np.log(np.maximum(u, 2.0**-54)) / tokens  # u may be 0; order as u ** (1 / tokens), without its rounding
        return pa.record_batch([pa.array(u.astype(np.float32))], schema=FIELDS)

    return draw
