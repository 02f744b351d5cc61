"""A curriculum: the curated rows by a stored score, worst first (`descending: false`) or best first.

Without `stages` the order is the score's, exactly, and rows of one score come in the order of a hash. With it the rows
are cut into so many stages of equal rows, which follow one another, and inside a stage they are shuffled: what training
on steadily harder or cleaner data needs (Bengio et al. 2009), without batches of rows that all score the same. A
greater score means keep, so by quality an ascending order ends on the best rows, as annealing on clean data does.
Stages are cut at the quantiles of 65,536 rows: exact for fewer, else off by 0.2 % of the rows (standard deviation).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.output.feeding import ORDINAL, FedRun
from pipeline.output.order._quantiles import edges, score_keys, score_reference
from pipeline.output.order.base import Order, Places, Placing, drawn


class Curriculum(Order):
    kind: Literal["curriculum"] = "curriculum"
    by: str = Field(description="a score of the run, or COLUMN.FIELD")
    descending: bool = Field(False, description="greatest score first")
    stages: int | None = Field(None, ge=2, description="so many stages of equal rows, each shuffled")

    def placing(self, run: FedRun, seed: int) -> Placing:
        reference = score_reference(run, self.by)
        if self.stages is None:
            return Placing((reference,), partial(_by_score, reference, self.descending))
        cuts = edges(run, reference, self.descending, [1 / self.stages] * self.stages)
        return Placing((reference,), partial(_by_stage, reference, self.descending, cuts, seed))


def _by_score(reference: str, descending: bool, batch: pa.RecordBatch) -> Places:
    return Places(np.arange(batch.num_rows), score_keys(batch, reference, descending))


def _by_stage(reference: str, descending: bool, cuts: np.ndarray, seed: int, batch: pa.RecordBatch) -> Places:
    stage = np.searchsorted(cuts, score_keys(batch, reference, descending), side="right")
    hashed = drawn(batch.column(ORDINAL).to_numpy(), seed)
    return Places(
        np.arange(len(stage)), stage.astype(np.uint64) << np.uint64(48) | hashed >> np.uint64(16), group=stage
    )
