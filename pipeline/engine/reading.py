"""From references to batches: the rows of one shard, source and derived columns side by side, in row order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.shards import BATCH_BYTES, Shard, read_source
from pipeline.corpus.storage import Store
from pipeline.corpus.text import clean_text
from pipeline.engine.parts import part_name
from pipeline.errors import CorpusError

REASON = "source.reason"
"""Column of a batch that says why a row of the source is not usable; only there when `text` or `id` is read."""


@dataclass(frozen=True)
class Layout:
    """Where the values behind references are: the run's columns and the names of the source's columns."""

    store: Store
    text: str
    id: str | None

    def source_column(self, reference: str) -> str | None:
        """Name in the source of a reference; None for a derived column."""
        if reference == "text":
            return self.text
        if reference == "id":
            if self.id is None:
                raise CorpusError("a recipe reads `id`, but corpus.id names no column")
            return self.id
        return reference.removeprefix("corpus.") if reference.startswith("corpus.") else None


def read_shard(layout: Layout, shard: Shard, references: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches whose columns are named by their references. Unusable texts and ids are null, with `source.reason`.

    Where batches end depends on the files and `batch_rows` alone. Raises CorpusError.
    """
    source = {r: name for r in references if (name := layout.source_column(r)) is not None}
    derived: dict[str, list[str]] = {}
    for reference in references:
        if reference not in source and not reference.startswith("address."):
            column, _, field = reference.partition(".")
            derived.setdefault(column, []).append(field)
    streams = [_derived_batches(layout.store, shard, column, fields, batch_rows) for column, fields in derived.items()]
    if source:
        streams.append(_source_batches(shard, source, batch_rows))
    if not streams:  # only addresses are wanted
        streams.append(_counted(shard.rows, batch_rows))
    row = 0
    for batches in _aligned(streams, shard):
        columns = {name: b.column(i) for b in batches for i, name in enumerate(b.schema.names)}
        n = batches[0].num_rows
        if "address.row" in references:
            columns["address.row"] = pa.array(np.arange(row, row + n, dtype=np.int64))
        if "address.shard" in references:
            columns["address.shard"] = pa.array(np.full(n, shard.index, np.int32))
        row += n
        names = [*references, *([REASON] if REASON in columns else [])]
        yield pa.RecordBatch.from_arrays([columns[c] for c in names], names)
    if row != shard.rows:
        raise CorpusError(f"shard {shard.index} has {row} rows, {shard.rows} were listed: run again with --refresh")


def _source_batches(shard: Shard, names: dict[str, str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    for batch in _coalesced(read_source(shard, sorted(set(names.values())), batch_rows), batch_rows):
        columns = {reference: batch.column(name) for reference, name in names.items()}
        reasons = pa.nulls(batch.num_rows, pa.string())
        if "id" in columns and columns["id"].null_count:
            reasons = pc.if_else(pc.is_null(columns["id"]), "null id", reasons)
        if "text" in columns:
            columns["text"], why = clean_text(columns["text"])
            reasons = reasons if why is None else pc.coalesce(why, reasons)
        if "text" in columns or "id" in columns:
            columns[REASON] = reasons
        yield pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def _derived_batches(
    store: Store, shard: Shard, column: str, fields: list[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    path = store.at("columns", column, part_name(shard.index))
    try:
        with store.filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source, pre_buffer=not store.local)
            for batch in file.iter_batches(batch_rows, columns=fields, use_threads=False):
                yield pa.RecordBatch.from_arrays([batch.column(f) for f in fields], [f"{column}.{f}" for f in fields])
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: {error}; delete it and run again") from error


def _counted(total: int, rows: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, total, rows):
        yield pa.RecordBatch.from_arrays([pa.nulls(min(rows, total - start))], ["nothing"])


def _coalesced(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Join small batches (tiny files, ends of row groups) up to `rows` rows or 64 MiB."""
    held: list[pa.RecordBatch] = []
    count = size = 0
    for batch in batches:
        # Files of one corpus may differ in what may be null, which is part of a schema but not of a value.
        batch = pa.RecordBatch.from_arrays(batch.columns, batch.schema.names)
        if held and (count + batch.num_rows > rows or size + batch.nbytes > BATCH_BYTES):
            yield pa.concat_batches(held) if len(held) > 1 else held[0]
            held, count, size = [], 0, 0
        held.append(batch)
        count, size = count + batch.num_rows, size + batch.nbytes
    if held:
        yield pa.concat_batches(held) if len(held) > 1 else held[0]


def _aligned(streams: list[Iterator[pa.RecordBatch]], shard: Shard) -> Iterator[list[pa.RecordBatch]]:
    """Walk streams of different batch lengths in step."""
    heads = [_next(stream) for stream in streams]
    while any(heads):
        if not all(heads):
            raise CorpusError(f"shard {shard.index}: its columns differ in length: run again with --refresh")
        n = min(len(head) for head in heads)
        yield [head.slice(0, n) for head in heads]
        heads = [h.slice(n) if n < len(h) else _next(s) for h, s in zip(heads, streams, strict=True)]


def _next(stream: Iterator[pa.RecordBatch]) -> pa.RecordBatch:
    """The next batch with rows; an empty list at the end."""
    return next((batch for batch in stream if len(batch)), [])
