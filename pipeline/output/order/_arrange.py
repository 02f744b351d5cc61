"""The curated rows themselves in the order of an order, for who reads them one after the other.

    <run>/order/<name>/rows/part-00000.parquet   the rows of the order's part of the same name, in its order

Random access to Parquet costs a row group a row. So the rows are sorted once, in three rounds of tasks through files in
the run's scratch, each resumable: which rows of a curated file go to which part, the rows of every file split by part,
and the rows of every part in order. A worker holds one part decoded, or `CHUNK_BYTES` of a file. It costs the disk of
another curated set, twice while it is made, and a row that an order repeats is written as often. `source` needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.storage import Store
from pipeline.engine.parts import FINGERPRINT, part_info, part_name
from pipeline.engine.regroup import Regroup, read_group, write_groups
from pipeline.output.feeding import CuratedSet, FedRun
from pipeline.output.order.base import ROWS, StoredOrder, one_batch
from pipeline.recipe import fingerprint

CHUNK_BYTES = 256 << 20
"""Decoded bytes of a curated file that are split at a time."""
GROUP_ROWS = 10_000
GROUP_BYTES = 64 << 20
POSITION = "tamis.position"


@dataclass(frozen=True)
class FedPart:
    """Curated rows that come one after the other: a file of theirs, or of an arranged order's."""

    number: int
    rows: int
    fingerprint: str
    curated: CuratedSet
    order: StoredOrder | None = None

    def batches(
        self, columns: list[str] | None = None, rows: int = 1024
    ) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """Rows, and their ordinals in the curated set, int64 (n,). Raises CorpusError for a file that has changed."""
        if self.order is None:
            start = int(self.curated.edges[self.number])
            for batch in self.curated.batches(self.number, columns, rows):
                yield batch, np.arange(start, start := start + batch.num_rows)
            return
        addresses = self.order.addresses(self.number)
        ordinals = self.curated.edges[addresses["file"].to_numpy()] + addresses["row"].to_numpy()
        start = 0
        store = self.order.store
        name = part_name(self.number)
        with pq.ParquetFile(store.filesystem.open_input_file(store.at(ROWS, name))) as file:
            self.order.check_mark(file.schema_arrow, self.order.rows_mark(self.number), ROWS, name)
            for batch in file.iter_batches(rows, columns=columns, use_threads=False):
                yield batch, ordinals[start : (start := start + batch.num_rows)]


def fed_parts(run: FedRun, order: StoredOrder | None) -> list[FedPart]:
    """The curated rows in an order, part by part; arranges them where that is not done. None: as they lie."""
    curated = run.curated
    if order is None or order.described["kind"] == "source":
        return [
            FedPart(i, f.rows, fingerprint("file", f.name, f.rows, f.fingerprint), curated)
            for i, f in enumerate(curated.files)
        ]
    arrange(run, order)
    rows = [p["rows"] for p in order.described["parts"]]
    return [FedPart(i, n, fingerprint(order.fingerprint, i), curated, order) for i, n in enumerate(rows)]


def arrange(run: FedRun, order: StoredOrder) -> None:
    """Write the rows of an order, in its order, beside it; parts that are there stay."""
    rows = [p["rows"] for p in order.described["parts"]]
    marks = [order.rows_mark(i) for i in range(len(rows))]
    todo = [i for i, mark in enumerate(marks) if not _done(order.store, i, mark, rows[i])]
    if not todo:
        return
    files = tuple((i, ()) for i in range(len(run.curated.files)))
    mark = fingerprint("arrange", 1, order.fingerprint)
    job = Regroup(run.store, f"rows-{order.name}", (), "", len(rows), files, mark)
    run.each("order index", IndexTask(job, order), job.unfinished("index", len(rows)))
    run.each("order rows", SplitRowsTask(job, run.curated), job.unfinished("split", len(files)))
    run.each("order write", GatherRowsTask(job, order.store, run.curated.schema), [(i, marks[i]) for i in todo])
    run.store.remove("scratch", "regroup", job.name)


def _done(store: Store, part: int, mark: str, rows: int) -> bool:
    info = part_info(store, ROWS, part_name(part))
    return info is not None and (info.fingerprint, info.rows) == (mark, rows)


