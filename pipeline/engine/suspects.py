"""Finding the row that kills its worker.

A transform that takes its process down (a fault in a library, the kernel's out-of-memory killer) or never returns
leaves no exception behind. From a unit's second attempt on, its worker notes what it is about to do. What a dead worker
noted last is what killed it: at first a batch, which the next attempt takes row by row; then a row, which the next one
leaves out. So a row costs three workers to find, which is what `engine.retries: 3` allows; more such rows in one shard
need more. First attempts note nothing and cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pipeline.corpus.storage import Store


class Suspects:
    """Notes of one unit, kept in the run's scratch between its attempts. Rows are numbers in the shard."""

    def __init__(self, store: Store, unit: str) -> None:
        self.store, self.names = store, ("scratch", "suspects", f"{unit}.json")
        notes = json.loads(store.read(*self.names)) if store.exists(*self.names) else {}
        self.ranges: list[tuple[str, int, int]] = [tuple(r) for r in notes.get("ranges", [])]
        """Column, first and last row of batches that killed a worker."""
        self.culprits: set[tuple[str, int]] = {(c, r) for c, r in notes.get("culprits", [])}
        if doing := notes.get("doing"):
            column, first, last = doing
            if first == last:
                self.culprits.add((column, first))
            else:
                self.ranges.append((column, first, last))

    def near(self, column: str, rows: np.ndarray) -> bool:
        """Whether some of the rows (ascending) were in a batch that killed a worker."""
        return any(c == column and first <= rows[-1] and rows[0] <= last for c, first, last in self.ranges)

    def guilty(self, column: str, row: int) -> bool:
        return (column, int(row)) in self.culprits

    @contextmanager
    def watching(self, column: str, rows: np.ndarray) -> Iterator[None]:
        """Note that these rows (ascending) are being worked on, for as long as they are."""
        self._note([column, int(rows[0]), int(rows[-1])])
        yield
        self._note(None)

    def forget(self) -> None:
        self.store.remove(*self.names)

    def _note(self, doing: list[object] | None) -> None:
        notes = {"doing": doing, "ranges": self.ranges, "culprits": sorted(self.culprits)}
        self.store.write(json.dumps(notes).encode(), *self.names)
