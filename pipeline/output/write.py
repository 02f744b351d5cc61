"""Kept rows to Parquet: row group by row group, by address, never by a join.

A unit reads the shards of one output file, drops what the keep flag drops and writes the rest in the source's order
and schema. A row group in which nothing is kept is not read. How many files there are and which rows end up in which is
planned from the kept counts before anything is written, so names and bytes do not depend on the workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.shards import Shard
from pipeline.corpus.storage import Store, resolve
from pipeline.engine.parts import FINGERPRINT, part_fingerprint, part_name
from pipeline.engine.reading import Layout
from pipeline.errors import TamisError
from pipeline.recipe import State, fingerprint
from pipeline.run import Run

GROUP_BYTES = 64 << 20


@dataclass(frozen=True)
class Annotation:
    """Fields of stored columns that go along in a struct column `tamis`: (name in the struct, column, field)."""

    name: str
    column: str
    field: str


@dataclass(frozen=True)
class Subset:
    """What to write where: rows with the keep flag of `keep` (a column) and without that of `without`."""

    keep: str
    directory: Store
    pattern: str
    columns: tuple[str, ...]
    annotations: tuple[Annotation, ...] = ()
    without: str | None = None
    row_group_rows: int = 10_000
    first: int = 0

    def references(self) -> tuple[str, ...]:
        return (f"{self.keep}.keep", *([f"{self.without}.keep"] if self.without else []))


@dataclass(frozen=True)
class CountKept:
    """Statistic: rows that a subset takes from every shard; state `shard` and `rows`, int64, equal length."""

    inputs: tuple[str, ...]

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        keep = batch.column(0)
        for other in range(1, batch.num_columns - 1):
            keep = pc.and_not(keep, batch.column(other))
        rows = state["rows"] + keep.true_count if state else np.array([keep.true_count])
        return {"shard": batch.column(batch.num_columns - 1)[:1].to_numpy().astype(np.int64), "rows": rows}

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.concatenate([s[name] for s in states]) for name in ("shard", "rows")}


@dataclass(frozen=True)
class FileUnit:
    """Consecutive shards that fill `files` files of equal rows, from file number `first` on."""

    first: int
    files: int
    rows: int
    shards: tuple[Shard, ...]
    fingerprint: str

    def cuts(self) -> list[int]:
        """Rows of every file."""
        edges = [self.rows * i // self.files for i in range(self.files + 1)]
        return [b - a for a, b in zip(edges, edges[1:], strict=False)]


def plan_files(
    shards: Sequence[Shard], kept: np.ndarray, file_bytes: float, identity: str, first: int = 0
) -> list[FileUnit]:
    """Group shards into files of about `file_bytes` compressed bytes, guessed from the source's. `kept`: rows a shard."""
    units: list[FileUnit] = []
    held: list[Shard] = []
    size = 0.0
    rows = 0
    number = first

    def close() -> None:
        nonlocal held, size, rows, number
        if rows:
            files = min(rows, max(1, round(size / file_bytes)))
            mark = fingerprint(identity, [s.fingerprint for s in held], number, files, rows)
            units.append(FileUnit(number, files, rows, tuple(held), mark))
            number += files
        held, size, rows = [], 0.0, 0

    for shard, count in zip(shards, kept.tolist(), strict=True):
        share = shard.bytes * count / max(shard.rows, 1)
        if held and size + share > file_bytes:
            close()
        if count:
            held.append(shard)
            size, rows = size + share, rows + count
    close()
    return units


