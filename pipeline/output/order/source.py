"""The order of the source: curated rows as they lie in their files, which is that of the corpus."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.output.feeding import ORDINAL, FedRun
from pipeline.output.order.base import Order, Places, Placing


class Source(Order):
    kind: Literal["source"] = "source"

    def placing(self, run: FedRun, seed: int) -> Placing:
        return Placing((), _as_it_lies)


def _as_it_lies(batch: pa.RecordBatch) -> Places:
    ordinals = batch.column(ORDINAL).to_numpy()
    return Places(np.arange(len(ordinals)), ordinals.astype(np.uint64))
