"""Which rows compete for a budget, in which order, and the line above which a row is kept.

A row's place is one long number: the order-preserving keys of its scores (32 bits each, the first decides), then the
hash of its key (64), then its address (64). All places differ, so any "best rows" are those above one line. A line
that no tie reaches compares float32 scores alone; the row's key and address are read only where it runs through a tie.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import TamisError
from pipeline.hashing import hash64
from pipeline.select.keys import order_keys

ONES = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Ranking:
    """Which rows compete, and in which order.

    `scores`: references of float32 columns; the first decides, each next one breaks its ties. None: ranked by hash.
    `unit`: reference of an int64 weight >= 0, or "" to count rows. `group`: reference of an int32 in [0, groups).
    A row competes where all `floors` are reached, all of `where` are true and all of `where_not` false, no line of
    `beyond` keeps it already, and its weight is at most its group's `caps`. `present` names more references that must
    not be null, so that every pass sees the same rows.
    """

    scores: tuple[str, ...] = ()
    unit: str = ""
    seed: int = 0
    group: str = ""
    groups: int = 1
    floors: tuple[tuple[str, float], ...] = ()
    where: tuple[str, ...] = ()
    where_not: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    beyond: tuple[Line, ...] = ()
    caps: np.ndarray | None = None

    @property
    def fields(self) -> int:
        return len(self.scores) + 2

    def bits(self, number: int) -> int:
        """Width of a field of a row's place: scores, hash, address."""
        return 32 if number < len(self.scores) else 64

    def references(self, fields: int) -> tuple[str, ...]:
        """What must be read to know the first fields of a row's place."""
        tail = (("row.key",), ("address.shard", "address.row"))
        parts = [(s,) for s in self.scores] + list(tail)
        return tuple(reference for part in parts[:fields] for reference in part)

    def value(self, batch: pa.RecordBatch, number: int, rows: np.ndarray | None) -> np.ndarray:
        """A field of the places of some rows (None: of all), greater is better; unsigned, shape (rows,)."""
        if number < len(self.scores):
            return order_keys(numpy_of(batch, self.scores[number], rows))
        if number == len(self.scores):
            keys = batch.column("row.key")
            return hash64(keys if rows is None else keys.take(pa.array(rows)), self.seed)
        shard = numpy_of(batch, "address.shard", rows).astype(np.uint64)
        return np.asarray(~(shard << np.uint64(32) | numpy_of(batch, "address.row", rows).astype(np.uint64)))

    def members(self, batch: pa.RecordBatch) -> np.ndarray | None:
        """Group of every row, int64; None where there is but one. Raises TamisError for a group that is unknown."""
        if not self.group:
            return None
        group = numpy_of(batch, self.group).astype(np.int64)
        if len(group) and (group.min() < 0 or group.max() >= self.groups):
            raise TamisError(f"{self.group} is {group.min()} to {group.max()}, outside of 0 to {self.groups - 1}")
        return group

    def competing(self, batch: pa.RecordBatch) -> np.ndarray | None:
        """Indices of the rows that compete; None for all of them."""
        tests = [numpy_of(batch, name) >= np.float32(floor) for name, floor in self.floors]
        tests += [numpy_of(batch, name) for name in self.where]
        tests += [~numpy_of(batch, name) for name in self.where_not]
        tests += [~line.keeps(batch) for line in self.beyond]
        tests += [self.fits(batch)] if self.caps is not None else []
        return np.flatnonzero(np.logical_and.reduce(tests)) if tests else None

    def fits(self, batch: pa.RecordBatch) -> np.ndarray:
        """Whether each row's weight is within its group's cap; bool (n,)."""
        if self.caps is None:
            return np.ones(batch.num_rows, bool)
        return np.asarray(numpy_of(batch, self.unit) <= of_group(self.caps, self.members(batch), None))


@dataclass(frozen=True)
class Line:
    """A threshold a group: a row is kept where its place is greater than `bounds[:, group]`.

    `bounds`: uint64 (fields, groups). `tied`: bool (groups,), whether some of the rows with exactly the threshold's
    scores are kept. With `ranking.caps`, rows heavier than their group's cap are not kept.
    """

    ranking: Ranking
    bounds: np.ndarray
    tied: np.ndarray

    @property
    def depth(self) -> int:
        """Leading fields that decide; the bounds of the others are all ones and pass no row."""
        return int(np.flatnonzero((self.bounds != ONES).any(axis=1)).max(initial=0)) + 1

    @property
    def inputs(self) -> tuple[str, ...]:
        weight = (self.ranking.unit,) if self.ranking.caps is not None else ()
        return (*self.ranking.references(self.depth), *((self.ranking.group,) if self.ranking.group else ()), *weight)

    def compare(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """(above, tied) for every row, bool. `tied`: the scores are the threshold's and rows like it are kept."""
        above, tied = np.zeros(batch.num_rows, bool), np.zeros(batch.num_rows, bool)
        group, rows = self.ranking.members(batch), None
        for number in range(self.depth):
            if number == len(self.ranking.scores) > 0 and rows is not None:
                tied[rows] = of_group(self.tied, group, rows)
            value = self.ranking.value(batch, number, rows)
            bound = of_group(self.bounds[number].astype(value.dtype), group, rows)
            above[slice(None) if rows is None else rows] = value > bound
            rows = narrow(rows, value == bound)
            if not len(rows):
                break
        return above, tied

    def keeps(self, batch: pa.RecordBatch) -> np.ndarray:
        """Whether each row is above the line and within its group's cap; bool (n,)."""
        return np.asarray(self.compare(batch)[0] & self.ranking.fits(batch))


def save_lines(lines: Sequence[Line], file: Path) -> None:
    """Write lines as one npz."""
    arrays: dict[str, np.ndarray] = {}
    for i, line in enumerate(lines):
        r = line.ranking
        about = {"scores": r.scores, "unit": r.unit, "seed": r.seed, "group": r.group, "groups": r.groups}
        arrays |= {f"{i}.about": np.array(json.dumps(about)), f"{i}.bounds": line.bounds, f"{i}.tied": line.tied}
        arrays |= {f"{i}.caps": r.caps} if r.caps is not None else {}
    np.savez(file, **arrays)  # type: ignore[arg-type]  # keywords are arrays


def load_lines(file: Path) -> tuple[Line, ...]:
    with np.load(file, allow_pickle=False) as arrays:
        count = sum(name.endswith(".about") for name in arrays.files)
        lines = []
        for i in range(count):
            about = json.loads(str(arrays[f"{i}.about"]))
            caps = arrays[f"{i}.caps"] if f"{i}.caps" in arrays.files else None
            ranking = Ranking(**about | {"scores": tuple(about["scores"]), "caps": caps})
            lines.append(Line(ranking, arrays[f"{i}.bounds"], arrays[f"{i}.tied"]))
    return tuple(lines)


def numpy_of(batch: pa.RecordBatch, name: str, rows: np.ndarray | None = None) -> np.ndarray:
    values: np.ndarray = batch.column(name).to_numpy(zero_copy_only=False)
    return values if rows is None else values[rows]


def narrow(rows: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(mask) if rows is None else rows[mask]


def of_group(values: np.ndarray, group: np.ndarray | None, rows: np.ndarray | None) -> np.ndarray:
    """The value of every row's group, from one value a group."""
    if group is None:
        return values[:1]  # broadcasts
    return np.asarray(values[group if rows is None else group[rows]])
