"""`aggregate`: one mergeable summary of the corpus, folded shard by shard and merged as a tree of fixed shape.

States travel as npz files in the run's scratch, not through the driver: a unit folds 16 shards of thin columns (or one
shard of text), a merge joins 16 states, and the driver reads the last. The tree depends on the shards alone, so sums
of floats come out the same for any number of workers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.shards import Shard
from pipeline.corpus.storage import Store
from pipeline.engine.materialize import valid_rows
from pipeline.engine.reading import Layout, read_shard
from pipeline.recipe import State, Statistic

FAN_IN = 16
BATCH_ROWS = 1 << 16


def save_state(store: Store, state: State, *names: str) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **state)  # type: ignore[arg-type]  # keywords are arrays
    store.write(buffer.getvalue(), *names)


def load_state(store: Store, *names: str) -> State:
    with np.load(io.BytesIO(store.read(*names)), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


@dataclass
class FoldTask:
    """Fold some consecutive shards into one state file."""

    layout: Layout
    statistic: Statistic
    directory: tuple[str, ...]

    def __call__(self, unit: tuple[int, tuple[Shard, ...]], attempt: int) -> dict[str, Any]:
        position, shards = unit
        rows = size = 0
        states = []
        for shard in shards:
            state: State = {}
            for batch in read_shard(self.layout, shard, self.statistic.inputs, max(1, BATCH_ROWS >> (2 * attempt))):
                rows, size = rows + batch.num_rows, size + batch.nbytes
                usable = valid_rows(batch, self.statistic.inputs)
                inputs = batch.select(list(self.statistic.inputs))
                if usable is not None:
                    inputs = inputs.filter(pa.array(usable))
                if inputs.num_rows:
                    state = self.statistic.update(state, inputs)
            if state:
                states.append(state)
        merged = states[0] if len(states) == 1 else self.statistic.merge(states) if states else {}
        save_state(self.layout.store, merged, *self.directory, f"0-{position:05d}.npz")
        return {"rows": rows, "bytes": size}


@dataclass
class MergeTask:
    """Merge up to 16 consecutive states of one level into one state of the next."""

    store: Store
    statistic: Statistic
    directory: tuple[str, ...]

    def __call__(self, unit: tuple[int, int, int], attempt: int) -> dict[str, Any]:
        level, position, total = unit
        members = range(position * FAN_IN, min((position + 1) * FAN_IN, total))
        states = [load_state(self.store, *self.directory, f"{level}-{i:05d}.npz") for i in members]
        save_state(self.store, merge(self.statistic, states), *self.directory, f"{level + 1}-{position:05d}.npz")
        return {"rows": 0, "bytes": 0}


def merge(statistic: Statistic, states: Sequence[State]) -> State:
    """Merge states in order, leaving out those of shards that held no usable row."""
    full = [s for s in states if s]
    return statistic.merge(full) if len(full) > 1 else full[0] if full else {}
