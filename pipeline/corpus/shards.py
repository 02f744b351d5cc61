"""The unit of work: a shard is a row-group range of one file, or several small files together.

Rows keep their order. A shard's fingerprint is made of its files' identities, so it says whether a part computed from
it is still true. Cutting depends on the corpus alone, never on the workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.storage import resolve
from pipeline.errors import CorpusError
from pipeline.recipe import fingerprint

MIB = 1 << 20
BATCH_BYTES = 64 * MIB
"""Decoded bytes that one batch may hold: rows of 20 MB come three at a time."""


@dataclass(frozen=True)
class Piece:
    """Consecutive row groups of one file; `rows` counts the rows of each."""

    uri: str
    size: int
    identity: str
    first_group: int
    rows: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Shard:
    index: int
    pieces: tuple[Piece, ...]

    @cached_property
    def rows(self) -> int:
        return sum(sum(p.rows) for p in self.pieces)

    @cached_property
    def bytes(self) -> int:
        """Compressed bytes in the source."""
        return sum(p.bytes for p in self.pieces)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([(p.identity, p.first_group, len(p.rows)) for p in self.pieces])

    def locate(self, rows: np.ndarray) -> pa.Table:
        """Addresses (file, row_group, row) of rows given by their index in the shard; shape (n,) each."""
        uris = [p.uri for p in self.pieces for _ in p.rows]
        groups = [p.first_group + g for p in self.pieces for g in range(len(p.rows))]
        starts = np.concatenate([[0], np.cumsum([n for p in self.pieces for n in p.rows])])
        at = np.searchsorted(starts, rows, side="right") - 1
        return pa.table(
            {
                "file": pa.array(uris, pa.string()).take(pa.array(at)),
                "row_group": pa.array(np.array(groups, np.int32)[at]),
                "row": pa.array(rows - starts[at]),
            }
        )


def default_shard_bytes(listing: pa.Table) -> int:
    """Compressed bytes a shard aims at: a 32nd of the corpus, at least 1 MiB, at most 64 MiB.

    Large corpora thus get shards of 64 MiB (their own row groups allowing), small ones still enough shards to share.
    """
    total = sum(sum(b) for b in listing["bytes"].to_pylist() if b)
    return int(min(max(total // 32, MIB), 64 * MIB))


def plan_shards(listing: pa.Table, shard_bytes: int) -> list[Shard]:
    """Cut the readable files into shards of about `shard_bytes` compressed bytes, at row-group boundaries."""
    shards: list[Shard] = []
    pending: list[Piece] = []
    pending_bytes = 0

    def close() -> None:
        nonlocal pending, pending_bytes
        if pending:
            shards.append(Shard(len(shards), tuple(pending)))
        pending, pending_bytes = [], 0

    for file in listing.to_pylist():
        if file["error"] is not None:
            continue
        first = 0
        held: list[int] = []
        held_bytes = 0
        for group, (rows, size) in enumerate(zip(file["rows"], file["bytes"], strict=True)):
            if held and pending_bytes + held_bytes + size > shard_bytes:
                pending.append(Piece(file["uri"], file["size"], file["identity"], first, tuple(held), held_bytes))
                close()
                first, held, held_bytes = group, [], 0
            elif pending and pending_bytes + held_bytes + size > shard_bytes:
                close()
            held.append(rows)
            held_bytes += size
        if held and sum(held):
            pending.append(Piece(file["uri"], file["size"], file["identity"], first, tuple(held), held_bytes))
            pending_bytes += held_bytes
    close()
    return shards


def read_source(shard: Shard, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Source columns of a shard, in row order, in batches of at most `batch_rows` rows and about 64 MiB.

    Raises CorpusError for a file that is no longer the one that was listed.
    """
    for piece in shard.pieces:
        filesystem, path = resolve(piece.uri)
        try:
            with filesystem.open_input_file(path) as source:
                if source.size() != piece.size:
                    raise CorpusError(f"{piece.uri} has changed since it was listed: run again with --refresh")
                file = pq.ParquetFile(source, pre_buffer=True)
                groups = range(piece.first_group, piece.first_group + len(piece.rows))
                decoded = sum(file.metadata.row_group(g).total_byte_size for g in groups)
                rows = max(1, min(batch_rows, BATCH_BYTES * sum(piece.rows) // max(decoded, 1)))
                yield from file.iter_batches(rows, row_groups=list(groups), columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{piece.uri}: {error}") from error
