"""`regroup`: rows with the same key together, and what is found about them back at their addresses as a column.

Three rounds of tasks through files in the run's scratch, each resumable: `split` sorts the thin rows of some shards
into partitions by a hash of their key, `gather` brings one partition of all shards to one worker, sorts it by key and
applies the function, and `scatter` carries the results home. Shards go through split and scatter in blocks, so that
there are not shards x partitions files, and a file is Arrow's own, whose n-th batch is the n-th group: a group is read
without its neighbours, and where the run is on a local disk it is mapped, not copied. All rows of one key meet in one
worker, which therefore has to hold them: about three times what they weigh, one of it in the page cache, and what
`reduce` adds (bench/dedup.py). Thin tables, therefore, and never the text; the exception are the vectors of one concept
(`pipeline.scores.semantic_duplicates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.shards import Shard
from pipeline.corpus.storage import Store
from pipeline.engine.materialize import Plan, valid_rows
from pipeline.engine.parts import FINGERPRINT, part_name, write_part
from pipeline.engine.reading import Layout, read_shard
from pipeline.errors import TamisError
from pipeline.hashing import KEY, mix64
from pipeline.recipe import Transform

SHARD, ROW = "address.shard", "address.row"
PARTITION_BYTES = 128 << 20
"""Bytes of thin rows that one gather aims to hold."""
BLOCK_ROWS = 1 << 22
BLOCK_BYTES = 256 << 20
"""Rows and bytes of the consecutive shards that one split or scatter holds, a single shard excepted."""
BATCH_ROWS = 1 << 16

Reduce = Callable[[pa.Table], pa.Table]
"""Rows of one partition, sorted by (key, address), to a table with `address.shard`, `address.row` and the values."""

Block = tuple[int, tuple[Shard, ...]]
"""Number and shards: consecutive ones."""


@dataclass(frozen=True)
class Regroup:
    """One regrouping: which inputs travel, by which key, and through how many partitions."""

    store: Store
    name: str
    inputs: tuple[str, ...]
    key: str
    partitions: int
    blocks: tuple[Block, ...]
    fingerprint: str

    def place(self, round_: str, number: int) -> tuple[str, ...]:
        return ("scratch", "regroup", self.name, round_, f"{number:05d}.arrow")

    @property
    def block_of(self) -> np.ndarray:
        """Number of the block that holds a shard, by the shard's index; int64."""
        numbers = np.zeros(1 + max(s.index for _, shards in self.blocks for s in shards), np.int64)
        for number, shards in self.blocks:
            numbers[[s.index for s in shards]] = number
        return numbers

    def unfinished(self, round_: str, count: int) -> list[int]:
        """Which files of a round are not there, or of another time."""
        return [i for i in range(count) if read_mark(self.store, *self.place(round_, i)) != self.fingerprint]


def unopened() -> Transform:
    """`open` of a column that is filled by regrouping."""
    raise TamisError("the column depends on other rows: it is filled by regrouping, not row by row")


def blocks_of(shards: Sequence[Shard], row_bytes: int) -> tuple[Block, ...]:
    """Cut shards into blocks of at most `BLOCK_ROWS` rows or `BLOCK_BYTES`, where a row takes `row_bytes`."""
    blocks: list[list[Shard]] = []
    most = rows = min(BLOCK_ROWS, BLOCK_BYTES // row_bytes)
    for shard in shards:
        if rows + shard.rows > most:
            blocks.append([])
            rows = 0
        blocks[-1].append(shard)
        rows += shard.rows
    return tuple((number, tuple(block)) for number, block in enumerate(blocks))


def key_groups(table: pa.Table, key: str) -> Iterator[pa.Table]:
    """The runs of equal keys of a sorted table, in order, without copying."""
    values = table[key].combine_chunks()
    if not len(values):
        return
    edges = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1)).to_numpy(zero_copy_only=False)
    for start, end in pairwise([0, *(np.flatnonzero(edges) + 1).tolist(), len(values)]):
        yield table.slice(start, end - start)


def check_key(name: str, kind: pa.DataType) -> None:
    """Raise TamisError for a type by which rows cannot be regrouped."""
    if not (pa.types.is_integer(kind) or kind == KEY):
        raise TamisError(f"rows cannot be regrouped by {name}, which is {kind}: it takes integers or row.key")


