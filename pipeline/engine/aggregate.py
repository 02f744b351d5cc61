"""`aggregate`: one mergeable summary of the corpus, folded shard by shard and merged as a tree of fixed shape.

States travel as npz files in the run's scratch, not through the driver: a unit folds one shard (16 thin ones where
there are very many), a merge joins 16 states, and the driver reads the last one. The tree and the batches depend on
the shards alone, so sums of floats come out the same for any number of workers, and after any number of lost ones.
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
MANY_SHARDS = 1024
"""From this many on, shards of thin columns are folded 16 at a time; fewer are worth a worker each."""


def save_state(store: Store, state: State, *names: str) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **state)  # type: ignore[arg-type]  # keywords are arrays
    store.write(buffer.getvalue(), *names)


def load_state(store: Store, *names: str) -> State:
    with np.load(io.BytesIO(store.read(*names)), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def state_name(level: int, position: int) -> str:
    return f"{level}-{position:05d}.npz"


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
        inputs = list(self.statistic.inputs)
        for shard in shards:
            state: State = {}
            for batch in read_shard(self.layout, shard, inputs, BATCH_ROWS):
                rows, size = rows + batch.num_rows, size + batch.nbytes
                usable = valid_rows(batch, inputs)
                batch = batch.select(inputs)
                if usable is not None:
                    batch = batch.filter(pa.array(usable))
                if batch.num_rows:
                    state = self.statistic.update(state, batch)
            states.append(state)
        save_state(self.layout.store, merge(self.statistic, states), *self.directory, state_name(0, position))
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
        states = [load_state(self.store, *self.directory, state_name(level, i)) for i in members]
        save_state(self.store, merge(self.statistic, states), *self.directory, state_name(level + 1, position))
        return {"rows": 0, "bytes": 0}


def merge(statistic: Statistic, states: Sequence[State]) -> State:
    """Merge states in order, leaving out those of shards that held no usable row."""
    full = [s for s in states if s]
    return statistic.merge(full) if len(full) > 1 else full[0] if full else {}
