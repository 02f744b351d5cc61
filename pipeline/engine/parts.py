"""Parts: the Parquet files of a column, one a shard, in the shard's row order, whole or absent.

A part's footer carries its fingerprint, so a part either is exactly what is wanted or is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.storage import Store

FINGERPRINT = b"tamis.fingerprint"
GROUP_BYTES = 32 << 20
GROUP_ROWS = 1 << 17


def part_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


class PartWriter:
    """Collects batches into row groups of 32 MB or 131,072 rows, so that tiny batches do not make tiny row groups.

    Numbers are stored as they are (a score or a vector does not compress, and reading it back is a copy); strings are
    dictionary-encoded and compressed.
    """

    def __init__(self, sink: Any, schema: pa.Schema, fingerprint: str, compression: str | dict[str, str] | None = None) -> None:
        text = [f.name for f in schema if _is_texty(f.type)]
        self.schema = schema.with_metadata({FINGERPRINT: fingerprint.encode()})
        self.writer = pq.ParquetWriter(
            sink,
            self.schema,
            compression=compression or {f.name: "zstd" if f.name in text else "none" for f in schema},
            use_dictionary=text,
            write_statistics=False,
            store_schema=True,
        )
        self.pending: list[pa.RecordBatch] = []
        self.rows = self.bytes = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self.pending.append(batch)
        self.rows += batch.num_rows
        self.bytes += batch.nbytes
        if self.rows >= GROUP_ROWS or self.bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            table = pa.Table.from_batches(self.pending).replace_schema_metadata(self.schema.metadata)
            self.writer.write_table(table.cast(self.schema), row_group_size=self.rows)
        self.pending, self.rows, self.bytes = [], 0, 0

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._flush()
            self.writer.close()
        self.writer.is_open = False  # after an error the sink is gone: no footer is to be written when this is collected


def _is_texty(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def write_part(store: Store, names: Sequence[str], table: pa.Table, fingerprint: str) -> None:
    """Write a small table as one part."""
    with store.sink(*names) as sink:
        with PartWriter(sink, table.schema, fingerprint) as writer:
            for batch in table.to_batches():
                writer.write(batch)


def part_fingerprint(store: Store, *names: str) -> str | None:
    """Fingerprint in a part's footer; None where there is no such part or it is not whole."""
    try:
        with store.filesystem.open_input_file(store.at(*names)) as source:
            metadata = pq.read_metadata(source).metadata or {}
    except (FileNotFoundError, OSError, pa.ArrowException):
        return None
    found = metadata.get(FINGERPRINT)
    return found.decode() if found else None


def stale(store: Store, directory: Sequence[str], wanted: dict[int, str]) -> list[int]:
    """Shards (keys of `wanted`) whose part in a directory is missing or is not of the wanted fingerprint."""
    there = store.files(*directory)
    candidates = [i for i in wanted if part_name(i) in there]
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(candidates, pool.map(lambda i: part_fingerprint(store, *directory, part_name(i)), candidates), strict=True))
    return [i for i, fingerprint in wanted.items() if found.get(i) != fingerprint]
