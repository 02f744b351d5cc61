"""Kept rows to Parquet: row group by row group, by address, never by a join.

A unit reads the shards of one output file, drops what the keep flag drops and writes the rest in the source's order
and schema, zstd. A row group in which nothing is kept is not read. How many files there are and which rows end up in
which is planned from the kept counts before anything is written, so names and bytes do not depend on the workers.

Where a few files gather from a large corpus (a calibration set, a validation file, a small budget) their kept rows are
sifted out shard by shard first, so that all workers read, not one worker a file.

Measured: 1.2 to 1.6 of the bytes/s of a bare pyarrow loop that reads, filters and writes (bench/filter_write.py). It
gains by what it leaves out: no dictionary is tried on the text, and no whole file is held.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.shards import Shard, read_source
from pipeline.corpus.storage import Store, resolve
from pipeline.corpus.text import clean_text
from pipeline.engine.parts import FINGERPRINT, READERS, part_fingerprint, part_name, survey
from pipeline.engine.reading import Layout
from pipeline.errors import ConfigError, TamisError
from pipeline.recipe import State, fingerprint
from pipeline.rewrite.base import REWRITE, Pieces, Rewrite
from pipeline.run import Run

VERSION = 2
GROUP_BYTES = 64 << 20
"""Decoded bytes at which a row group ends, however few its rows."""
BATCH_ROWS = 4096
SIFT_BYTES = 512 << 20
"""A file that gathers from more compressed bytes than this, and from much more than it holds, is sifted first."""
FEW_FILES = 64
"""With more files than this there is work for all workers without sifting."""
TAMIS = "tamis"


@dataclass(frozen=True)
class Annotation:
    """A field of a stored column that goes along in the struct column `tamis`: name in the struct, column, field."""

    name: str
    column: str
    field: str


@dataclass(frozen=True)
class Subset:
    """What to write where: rows with the keep flag of `keep` (a column) and without that of `without`.

    `columns`: columns of the source; `names`: what they are called in the files (default: the same).
    """

    keep: str
    directory: Store
    pattern: str
    columns: tuple[str, ...]
    names: tuple[str, ...] = ()
    annotations: tuple[Annotation, ...] = ()
    without: str | None = None
    row_group_rows: int = 10_000
    first: int = 0
    rewrite: Rewrite | None = None
    """Shortens the texts by the spans of the column `rewrite`; a row without spans keeps its text whole."""

    def references(self) -> tuple[str, ...]:
        return (f"{self.keep}.keep", *([f"{self.without}.keep"] if self.without else []))

    def schema(self, run: Run) -> pa.Schema:
        """Schema of the files: the source's fields, all nullable as files of one corpus may differ in that."""
        named = zip(self.columns, self.names or self.columns, strict=True)
        fields = [run.schema.field(column).with_name(name).with_nullable(True) for column, name in named]
        if (image := run.layout.image) and image.name in self.columns:  # bytes, for paths would lead nowhere from here
            at = self.columns.index(image.name)
            fields[at] = fields[at].with_type(pa.binary())
        notes = []
        for note in self.annotations:
            kind = run.plans[note.column].column.fields.field(note.field).type
            notes.append((note.name, pa.string() if pa.types.is_fixed_size_binary(kind) else kind))
        return pa.schema([*fields, *([(TAMIS, pa.struct(notes))] if notes else [])])


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
    """Consecutive shards that fill `files` files of equal rows, from file number `first` on. `kept`: rows a shard."""

    first: int
    files: int
    shards: tuple[Shard, ...]
    kept: tuple[int, ...]
    fingerprint: str
    sifted: bool = False

    @property
    def rows(self) -> int:
        return sum(self.kept)

    def cuts(self) -> list[int]:
        """Rows of every file."""
        edges = [self.rows * i // self.files for i in range(self.files + 1)]
        return [b - a for a, b in pairwise(edges)]


def plan_files(
    shards: Sequence[Shard], kept: np.ndarray, file_bytes: float, identity: str, first: int = 0
) -> list[FileUnit]:
    """Group shards into files of about `file_bytes`, by the compressed bytes in the source. `kept`: rows a shard."""
    units: list[FileUnit] = []
    held: list[tuple[Shard, int]] = []
    size = 0.0
    number = first

    def close() -> None:
        nonlocal held, size, number
        if held:
            members, counts = zip(*held, strict=True)
            files = min(sum(counts), max(1, round(size / file_bytes)))
            mark = fingerprint(identity, [s.fingerprint for s in members], number, files, counts)
            scattered = sum(s.bytes for s in members) > max(SIFT_BYTES, 2 * size)
            units.append(FileUnit(number, files, members, counts, mark, scattered))
            number += files
        held, size = [], 0.0

    for shard, count in zip(shards, kept.tolist(), strict=True):
        if not count:
            continue
        share = shard.bytes * count / shard.rows
        if held and size + share > file_bytes:
            close()
        held.append((shard, count))
        size += share
    close()
    return units if number - first <= FEW_FILES else [replace(u, sifted=False) for u in units]


@dataclass
class WriteTask:
    layout: Layout
    subset: Subset
    schema: pa.Schema
    sieve: tuple[str, ...]
    """Where in the run the rows of sifted shards lie."""

    def __call__(self, unit: FileUnit, attempt: int) -> dict[str, Any]:
        """Write the files of one unit; returns rows and bytes written."""
        read = self._sifted if unit.sifted else self.kept
        batches = (batch for shard in unit.shards for batch in read(shard))
        rest: list[pa.RecordBatch] = []
        size = 0
        for offset, rows in enumerate(unit.cuts()):
            name = self.subset.pattern.format(unit.first + offset)
            with self.subset.directory.sink(name) as sink:
                with self.writer(sink, unit.fingerprint) as writer:
                    for group in self._groups(batches, rest, rows):
                        writer.write_table(group, row_group_size=group.num_rows)
                        size += group.nbytes
        if rest or next(batches, None) is not None:
            raise TamisError(f"file {unit.first}: more rows are kept than were counted: run again")
        return {"rows": unit.rows, "bytes": size}

    def writer(self, sink: Any, mark: str) -> pq.ParquetWriter:
        # Texts and images do not repeat: no dictionary for them.
        bulky = {self.layout.text, self.layout.image.name if self.layout.image else None}
        plain = {n for c, n in zip(self.subset.columns, self.schema.names, strict=False) if c in bulky}
        paths = [path for path in _leaves(self.schema) if path not in plain]
        schema = self.schema.with_metadata({FINGERPRINT: mark.encode()})
        return pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=paths)

    def _groups(self, batches: Iterator[pa.RecordBatch], rest: list[pa.RecordBatch], wanted: int) -> Iterator[pa.Table]:
        """Row groups of one file: `wanted` rows in all. What is read beyond a file's end waits in `rest`."""
        held: list[pa.RecordBatch] = []
        count = size = 0
        while wanted:
            batch = rest.pop() if rest else next(batches, None)
            if batch is None:
                raise TamisError("fewer rows are kept than were counted: run again")
            room = min(wanted, self.subset.row_group_rows - count)
            if batch.num_rows > room:
                rest.append(batch.slice(room))
                batch = batch.slice(0, room)
            held.append(batch)
            count, size, wanted = count + batch.num_rows, size + batch.nbytes, wanted - batch.num_rows
            if count == self.subset.row_group_rows or size >= GROUP_BYTES or not wanted:
                yield pa.Table.from_batches(held)
                held, count, size = [], 0, 0

    def kept(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Kept rows of a shard with the files' columns. Where batches end depends on the corpus and the flags alone."""
        keep = self._flags(shard)
        notes = self._notes(shard, np.flatnonzero(keep)) if self.subset.annotations else None
        rewrites = self.subset.rewrite is not None and self.layout.text in self.subset.columns
        spans = self._spans(shard, np.flatnonzero(keep)) if rewrites else None
        groups, keep = _kept_groups(shard, keep)
        start = given = 0
        images = self.layout.image if self.layout.image and self.layout.image.name in self.subset.columns else None
        for batch in read_source(groups, list(self.subset.columns), BATCH_ROWS, images):
            mask = keep[start : start + batch.num_rows]
            start += batch.num_rows
            columns = batch.select(self.subset.columns)
            if not mask.all():
                columns = columns.filter(pa.array(mask))
            if columns.num_rows:
                if images is not None and columns[images.name].null_count:
                    raise TamisError(f"an image that was kept is gone from {images.name!r}: run again with --refresh")
                if spans is not None:
                    columns = self._shorten(columns, spans.slice(given, columns.num_rows))
                beside = [notes.slice(given, columns.num_rows)] if notes is not None else []
                given += columns.num_rows
                yield pa.RecordBatch.from_arrays([*columns.columns, *beside], schema=self.schema)

    def _sifted(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        path = self.layout.store.at(*self.sieve, part_name(shard.index))
        with self.layout.store.filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                yield pa.RecordBatch.from_arrays([c.combine_chunks() for c in table.columns], schema=self.schema)

    def _read(self, shard: Shard, column: str, fields: Sequence[str]) -> pa.Table:
        path = self.layout.store.at("columns", column, part_name(shard.index))
        with self.layout.store.filesystem.open_input_file(path) as source:
            return pq.read_table(source, columns=list(fields), use_threads=False)

    def _flags(self, shard: Shard) -> np.ndarray:
        keep = pc.fill_null(self._read(shard, self.subset.keep, ["keep"])["keep"], False)
        if self.subset.without:
            keep = pc.and_not(keep, pc.fill_null(self._read(shard, self.subset.without, ["keep"])["keep"], False))
        return np.asarray(keep.to_numpy())

    def _spans(self, shard: Shard, at: np.ndarray) -> pa.ListArray:
        return self._read(shard, REWRITE, ["kept"])["kept"].combine_chunks().take(pa.array(at))

    def _shorten(self, columns: pa.RecordBatch, spans: pa.ListArray) -> pa.RecordBatch:
        """The same rows with their texts shortened, in the type that the source's column has."""
        assert self.subset.rewrite is not None
        at = columns.schema.get_field_index(self.layout.text)
        texts = columns.column(at)
        whole = clean_text(texts)[0].cast(pa.large_string())
        short = self.subset.rewrite.render(whole, Pieces.of(spans))
        short = pc.if_else(spans.is_valid(), short, whole)
        short = short.dictionary_encode() if pa.types.is_dictionary(texts.type) else short
        return columns.set_column(at, columns.schema.field(at), short.cast(texts.type))

    def _notes(self, shard: Shard, at: np.ndarray) -> pa.StructArray:
        rows = pa.array(at)
        values = []
        for note in self.subset.annotations:
            column = self._read(shard, note.column, [note.field])[note.field].combine_chunks().take(rows)
            values.append(hex_keys(column) if pa.types.is_fixed_size_binary(column.type) else column)
        return pa.StructArray.from_arrays(values, [n.name for n in self.subset.annotations])


@dataclass
class SiftTask:
    """Write the kept rows of one shard into the run's scratch, a row group a batch so that it reads back the same."""

    write: WriteTask
    mark: str

    def __call__(self, shard: Shard, attempt: int) -> dict[str, Any]:
        rows = size = 0
        with self.write.layout.store.sink(*self.write.sieve, part_name(shard.index)) as sink:
            with self.write.writer(sink, fingerprint(self.mark, shard.fingerprint)) as writer:
                for batch in self.write.kept(shard):
                    writer.write_batch(batch, row_group_size=batch.num_rows)
                    rows, size = rows + batch.num_rows, size + batch.nbytes
        return {"rows": rows, "bytes": size}


def _kept_groups(shard: Shard, keep: np.ndarray) -> tuple[Shard, np.ndarray]:
    """The row groups of a shard in which something is kept, and the flags of their rows."""
    pieces, flags = [], []
    start = 0
    for piece in shard.pieces:
        edges = start + np.cumsum([0, *piece.rows])
        start = int(edges[-1])
        full = [bool(keep[a:b].any()) for a, b in pairwise(edges)]
        for wanted, run in groupby(range(len(full)), full.__getitem__):
            if wanted:
                groups = list(run)
                first, last = groups[0], groups[-1]
                pieces.append(replace(piece, first_group=piece.first_group + first, rows=piece.rows[first : last + 1]))
                flags.append(keep[edges[first] : edges[last + 1]])
    return replace(shard, pieces=tuple(pieces)), np.concatenate(flags)


def _leaves(schema: pa.Schema) -> list[str]:
    """Paths of the Parquet columns of a schema, as the writer's options name them."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    file = pq.ParquetFile(pa.BufferReader(sink.getvalue()))
    return [file.schema.column(i).path for i in range(len(file.schema))]


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

    Files that are there already with the right fingerprint stay as they are. Raises ConfigError where a file that Tamis
    did not write, or one of the corpus, would be overwritten.
    """
    references = subset.references()
    counted = run.aggregate(CountKept((*references, "address.shard")), label=f"count {label}")
    if not counted or not counted["rows"].sum():
        raise TamisError(f"{label}: no row is kept")
    kept = np.zeros(len(run.shards), np.int64)
    kept[counted["shard"]] = counted["rows"]
    schema = subset.schema(run)
    identity = fingerprint(
        VERSION,
        [*(run.identity(r) for r in references), *([run.plans[REWRITE].fingerprint] if subset.rewrite else [])],
        [run.plans[c].fingerprint for c in sorted({n.column for n in subset.annotations})],
        [[n.name, n.column, n.field] for n in subset.annotations],
        [subset.columns, str(schema), subset.pattern, subset.row_group_rows],
    )
    units = plan_files(run.shards, kept, file_bytes, identity, subset.first)
    names = {u.first: [subset.pattern.format(u.first + i) for i in range(u.files)] for u in units}
    marks = _marks(run, subset.directory, [name for group in names.values() for name in group])
    todo = [u for u in units if any(marks.get(name) != u.fingerprint for name in names[u.first])]

    sieve = ("scratch", "sift", identity)
    task = WriteTask(run.layout, subset, schema, sieve)
    _sift(run, task, todo, identity, label)
    for outcome in run.map(label, task, todo):
        if outcome.error:
            raise TamisError(f"writing {names[todo[outcome.index].first]} failed: {outcome.error}")
    run.store.remove(*sieve)
    return [
        {"file": name, "rows": rows, "fingerprint": u.fingerprint, "from": [o for s in u.shards for o in _origin(s)]}
        for u in units
        for name, rows in zip(names[u.first], u.cuts(), strict=True)
    ]


def _sift(run: Run, task: WriteTask, units: Sequence[FileUnit], identity: str, label: str) -> None:
    scattered = {s.index: (s, n) for u in units if u.sifted for s, n in zip(u.shards, u.kept, strict=True)}
    wanted = {i: (fingerprint(identity, s.fingerprint), n) for i, (s, n) in scattered.items()}
    missing, _ = survey(run.store, task.sieve, wanted)
    shards = [scattered[i][0] for i in missing]
    for outcome in run.map(f"sift {label}", SiftTask(task, identity), shards):
        if outcome.error:
            raise TamisError(f"sifting shard {shards[outcome.index].index} failed: {outcome.error}")


def _marks(run: Run, directory: Store, names: Sequence[str]) -> dict[str, str | None]:
    """Fingerprints of those of the files that are there. Raises ConfigError for one that is not ours to overwrite."""
    sources = {posixpath.dirname(resolve(piece.uri)[1]) for shard in run.shards for piece in shard.pieces}
    if directory.path.rstrip("/") in sources:
        raise ConfigError(f"output.path: {directory.uri} holds the corpus itself; give another directory")
    there = directory.files()
    present = [name for name in names if name in there]
    with ThreadPoolExecutor(READERS) as threads:
        marks = list(threads.map(lambda name: part_fingerprint(directory, name), present))
    in_run = directory.uri.startswith(run.store.locate(""))
    for name, mark in zip(present, marks, strict=True):
        if mark is None and not in_run:
            raise ConfigError(
                f"output.path: {directory.locate(name)} was not written by Tamis and would be overwritten; "
                "give another directory, or move the file away"
            )
    return dict(zip(present, marks, strict=True))


def sweep(directory: Store, files: Sequence[dict[str, Any]]) -> None:
    """Remove what an earlier selection left: Parquet files of Tamis that are not among `files`."""
    current = {file["file"] for file in files}
    for name in directory.files():
        if name.endswith(".parquet") and name not in current and part_fingerprint(directory, name):
            directory.remove(name)


def _origin(shard: Shard) -> list[dict[str, Any]]:
    return [{"file": p.uri, "row_groups": [p.first_group, p.first_group + len(p.rows) - 1]} for p in shard.pieces]