def partition_of(keys: pa.Array, partitions: int) -> np.ndarray:
    """Partition of every key: integers and 16-byte keys; shape (n,)."""
    if keys.type == KEY:
        numbers = np.frombuffer(keys.buffers()[1], "<u8").reshape(-1, 2)[keys.offset : keys.offset + len(keys), 0]
    else:
        numbers = keys.to_numpy(zero_copy_only=False).astype(np.uint64)
    return np.asarray(mix64(numbers) % np.uint64(partitions), np.int64)


def read_block(layout: Layout, shards: Sequence[Shard], references: Sequence[str]) -> pa.Table:
    """The rows of some shards that have all of some values, in one chunk."""
    batches = []
    for shard in shards:
        for batch in read_shard(layout, shard, references, BATCH_ROWS):
            usable = valid_rows(batch, references)
            batch = batch.select(references)
            batches.append(batch if usable is None else batch.filter(pa.array(usable)))
    return pa.Table.from_batches(batches).combine_chunks()


@dataclass
class SplitTask:
    layout: Layout
    job: Regroup

    def __call__(self, block: Block, attempt: int) -> dict[str, Any]:
        number, shards = block
        references = list(dict.fromkeys([*self.job.inputs, self.job.key, SHARD, ROW]))
        table = read_block(self.layout, shards, references)
        groups = partition_of(_single(table[self.job.key]), self.job.partitions)
        write_groups(self.job, "split", number, table, groups, self.job.partitions)
        return {"rows": table.num_rows, "bytes": table.nbytes}


@dataclass
class GatherTask:
    job: Regroup
    reduce: Reduce

    def __call__(self, partition: int, attempt: int) -> dict[str, Any]:
        job = self.job
        table = pa.Table.from_batches([read_group(job, "split", number, partition) for number, _ in job.blocks])
        table = table.sort_by([(job.key, "ascending"), (SHARD, "ascending"), (ROW, "ascending")])
        found = self.reduce(table).sort_by([(SHARD, "ascending"), (ROW, "ascending")])
        write_groups(job, "gather", partition, found, job.block_of[found[SHARD].to_numpy()], len(job.blocks))
        return {"rows": table.num_rows, "bytes": table.nbytes}


@dataclass
class ScatterTask:
    job: Regroup
    plan: Plan

    def __call__(self, block: Block, attempt: int) -> dict[str, Any]:
        number, shards = block
        fields = self.plan.column.fields
        found = pa.Table.from_batches(
            [read_group(self.job, "gather", p, number) for p in range(self.job.partitions)]
        ).combine_chunks()
        homes, rows = found[SHARD].to_numpy(), found[ROW].to_numpy()
        for shard in shards:
            here = np.flatnonzero(homes == shard.index)
            where = np.full(shard.rows, -1)
            where[rows[here]] = here
            at = pa.array(where, mask=where < 0)
            values = [_single(found[f.name]).cast(f.type).take(at) for f in fields]
            table = pa.Table.from_arrays(values, schema=fields)
            write_part(
                self.job.store, ("columns", self.plan.column.name, part_name(shard.index)), table, self.plan.part(shard)
            )
        return {"rows": sum(s.rows for s in shards), "bytes": found.nbytes}


def write_groups(job: Regroup, round_: str, number: int, table: pa.Table, groups: np.ndarray, count: int) -> None:
    """An Arrow file of `count` batches: the n-th holds the rows whose group is n, in their order."""
    order = np.argsort(groups, kind="stable")
    edges = np.searchsorted(groups[order], np.arange(count + 1))
    table = table.take(pa.array(order)).combine_chunks()
    batch = table.to_batches()[0] if table.num_rows else pa.RecordBatch.from_pylist([], schema=table.schema)
    schema = table.schema.with_metadata({FINGERPRINT: job.fingerprint.encode()})
    with job.store.sink(*job.place(round_, number)) as sink, pa.ipc.new_file(sink, schema) as writer:
        for start, end in pairwise(edges.tolist()):
            writer.write_batch(batch.slice(start, end - start))


def read_group(job: Regroup, round_: str, number: int, group: int) -> pa.RecordBatch:
    path = job.store.at(*job.place(round_, number))
    with pa.memory_map(path) if job.store.local else job.store.filesystem.open_input_file(path) as source:
        return pa.ipc.open_file(source).get_batch(group).replace_schema_metadata(None)


def read_mark(store: Store, *names: str) -> str | None:
    """Fingerprint of a file of groups; None where there is none or it is not whole."""
    try:
        with store.filesystem.open_input_file(store.at(*names)) as source:
            return str(pa.ipc.open_file(source).schema.metadata[FINGERPRINT].decode())
    except (OSError, pa.ArrowException):
        return None


def _single(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
