"""The global order: which row stands where in which global batch, a pure function of (rows, settings, seed, epoch).

A global batch is a list of `batch` rows; rank r of W takes the r-th of W equal slices of it, and no more of the world
than that enters the order. So batches are the same for 1, 2 or 4 ranks and any number of worker processes, and where a
training stands in an epoch is one number.

A shuffle that a reader can follow with bounded memory, from files that are read a row group at a time:

1. The row groups are permuted, over all files.
2. The rows, in the order of their groups, are cut into `lanes` x `phases` streams of equal length. Stream (c, s) gives
   the rows at places [c, c + 1) x batch / lanes of every batch whose number is s modulo `phases`. So up to `lanes`
   ranks, and up to `phases` worker processes of each, read row groups that nobody else reads, but for those that a cut
   falls into; with more, a row group is read by several.
3. `window` consecutive row groups of a stream are permuted together, row by row.

A permutation is the order of 64-bit hashes (SplitMix64) of (seed, epoch, place), so it does not depend on a library's
random numbers; ties, 1 in 2**64 a pair, fall to the lower place. For all that a test can tell it is uniform: the row
groups over the epoch, and the rows over their window. What is traded for memory: rows of one row group are in the same
window, so they come within `window` groups of one another in their stream, and the first batch holds rows of at most
`lanes` x `window` groups. With one lane and a window as large as the set the shuffle is the uniform one.

Rows that are left of the last full batch are dropped, others in every epoch, or, with `drop_last` off, make a last
batch that is filled up with rows of the epoch's beginning, so that every rank has a batch of the same number of rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from pipeline.hashing import mix64

GROUPS, ROWS = 1, 2
"""What is permuted; part of the hash, so that the permutations are independent."""
WINDOW_BYTES = 1 << 30
"""No window is larger: Arrow's strings end at 2 GiB a column."""


@dataclass(frozen=True)
class Settings:
    """Everything that the order depends on beside the rows."""

    batch: int
    """Rows of a global batch."""
    seed: int
    shuffle: bool
    lanes: int
    """Divides `batch`; 1 without a shuffle, as is `phases`."""
    phases: int
    window: int
    drop_last: bool


@dataclass(frozen=True)
class Share:
    """What one reader takes: places [first, last) of the batches start, start + step, ..."""

    first: int
    last: int
    start: int
    step: int


