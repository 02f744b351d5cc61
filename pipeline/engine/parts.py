"""Parts: the Parquet files of a column, one a shard, in the shard's row order, whole or absent.

A part's footer carries its fingerprint, so a part either is exactly what is wanted or is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.storage import Store

FINGERPRINT = b"tamis.fingerprint"
QUARANTINED = "tamis.quarantined"
GROUP_BYTES = 32 << 20
GROUP_ROWS = 1 << 17
READERS = 16


def part_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


class PartWriter:
    """Collects batches into row groups of 32 MB or 131,072 rows, so that tiny batches do not make tiny row groups.

    Numbers are stored as they are (a score or a vector does not compress, and reading it back is a copy); strings are
    dictionary-encoded and compressed. `quarantined`, set before the end, is noted in the footer.
    """

    def __init__(self, sink: Any, schema: pa.Schema, fingerprint: str) -> None:
        text = [f.name for f in schema if _is_texty(f.type)]
        self.schema = schema.with_metadata({FINGERPRINT: fingerprint.encode()})
        self.writer = pq.ParquetWriter(
            sink,
            self.schema,
            compression={f.name: "zstd" if f.name in text else "none" for f in schema},
            use_dictionary=text,
            write_statistics=False,
        )
        self.pending: list[pa.RecordBatch] = []
        self.rows = self.bytes = self.quarantined = 0

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
            if self.quarantined:
                self.writer.add_key_value_metadata({QUARANTINED: str(self.quarantined)})
            self.writer.close()
        self.writer.is_open = False  # after an error the sink is gone: collecting this must not write a footer


def _is_texty(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_dictionary, pa.types.is_string, pa.types.is_large_string))


def write_part(store: Store, names: Sequence[str], table: pa.Table, fingerprint: str) -> None:
    """Write a table that is held in memory as one part."""
    with store.sink(*names) as sink:
        with PartWriter(sink, table.schema, fingerprint) as writer:
            for batch in table.to_batches():
                writer.write(batch)


@dataclass(frozen=True)
class PartInfo:
    """What a part's footer says."""

    fingerprint: str
    rows: int
    quarantined: int


def part_info(store: Store, *names: str) -> PartInfo | None:
    """None where there is no such part or it is not whole."""
    try:
        with store.filesystem.open_input_file(store.at(*names)) as source:
            footer = pq.read_metadata(source)
    except (OSError, pa.ArrowException):
        return None
    notes = footer.metadata or {}
    if FINGERPRINT not in notes:
        return None
    return PartInfo(notes[FINGERPRINT].decode(), footer.num_rows, int(notes.get(QUARANTINED.encode(), b"0")))


def part_fingerprint(store: Store, *names: str) -> str | None:
    """Fingerprint in a part's footer; None where there is no such part or it is not whole."""
    info = part_info(store, *names)
    return info.fingerprint if info else None


def survey(store: Store, directory: Sequence[str], wanted: dict[int, tuple[str, int]]) -> tuple[list[int], int]:
    """Which parts of a directory are missing or not true, and how many rows the true ones left in quarantine.

    `wanted`: the fingerprint and the number of rows of every shard's part.
    """
    there = store.files(*directory)
    candidates = [i for i in wanted if part_name(i) in there]
    with ThreadPoolExecutor(READERS) as threads:
        infos = threads.map(lambda i: part_info(store, *directory, part_name(i)), candidates)
        true = {
            i: info
            for i, info in zip(candidates, infos, strict=True)
            if info is not None and (info.fingerprint, info.rows) == wanted[i]
        }
    return [i for i in wanted if i not in true], sum(info.quarantined for info in true.values())
