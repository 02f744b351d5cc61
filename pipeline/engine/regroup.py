"""`regroup`: rows with the same key together, and what is found about them back at their addresses as a column.

Three rounds of tasks through part files, each resumable: `split` sorts a shard's thin rows into partitions by a hash of
their key, `gather` brings one partition of all shards to one worker, sorts it by key and applies the function, and
`scatter` carries the results home, shard by shard. A split file holds a row group a partition, so a partition is read
without its neighbours. All rows of one key meet in one worker; thin tables only, never the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.shards import Shard
from pipeline.corpus.storage import Store
from pipeline.engine.materialize import Plan, valid_rows
from pipeline.engine.parts import FINGERPRINT, PartWriter, part_name, stale
from pipeline.engine.reading import Layout, read_shard
from pipeline.hashing import KEY, mix64

SHARD, ROW = "address.shard", "address.row"
PARTITION_BYTES = 128 << 20
"""Bytes of thin rows that one gather aims to hold."""

Reduce = Callable[[pa.Table], pa.Table]
"""Rows of one partition, sorted by (key, address), to a table with `address.shard`, `address.row` and the values."""


@dataclass(frozen=True)
class Regroup:
    """One regrouping: which inputs travel, by which key, through how many partitions, and what is made of them."""

    store: Store
    name: str
    inputs: tuple[str, ...]
    key: str
    reduce: Reduce
    partitions: int
    fingerprint: str

    def place(self, round_: str) -> tuple[str, ...]:
        return ("scratch", "regroup", self.name, round_)


def key_groups(table: pa.Table, key: str) -> Iterator[pa.Table]:
    """The runs of equal keys of a sorted table, in order, without copying."""
    values = table[key].combine_chunks()
    if table.num_rows == 0:
        return
    edges = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1)).to_numpy(zero_copy_only=False)
    starts = [0, *(np.flatnonzero(edges) + 1).tolist(), len(values)]
    for start, end in zip(starts, starts[1:], strict=False):
        yield table.slice(start, end - start)


def partition_of(keys: pa.Array, partitions: int) -> np.ndarray:
    """Partition of every key: integers and 16-byte keys; shape (n,)."""
    if keys.type == KEY:
        numbers = np.frombuffer(keys.buffers()[1], "<u8").reshape(-1, 2)[keys.offset : keys.offset + len(keys), 0]
    else:
        numbers = keys.cast(pa.uint64(), safe=False).to_numpy()
    return np.asarray(mix64(numbers) % np.uint64(partitions), np.int64)


@dataclass
class SplitTask:
    layout: Layout
    job: Regroup

    def __call__(self, shard: Shard, attempt: int) -> dict[str, Any]:
        references = list(dict.fromkeys([*self.job.inputs, self.job.key, SHARD, ROW]))
        batches = []
        for batch in read_shard(self.layout, shard, references, 1 << 16):
            usable = valid_rows(batch, references)
            batches.append(
                batch.select(references) if usable is None else batch.select(references).filter(pa.array(usable))
            )
        table = pa.Table.from_batches(batches)
        keys = table[self.job.key].combine_chunks()
        write_grouped(self.job, "split", shard.index, table, partition_of(keys, self.job.partitions), shard.fingerprint)
        return {"rows": table.num_rows, "bytes": table.nbytes}


@dataclass
class GatherTask:
    job: Regroup
    shards: tuple[int, ...]

    def __call__(self, partition: int, attempt: int) -> dict[str, Any]:
        found = [t for s in self.shards if (t := read_grouped(self.job, "split", s, partition)) is not None]
        if found:
            table = pa.concat_tables(found)
            table = self.job.reduce(
                table.sort_by([(self.job.key, "ascending"), (SHARD, "ascending"), (ROW, "ascending")])
            )
            table = table.sort_by([(SHARD, "ascending"), (ROW, "ascending")])
            write_grouped(self.job, "gather", partition, table, table[SHARD].to_numpy())
        else:
            write_grouped(
                self.job, "gather", partition, pa.table({SHARD: pa.array([], pa.int32())}), np.array([], np.int64)
            )
        return {"rows": sum(t.num_rows for t in found), "bytes": sum(t.nbytes for t in found)}


@dataclass
class ScatterTask:
    job: Regroup
    plan: Plan

    def __call__(self, shard: Shard, attempt: int) -> dict[str, Any]:
        fields = self.plan.column.fields
        tables = [
            t for p in range(self.job.partitions) if (t := read_grouped(self.job, "gather", p, shard.index)) is not None
        ]
        where = np.full(shard.rows, -1)
        columns = [pa.nulls(shard.rows, f.type) for f in fields]
        if tables:
            table = pa.concat_tables(tables)
            where[table[ROW].to_numpy()] = np.arange(table.num_rows)
            at = pa.array(where, mask=where < 0)
            columns = [table[f.name].combine_chunks().cast(f.type).take(at) for f in fields]
        batch = pa.RecordBatch.from_arrays(columns, schema=fields)
        with self.job.store.sink("columns", self.plan.column.name, part_name(shard.index)) as sink:
            with PartWriter(sink, fields, self.plan.part(shard)) as writer:
                writer.write(batch)
        return {"rows": shard.rows, "bytes": batch.nbytes}


def write_grouped(job: Regroup, round_: str, number: int, table: pa.Table, groups: np.ndarray, salt: str = "") -> None:
    """A file with one row group a group that occurs; which is which stands in the footer."""
    order = np.argsort(groups, kind="stable")
    table, groups = table.take(pa.array(order)), groups[order]
    edges = np.flatnonzero(np.diff(groups, prepend=-1))
    metadata = {
        FINGERPRINT: (job.fingerprint + salt).encode(),
        b"tamis.groups": ",".join(map(str, groups[edges].tolist())).encode(),
    }
    with job.store.sink(*job.place(round_), part_name(number)) as sink:
        schema = table.schema.with_metadata(metadata)
        with pq.ParquetWriter(sink, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
            for start, end in zip(edges, [*edges[1:], len(groups)], strict=True):
                writer.write_table(table.slice(start, end - start).cast(schema), row_group_size=int(end - start))


def read_grouped(job: Regroup, round_: str, number: int, group: int) -> pa.Table | None:
    """Rows of one group of a file; None where it has none."""
    with job.store.filesystem.open_input_file(job.store.at(*job.place(round_), part_name(number))) as source:
        file = pq.ParquetFile(source)
        groups = [int(g) for g in file.metadata.metadata[b"tamis.groups"].decode().split(",") if g]
        if group not in groups:
            return None
        return file.read_row_group(groups.index(group), use_threads=False).replace_schema_metadata(None)


def missing_parts(job: Regroup, round_: str, wanted: dict[int, str]) -> list[int]:
    return stale(job.store, job.place(round_), wanted)
