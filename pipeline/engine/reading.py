"""From references to batches: the rows of one shard, source and derived columns side by side, in row order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.chat import TYPES, Chat
from pipeline.corpus.images import NULL_IMAGE, ImageColumn
from pipeline.corpus.shards import BATCH_BYTES, Shard, read_source
from pipeline.corpus.storage import Store
from pipeline.corpus.tar import FAULT
from pipeline.corpus.text import clean_text
from pipeline.engine.parts import part_name
from pipeline.errors import CorpusError

REASON = "source.reason"
"""Column of a batch that says why a row of the source is unusable; only there when `text`, `image` or `id` is read."""


@dataclass(frozen=True)
class Layout:
    """Where the values behind references are: the run's columns and the names of the source's columns."""

    store: Store
    text: str | None
    id: str | None
    chat: Chat | None = None
    image: ImageColumn | None = None

    def source_columns(self, reference: str) -> tuple[str, ...]:
        """Names of the source's columns that a reference is made of; none for a derived column."""
        if self.chat is not None and reference in self.chat.references:
            return self.chat.columns
        if reference in TYPES:
            if reference != "text" or self.text is None:
                raise CorpusError(f"a recipe reads `{reference}`, which this corpus does not have")
            return (self.text,)
        if reference == "id":
            if self.id is None:
                raise CorpusError("a recipe reads `id`, but corpus.id names no column")
            return (self.id,)
        if reference == "image":
            if self.image is None:
                raise CorpusError("a recipe reads `image`, but corpus.image names no column")
            return (self.image.name,)
        return (reference.removeprefix("corpus."),) if reference.startswith("corpus.") else ()

    @property
    def spoken(self) -> tuple[str, ...]:
        """What a language model reads of a row: `text`, and in a corpus of instructions what of it is to be learnt."""
        return self.chat.references if self.chat is not None else ("text",)


def read_shard(layout: Layout, shard: Shard, references: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches whose columns are named by their references. Unusable texts and ids are null, with `source.reason`.

    Where batches end depends on the files and `batch_rows` alone. Raises CorpusError.
    """
    source = {r: made_of for r in references if (made_of := layout.source_columns(r))}
    derived: dict[str, list[str]] = {}
    for reference in references:
        if reference not in source and not reference.startswith("address."):
            column, _, field = reference.partition(".")
            derived.setdefault(column, []).append(field)
    streams = [_derived_batches(layout.store, shard, column, fields, batch_rows) for column, fields in derived.items()]
    if source:
        streams.append(_source_batches(layout, shard, source, batch_rows))
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


def _source_batches(
    layout: Layout, shard: Shard, names: dict[str, tuple[str, ...]], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    wanted = sorted({name for of_reference in names.values() for name in of_reference})
    images = layout.image if layout.image is not None and layout.image.name in wanted else None
    wanted += [FAULT] if images or any(piece.tar for piece in shard.pieces) else []
    for batch in _coalesced(read_source(shard, wanted, batch_rows, images), batch_rows):
        rendered = layout.chat is not None and not TYPES.keys().isdisjoint(names)
        columns = {r: batch.column(of[0]) for r, of in names.items() if not (rendered and r in TYPES)}
        reasons = pa.nulls(batch.num_rows, pa.string())
        if "id" in columns and columns["id"].null_count:
            reasons = pc.if_else(pc.is_null(columns["id"]), "null id", reasons)
        if layout.chat is not None and rendered:
            found = layout.chat.render({name: batch.column(name) for name in layout.chat.columns})
            columns = {r: getattr(found, r) if r in TYPES else columns[r] for r in names}
            reasons = pc.coalesce(found.reasons, reasons)
        elif "text" in columns:
            columns["text"], why = clean_text(columns["text"])
            reasons = reasons if why is None else pc.coalesce(why, reasons)
        if rendered or not columns.keys().isdisjoint(("text", "id", "image")):
            pairs = {"text", "image"} <= columns.keys()
            columns[REASON] = _with_faults(batch.column(FAULT), reasons, pairs) if FAULT in wanted else reasons
        yield pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def _with_faults(faults: pa.Array, reasons: pa.Array, pairs: bool) -> pa.Array:
    """Why rows are unusable: what the source says of them or of their images, else what there was already."""
    if pairs:
        alone = pc.and_(pc.equal(faults, NULL_IMAGE), reasons.is_null())
        faults = pc.if_else(pc.fill_null(alone, False), "caption without image", faults)
        reasons = pc.if_else(pc.fill_null(pc.equal(reasons, "null text"), False), "image without caption", reasons)
    return pc.coalesce(faults, reasons)


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
