"""A run in memory for the property tests: shards are tables whose columns are named by references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from pipeline.engine.aggregate import merge
from pipeline.engine.materialize import valid_rows
from pipeline.hashing import row_keys
from pipeline.recipe import State, Statistic
from pipeline.select.ranking import Line


@dataclass
class MemoryRun:
    """Folds statistics over batches, skips rows with nulls and merges as a tree, as the engine does."""

    shards: list[pa.Table]
    batch_rows: int = 7
    fan_in: int = 3
    passes: int = 0

    @classmethod
    def of(cls, columns: dict[str, np.ndarray | pa.Array], shards: int = 1, batch_rows: int = 7) -> MemoryRun:
        """Columns by reference; `row.key` is hashed from its values, by default the row numbers."""
        table = pa.table({name: pa.array(values) for name, values in columns.items() if name != "row.key"})
        ids = columns.get("row.key", np.arange(table.num_rows))
        table = table.append_column("row.key", row_keys(pa.array([str(i) for i in ids])))
        edges = np.linspace(0, table.num_rows, shards + 1).astype(int)
        pieces = [table.slice(a, b - a) for a, b in pairwise(edges)]
        return cls([_addressed(piece, i) for i, piece in enumerate(pieces)], batch_rows)

    @property
    def rows(self) -> int:
        return sum(s.num_rows for s in self.shards)

    def aggregate(self, statistic: Statistic) -> State:
        self.passes += 1
        states = []
        for shard in self.shards:
            state: State = {}
            for batch in shard.combine_chunks().to_batches(self.batch_rows):
                usable = valid_rows(batch, statistic.inputs)
                inputs = batch.select(list(statistic.inputs))
                inputs = inputs if usable is None else inputs.filter(pa.array(usable))
                if inputs.num_rows:
                    state = statistic.update(state, inputs)
            states.append(state)
        while len(states) > 1:
            states = [merge(statistic, states[i : i + self.fan_in]) for i in range(0, len(states), self.fan_in)]
        return states[0]

    def kept(self, lines: Sequence[Line]) -> np.ndarray:
        """Flags of all rows, in the order of their addresses."""
        batches = [b for s in self.shards for b in s.combine_chunks().to_batches(self.batch_rows)]
        return np.concatenate([np.logical_or.reduce([line.keeps(b) for line in lines]) for b in batches])

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([s[name].to_numpy() for s in self.shards])


def _addressed(shard: pa.Table, number: int) -> pa.Table:
    shards = pa.array(np.full(shard.num_rows, number, np.int32))
    return shard.append_column("address.shard", shards).append_column(
        "address.row", pa.array(np.arange(shard.num_rows))
    )


@pytest.fixture(scope="session")
def memory_run() -> type[MemoryRun]:
    return MemoryRun