@dataclass(frozen=True)
class Stream:
    """A range of the epoch's sequence, dealt to batches: `width` rows each, from place `place` on, to the batches
    first, first + step, ..."""

    start: int
    rows: int
    place: int
    width: int
    first: int
    step: int

    def batch_of(self, offset: int) -> int:
        """The batch that the row at an offset into the stream goes to."""
        return self.first + self.step * (offset // self.width)


@dataclass(frozen=True)
class Window:
    """Rows [start, end) of the epoch's sequence, all of one stream, that are permuted and loaded together."""

    stream: Stream
    start: int
    end: int

    @property
    def first(self) -> int:
        """First batch that takes rows of it."""
        return self.stream.batch_of(self.start - self.stream.start)

    @property
    def last(self) -> int:
        return self.stream.batch_of(self.end - self.stream.start - 1)


@dataclass(frozen=True)
class Epoch:
    """One epoch of the rows of some row groups; `sizes`: rows of every group, int64 (groups,)."""

    settings: Settings
    sizes: np.ndarray
    number: int

    @cached_property
    def rows(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def batches(self) -> int:
        """Global batches; the same for every rank."""
        return batches_of(self.rows, self.settings)

    @cached_property
    def _order(self) -> np.ndarray:
        """Row groups as they follow one another."""
        groups = np.arange(len(self.sizes))
        return np.argsort(self._hash(groups, GROUPS), kind="stable") if self.settings.shuffle else groups

    @cached_property
    def _edges(self) -> np.ndarray:
        """Place in the sequence of the first row of every group in that order, and of the end."""
        return np.concatenate([[0], np.cumsum(self.sizes[self._order])])

    @cached_property
    def _ordinals(self) -> np.ndarray:
        """Ordinal of the first row of every group in that order."""
        return np.asarray((np.cumsum(self.sizes) - self.sizes)[self._order])

    def streams(self) -> Iterator[Stream]:
        """The streams of the full batches, then that of the last, short one."""
        full = self.rows // self.settings.batch
        width = self.settings.batch // self.settings.lanes
        start = 0
        for phase in range(min(self.settings.phases, full)):
            rows = len(range(phase, full, self.settings.phases)) * width
            for lane in range(self.settings.lanes):
                yield Stream(start, rows, lane * width, width, phase, self.settings.phases)
                start += rows
        if self.batches > full:
            yield Stream(start, self.settings.batch, 0, self.settings.batch, full, 1)

    def windows(self, share: Share) -> Iterator[Window]:
        """The windows that hold rows of a share, in the order in which its batches need them."""

        def of(stream: Stream) -> Iterator[Window]:
            for window in self._cut(stream):
                if window.last >= share.start:
                    yield window

        taken = [s for s in self.streams() if s.place < share.last and s.place + s.width > share.first]
        return heapq.merge(*map(of, taken), key=lambda w: (w.first, w.stream.place))

    def _cut(self, stream: Stream) -> Iterator[Window]:
        start, end = stream.start, stream.start + stream.rows
        if end > self.rows:  # filled up: no more than a batch
            yield Window(stream, start, end)
            return
        first, last = np.searchsorted(self._edges, [start, end - 1], side="right")
        inner = self._edges[first + self.settings.window - 1 : last : self.settings.window].tolist()
        edges = [start, *inner, end]
        yield from (Window(stream, a, b) for a, b in pairwise(edges) if b > a)

    def rows_of(self, window: Window, share: Share) -> tuple[np.ndarray, np.ndarray]:
        """What a share takes of a window: ordinals of the rows in the order in which batches take them, and their
        batches, int64 (n,) each. A row that fills up the last batch has its ordinal as -1 - ordinal."""
        stream = window.stream
        batch, place = np.divmod(np.arange(window.start - stream.start, window.end - stream.start), stream.width)
        batch, place = stream.first + stream.step * batch, stream.place + place
        since = batch - share.start
        taken = (place >= share.first) & (place < share.last) & (since >= 0) & (since % share.step == 0)
        return self._sequence(window)[taken], batch[taken]

    def _sequence(self, window: Window) -> np.ndarray:
        """Ordinals of the rows of a window, permuted."""
        places = np.arange(window.start, min(window.end, self.rows))
        if self.settings.shuffle:
            places = places[np.argsort(self._hash(places, ROWS), kind="stable")]
        filled = np.arange(window.end - window.start - len(places)) % self.rows
        return np.concatenate([self._at(places), -1 - self._at(filled)])

    def _at(self, places: np.ndarray) -> np.ndarray:
        """Ordinals of the rows at places of the sequence."""
        group = np.searchsorted(self._edges, places, side="right") - 1
        return np.asarray(self._ordinals[group] + places - self._edges[group])

    def _hash(self, values: np.ndarray, what: int) -> np.ndarray:
        key = np.zeros(1, np.uint64)
        with np.errstate(over="ignore"):
            for part in (self.settings.seed, self.number, what):
                key = mix64(key + np.uint64(2 * part + 1))
            return mix64(mix64(values.astype(np.uint64) + key) ^ key)


def batches_of(rows: int, settings: Settings) -> int:
    """Global batches of an epoch."""
    return rows // settings.batch if settings.drop_last else -(-rows // settings.batch)


def fit(settings: Settings, sizes: np.ndarray, row_bytes: float, memory: float) -> Settings:
    """Settings that suit the row groups: no more streams than groups, windows that come to `memory` bytes in all.

    `settings.lanes` and `.phases` are upper bounds, `.window` is filled in. A function of the rows and of what the user
    asked for alone, so it is the same on every rank of every world.
    """
    if not settings.shuffle:
        return replace(settings, lanes=1, phases=1, window=1)
    lanes = max(d for d in range(1, min(settings.lanes, len(sizes), settings.batch) + 1) if settings.batch % d == 0)
    phases = max(1, min(settings.phases, len(sizes) // lanes))
    group = row_bytes * float(sizes.mean())
    streams = lanes * phases
    window = min(memory, streams * WINDOW_BYTES) / (streams * group)
    return replace(settings, lanes=lanes, phases=phases, window=max(1, int(window)))