@dataclass
class IndexTask:
    """Which rows of which curated file a part of the order takes, and where each comes."""

    job: Regroup
    order: StoredOrder

    def __call__(self, part: int, attempt: int) -> dict[str, Any]:
        addresses = self.order.addresses(part)
        table = pa.table({"row": addresses["row"], "position": np.arange(addresses.num_rows)})
        write_groups(self.job, "index", part, table, addresses["file"].to_numpy(), len(self.job.blocks))
        return {"rows": table.num_rows, "bytes": table.nbytes}


@dataclass
class SplitRowsTask:
    """The rows of one curated file split by part: chunk after chunk, one batch a part."""

    job: Regroup
    curated: CuratedSet

    def __call__(self, file: int, attempt: int) -> dict[str, Any]:
        parts = range(self.job.partitions)
        found = [read_group(self.job, "index", part, file) for part in parts]
        part = np.repeat(np.arange(len(found)), [len(b) for b in found])
        row, position = (np.concatenate([b.column(i).to_numpy() for b in found]) for i in (0, 1))
        by_row = np.argsort(row, kind="stable")
        part, row, position = part[by_row], row[by_row], position[by_row]
        schema = self.curated.schema.append(pa.field(POSITION, pa.int64()))
        size = first = 0
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        marked = schema.with_metadata({FINGERPRINT: self.job.fingerprint.encode()})
        with (
            self.job.store.sink(*self.job.place("split", file)) as sink,
            pa.ipc.new_file(sink, marked, options=options) as writer,
        ):
            for chunk in self._chunks(file):
                here = slice(*np.searchsorted(row, [first, first + chunk.num_rows]))
                by_part = np.argsort(part[here], kind="stable")
                edges = np.searchsorted(part[here][by_part], np.arange(len(parts) + 1))
                for i in parts:
                    some = by_part[edges[i] : edges[i + 1]]
                    taken = chunk.take(pa.array(row[here][some] - first))
                    taken = taken.append_column(POSITION, pa.array(position[here][some])).combine_chunks()
                    writer.write_batch(one_batch(taken.cast(schema)))
                first, size = first + chunk.num_rows, size + chunk.nbytes
        return {"rows": first, "bytes": size}

    def _chunks(self, file: int) -> Iterator[pa.Table]:
        held: list[pa.RecordBatch] = []
        for batch in self.curated.batches(file):
            held.append(batch)
            if sum(b.nbytes for b in held) >= CHUNK_BYTES:
                yield pa.Table.from_batches(held)
                held = []
        if held:
            yield pa.Table.from_batches(held)


@dataclass
class GatherRowsTask:
    """The rows of one part, in its order, as Parquet."""

    job: Regroup
    store: Store
    schema: pa.Schema

    def __call__(self, unit: tuple[int, str], attempt: int) -> dict[str, Any]:
        part, mark = unit
        held = [batch for file, _ in self.job.blocks for batch in self._of(file, part)]
        table = pa.Table.from_batches(held)
        order = np.argsort(table[POSITION].to_numpy(), kind="stable")
        table = table.drop_columns([POSITION])
        rows = max(1, min(GROUP_ROWS, GROUP_BYTES * len(order) // max(table.nbytes, 1)))
        marked = self.schema.with_metadata({FINGERPRINT: mark.encode()})
        with (
            self.store.sink(ROWS, part_name(part)) as sink,
            pq.ParquetWriter(sink, marked, compression="zstd") as writer,
        ):
            for start in range(0, len(order), rows):
                some = table.take(pa.array(order[start : start + rows]))
                writer.write_table(some.cast(marked), row_group_size=rows)
        return {"rows": len(order), "bytes": table.nbytes}

    def _of(self, file: int, part: int) -> Iterator[pa.RecordBatch]:
        path = self.job.store.at(*self.job.place("split", file))
        with self.job.store.filesystem.open_input_file(path) as source:
            opened = pa.ipc.open_file(source)
            for number in range(part, opened.num_record_batches, self.job.partitions):
                batch = opened.get_batch(number)
                if batch.num_rows:
                    yield batch.replace_schema_metadata(None)