@dataclass
class WriteTask:
    layout: Layout
    subset: Subset

    def __call__(self, unit: FileUnit, attempt: int) -> dict[str, Any]:
        """Write the files of one unit; returns rows and bytes written."""
        rows = size = 0
        batches = (
            b for shard in unit.shards for b in self._kept(shard, max(64, self.subset.row_group_rows >> attempt))
        )
        rest: list[pa.RecordBatch] = []
        for offset, wanted in enumerate(unit.cuts()):
            name = self.subset.pattern.format(unit.first + offset)
            with ExitStack() as stack:
                sink = stack.enter_context(self.subset.directory.sink(name))
                writer: pq.ParquetWriter | None = None
                for group in self._groups(batches, rest, wanted):
                    writer = writer or self._writer(sink, group.schema, unit.fingerprint)
                    writer.write_table(group, row_group_size=group.num_rows)
                    rows, size = rows + group.num_rows, size + group.nbytes
                if writer is None:
                    raise TamisError(f"{name}: no row was found where {wanted} were planned")
                writer.close()
        if rest and sum(b.num_rows for b in rest):
            raise TamisError(f"unit {unit.first}: rows were left over: the keep flags changed since they were counted")
        return {"rows": rows, "bytes": size}

    def _writer(self, sink: Any, schema: pa.Schema, mark: str) -> pq.ParquetWriter:
        metadata = {k: v for k, v in (schema.metadata or {}).items() if k not in (b"huggingface", b"pandas")}
        schema = schema.with_metadata(metadata | {FINGERPRINT: mark.encode()})
        names = [n for n in schema.names if n != self.layout.text]  # text does not repeat: no dictionary for it
        return pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=names)

    def _groups(self, batches: Iterator[pa.RecordBatch], rest: list[pa.RecordBatch], wanted: int) -> Iterator[pa.Table]:
        """Row groups of one file: `wanted` rows in all. What is read beyond a file's end waits in `rest`."""
        held: list[pa.RecordBatch] = []
        count = size = 0
        while wanted:
            batch = rest.pop() if rest else next(batches, None)
            if batch is None:
                raise TamisError("fewer rows are kept than were counted: the corpus or the flags changed in between")
            room = min(wanted, self.subset.row_group_rows - count)
            if batch.num_rows > room:
                rest.append(batch.slice(room))
                batch = batch.slice(0, room)
            held.append(batch)
            count, size, wanted = count + batch.num_rows, size + batch.nbytes, wanted - batch.num_rows
            if count == self.subset.row_group_rows or size >= GROUP_BYTES or not wanted:
                table = pa.Table.from_batches(held)
                yield table.replace_schema_metadata(None)
                held, count, size = [], 0, 0

    def _kept(self, shard: Shard, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Kept rows of a shard with the source's columns and the annotations."""
        keep = self._flags(shard)
        at = np.flatnonzero(keep)
        notes = self._notes(shard, at) if self.subset.annotations else None
        start = given = 0
        for piece in shard.pieces:
            filesystem, path = resolve(piece.uri)
            with filesystem.open_input_file(path) as source:
                file = pq.ParquetFile(source, pre_buffer=True)
                for group, count in enumerate(piece.rows):
                    if not keep[start : start + count].any():
                        start += count
                        continue
                    for batch in file.iter_batches(
                        batch_rows,
                        row_groups=[piece.first_group + group],
                        columns=list(self.subset.columns),
                        use_threads=False,
                    ):
                        mask = keep[start : start + batch.num_rows]
                        start += batch.num_rows
                        kept = batch.select(list(self.subset.columns)).filter(pa.array(mask))
                        if notes is not None:
                            kept = kept.append_column("tamis", notes.slice(given, kept.num_rows))
                        given += kept.num_rows
                        if kept.num_rows:
                            yield kept

    def _read(self, shard: Shard, column: str, fields: Sequence[str]) -> pa.Table:
        with self.layout.store.filesystem.open_input_file(
            self.layout.store.at("columns", column, part_name(shard.index))
        ) as source:
            return pq.read_table(source, columns=list(fields), use_threads=False)

    def _flags(self, shard: Shard) -> np.ndarray:
        keep = pc.fill_null(self._read(shard, self.subset.keep, ["keep"])["keep"], False)
        if self.subset.without:
            keep = pc.and_not(keep, pc.fill_null(self._read(shard, self.subset.without, ["keep"])["keep"], False))
        return np.asarray(keep.to_numpy())

    def _notes(self, shard: Shard, at: np.ndarray) -> pa.StructArray:
        rows = pa.array(at)
        values = []
        for note in self.subset.annotations:
            column = self._read(shard, note.column, [note.field])[note.field].combine_chunks().take(rows)
            values.append(hex_keys(column) if pa.types.is_fixed_size_binary(column.type) else column)
        return pa.StructArray.from_arrays(values, [n.name for n in self.subset.annotations])


def hex_keys(keys: pa.FixedSizeBinaryArray) -> pa.Array:
    """16-byte keys as 32 hex digits."""
    raw = np.frombuffer(keys.buffers()[1], np.uint8)[keys.offset * 16 : (keys.offset + len(keys)) * 16].reshape(-1, 16)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.empty((len(raw), 32), np.uint8)
    text[:, ::2], text[:, 1::2] = digits[raw >> 4], digits[raw & 15]
    offsets = pa.py_buffer(np.arange(0, 32 * (len(raw) + 1), 32, dtype=np.int64))
    return pa.LargeStringArray.from_buffers(len(raw), offsets, pa.py_buffer(text)).cast(pa.string())


def write_subset(run: Run, subset: Subset, file_bytes: float, label: str) -> list[dict[str, Any]]:
    """Write a subset; returns the lineage of every file: name, rows, fingerprint and the row groups it came from.

    Files that are there already with the right fingerprint stay; files of an older selection are removed.
    """
    references = subset.references()
    counted = run.aggregate(CountKept((*references, "address.shard")), label=f"count {label}")
    if not counted or not counted["rows"].sum():
        raise TamisError(f"{label}: no row is kept")
    kept = np.zeros(len(run.shards), np.int64)
    kept[counted["shard"]] = counted["rows"]
    columns = sorted({n.column for n in subset.annotations})
    identity = fingerprint(
        [run.identity(r) for r in references],
        [run.plans[c].fingerprint for c in columns],
        list(subset.columns),
        [[n.name, n.column, n.field] for n in subset.annotations],
        [subset.pattern, subset.row_group_rows],
    )
    units = plan_files(run.shards, kept, file_bytes, identity, subset.first)
    names = {u.first: [subset.pattern.format(u.first + i) for i in range(u.files)] for u in units}
    expected = {name for group in names.values() for name in group}
    there = subset.directory.files()
    if not subset.first:
        for name in [n for n in there if n not in expected and not n.startswith("README")]:
            subset.directory.remove(name)
    todo = [
        u
        for u in units
        if not all(n in there and part_fingerprint(subset.directory, n) == u.fingerprint for n in names[u.first])
    ]
    for outcome in run.map(label, WriteTask(run.layout, subset), todo):
        if outcome.error:
            raise TamisError(f"writing {names[todo[outcome.index].first]} failed: {outcome.error}")
    return [
        {"file": name, "rows": rows, "fingerprint": u.fingerprint, "from": [_origin(s) for s in u.shards]}
        for u in units
        for name, rows in zip(names[u.first], u.cuts(), strict=True)
    ]


def _origin(shard: Shard) -> list[dict[str, Any]]:
    return [{"file": p.uri, "row_groups": [p.first_group, p.first_group + len(p.rows) - 1]} for p in shard.pieces]
