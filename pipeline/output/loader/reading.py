"""Reading ahead: the tables of one reader's batches, while a few threads load the windows that come next.

What is held is the windows that batches draw from now (one a stream of the reader's share) and at most `ahead` loaded
before they are needed. Threads live as long as the iteration, so a process that forks between epochs has none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.output.loader.plan import Epoch, Share, Window

ROW = "tamis_row"
"""Column of the ordinals, int64: a row's place over the files of the set."""
VALID = "tamis_valid"
"""Column, bool: false for a row that fills up the last batch."""

Read = Callable[[np.ndarray], pa.Table]


@dataclass(frozen=True)
class Loaded:
    """The rows of a window that a share takes, ascending by batch."""

    table: pa.Table
    batches: np.ndarray

    def of(self, batch: int) -> pa.Table:
        start, end = np.searchsorted(self.batches, [batch, batch + 1])
        return self.table.slice(start, end - start)


def read_batches(epoch: Epoch, share: Share, read: Read, ahead: int) -> Iterator[pa.Table]:
    """The rows of a share, batch by batch, with the columns `ROW` and `VALID` behind those that `read` gives."""

    def load(window: Window) -> Loaded:
        rows, batches = epoch.rows_of(window, share)
        valid = rows >= 0
        ordinals = np.where(valid, rows, -1 - rows)
        table = read(ordinals) if len(rows) else pa.table({})
        return Loaded(table.append_column(ROW, pa.array(ordinals)).append_column(VALID, pa.array(valid)), batches)

    todo = epoch.windows(share)
    coming: deque[tuple[Window, Future[Loaded]]] = deque()
    held: list[tuple[Window, Future[Loaded]]] = []
    threads = ThreadPoolExecutor(ahead, "tamis-read-ahead")
    try:
        for batch in range(share.start, epoch.batches, share.step):
            while True:
                while len(coming) < ahead and (window := next(todo, None)):
                    coming.append((window, threads.submit(load, window)))
                if not coming or coming[0][0].first > batch:
                    break
                held.append(coming.popleft())
            held = [h for h in held if h[0].last >= batch]
            feeding = [h for h in held if (batch - h[0].stream.first) % h[0].stream.step == 0 and h[0].first <= batch]
            feeding.sort(key=lambda h: (h[0].stream.place, h[0].start))
            slices = [found for _, future in feeding if (found := future.result().of(batch)).num_rows]
            yield pa.concat_tables(slices)
    finally:
        threads.shutdown(cancel_futures=True)
