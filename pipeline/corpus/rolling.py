"""Parquet files of one input, rolled at a chosen size: `<name>-00000.parquet`, `<name>-00001.parquet`, ...

Each appears whole; every footer carries the input's fingerprint, and the last one's says that it is the last and what
the input gave, so an input counts as done only when all its parts are there and true. On an error none is left.
"""

from __future__ import annotations

import contextlib
import json
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.storage import Store

FOOTER = b"tamis.ingest"
UNIQUE = ("id", "text", "raw")
"""Columns for which a dictionary is wasted work."""


class RollingParts:
    """Writes tables as row groups of about `group_bytes` (uncompressed) in files of about `file_bytes` (compressed)."""

    def __init__(
        self, store: Store, name: str, schema: pa.Schema, identity: str, file_bytes: int, group_bytes: int
    ) -> None:
        self.store, self.name, self.schema, self.identity = store, name, schema, identity
        self.file_bytes, self.group_bytes = file_bytes, group_bytes
        self.count = 0
        """Files so far."""
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._open: contextlib.ExitStack | None = None
        self._sink: Any = None
        self._writer: Any = None

    def add(self, table: pa.Table) -> None:
        rows = max(1, table.num_rows * self.group_bytes // max(table.nbytes, 1))
        for start in range(0, table.num_rows, rows):
            piece = table.slice(start, rows)
            self._held.append(piece)
            self._held_bytes += piece.nbytes
            if self._held_bytes >= self.group_bytes:
                self._flush()

    def _flush(self) -> None:
        """Write what is held as one row group, in a new file where the last one is full."""
        if self._open is not None and self._sink.tell() >= self.file_bytes:
            self._close({"last": False})
        if self._open is None:
            self._open = contextlib.ExitStack()
            self._sink = self._open.enter_context(self.store.sink(part_name(self.name, self.count)))
            self._writer = self._open.enter_context(
                pq.ParquetWriter(
                    self._sink,
                    self.schema,
                    compression="zstd",
                    use_dictionary=[name for name in self.schema.names if name not in UNIQUE],
                )
            )
            self.count += 1
        if self._held:
            self._writer.write_table(pa.concat_tables(self._held), row_group_size=sum(t.num_rows for t in self._held))
        self._held, self._held_bytes = [], 0

    def _close(self, note: dict[str, Any]) -> None:
        assert self._open is not None
        self._writer.add_key_value_metadata({FOOTER: json.dumps({"fingerprint": self.identity, **note})})
        self._open.close()
        self._open = None

    def finish(self, summary: dict[str, Any], keep_empty: bool) -> None:
        """Publish the last part; without rows there is one empty part, or none."""
        if self._held or (keep_empty and not self.count):
            self._flush()
        if self._open is not None:
            self._close({"last": True, "summary": {**summary, "parts": self.count}})
        remove_parts(self.store, self.name, self.count)  # of an earlier, longer output

    def __enter__(self) -> RollingParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._open is not None:
                with contextlib.suppress(Exception):  # the error under way is the one to report
                    self._open.__exit__(kind, error, trace)
            remove_parts(self.store, self.name)


def part_name(name: str, number: int) -> str:
    return f"{name}-{number:05d}.parquet"


def remove_parts(store: Store, name: str, first: int = 0) -> None:
    """Remove the parts of an input from a number on; they are always numbered without gaps."""
    while store.exists(part_name(name, first)):
        store.remove(part_name(name, first))
        first += 1


def finished_summary(store: Store, name: str, identity: str) -> dict[str, Any] | None:
    """Summary of an input whose parts are all there with this fingerprint, else None."""
    number = 0
    while True:
        try:
            with store.filesystem.open_input_file(store.at(part_name(name, number))) as file:
                note = json.loads((pq.read_metadata(file).metadata or {}).get(FOOTER, b"{}"))
        except (OSError, pa.ArrowInvalid):
            return None
        if note.get("fingerprint") != identity:
            return None
        if note["last"]:
            summary: dict[str, Any] = note["summary"]
            return summary
        number += 1
