"""Shuffled: the curated rows in the order of a hash of (seed, epoch, row), the same on any machine, for any workers.

A row's key is a bijection of 64 bits, SplitMix64, of its place in the curated set, so no two rows tie, every row comes
exactly once, and no worker or driver ever holds a permutation: sorting by the key is the shuffle. For all that a test
can tell, the orders of a seed's epochs are independent and uniform. What it trades: another curated set, even one that
differs by a row, comes in another order.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.output.feeding import ORDINAL, FedRun
from pipeline.output.order.base import Order, Places, Placing, drawn


class Shuffled(Order):
    kind: Literal["shuffled"] = "shuffled"
    epoch: int = Field(0, ge=0, description="another order of the same seed for every number")

    def placing(self, run: FedRun, seed: int) -> Placing:
        return Placing((), partial(_by_hash, seed, self.epoch))


def _by_hash(seed: int, epoch: int, batch: pa.RecordBatch) -> Places:
    ordinals = batch.column(ORDINAL).to_numpy()
    return Places(np.arange(len(ordinals)), drawn(ordinals, seed, epoch))
