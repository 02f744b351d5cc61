"""The unit of work: a shard is a row-group range of one file, or several small files together.

A file is Parquet, or a tar of samples, which is a table with row groups of its own (`pipeline.corpus.tar`).

Rows keep their order. A shard's fingerprint is made of its files' identities, so it says whether a part computed from
it is still true. Cutting depends on the listing alone, never on the workers, and a file that is gone or left out keeps
its place in it: the shards of the other files stay what they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.images import ImageColumn
from pipeline.corpus.storage import Store, is_remote, resolve
from pipeline.corpus.tar import FAULT, Tar, index_place, is_tar, read_tar, stored_bytes
from pipeline.errors import CorpusError
from pipeline.recipe import fingerprint

MIB = 1 << 20
BATCH_BYTES = 64 * MIB
"""Decoded bytes that one batch may hold: rows of 20 MB come three at a time."""

FILES_A_SHARD = 1024
"""Files that one shard may join; beyond it, describing a shard costs more than sending it to a worker should."""

READ_AHEAD = 8
"""Files of one shard that are fetched at a time from an object store, where opening one is mostly waiting."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive row groups of one file; `rows` counts the rows of each, `bytes` is their compressed size."""

    uri: str
    size: int
    identity: str
    first_group: int
    rows: tuple[int, ...]
    bytes: int
    tar: Tar | None = None


@dataclass(frozen=True)
class Shard:
    """Pieces of files in row order. One without pieces (its files are gone) takes no part."""

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
    total = pc.sum(pc.list_flatten(listing.filter(pc.invert(listing["gone"]))["bytes"])).as_py() or 0
    return int(min(max(total // 32, MIB), 64 * MIB))


def plan_shards(listing: pa.Table, shard_bytes: int, store: Store | None = None, limit: int = 0) -> list[Shard]:
    """Cut the files into shards of about `shard_bytes` compressed bytes, at row-group boundaries.

    A shard stands at its own index in the list. Row groups larger than `shard_bytes` make a shard each.
    `store`: the run, where the indexes of tars are; `limit`: bytes of a member of a tar that is not too large to read.
    Who only counts shards needs neither.
    """
    columns = ("uri", "size", "mtime", "identity", "rows", "bytes", "error", "gone")
    uris, file_sizes, times, identities, rows, sizes, errors, gone = (listing[name].to_pylist() for name in columns)
    shards: list[list[Piece]] = []
    for shard, file, first, end in _cut(sizes, shard_bytes):
        if shard == len(shards):
            shards.append([])
        if errors[file] is None and not gone[file] and sum(rows[file][first:end]):
            held = tuple(rows[file][first:end])
            size = sum(sizes[file][first:end])
            tar = None
            if store is not None and is_tar(uris[file]):
                tar = Tar(store.locate(*index_place(uris[file], file_sizes[file], times[file])), limit)
            shards[shard].append(Piece(uris[file], file_sizes[file], identities[file], first, held, size, tar))
    return [Shard(index, tuple(pieces)) for index, pieces in enumerate(shards)]


def _cut(sizes: list[list[int] | None], shard_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Shard, file, first and end row group of every range, in order; `sizes` are the bytes of every group by file."""
    shard = filled = files = 0
    for file, groups in enumerate(sizes):
        first = 0
        for group, size in enumerate(groups or ()):
            if filled and (filled + size > shard_bytes or files >= FILES_A_SHARD):
                yield shard, file, first, group
                shard, first, filled, files = shard + 1, group, 0, 0
            filled += size
        yield shard, file, first, len(groups or ())
        files += 1


def read_source(
    shard: Shard, columns: list[str], batch_rows: int, images: ImageColumn | None = None
) -> Iterator[pa.RecordBatch]:
    """Source columns of a shard, in row order, in batches of at most `batch_rows` rows and about 64 MiB.

    `images`: that column comes as encoded bytes, whatever the source holds. `FAULT` may be among the columns.
    Raises CorpusError for a file that cannot be read or is no longer the one that was listed.
    """
    if len(shard.pieces) == 1 or not is_remote(shard.pieces[0].uri):
        for piece in shard.pieces:
            yield from _read_piece(piece, columns, batch_rows, images)
        return
    ahead: deque[Future[list[pa.RecordBatch]]] = deque()
    with ThreadPoolExecutor(READ_AHEAD) as threads:
        for piece in shard.pieces:
            ahead.append(threads.submit(lambda p: list(_read_piece(p, columns, batch_rows, images)), piece))
            if len(ahead) == READ_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _read_piece(
    piece: Piece, columns: list[str], batch_rows: int, images: ImageColumn | None
) -> Iterator[pa.RecordBatch]:
    try:
        read = read_tar if is_tar(piece.uri) else _read_parquet
        for batch in read(piece, columns, batch_rows, BATCH_BYTES):
            yield from [batch] if images is None else images.load(batch, piece.uri, BATCH_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{piece.uri}: {error}") from error


def _read_parquet(piece: Piece, columns: Sequence[str], batch_rows: int, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    filesystem, path = resolve(piece.uri)
    names = [c for c in columns if c != FAULT]
    with filesystem.open_input_file(path) as source:
        if source.size() != piece.size:
            raise CorpusError(f"{piece.uri} has changed since it was listed: run again with --refresh")
        file = pq.ParquetFile(source, pre_buffer=is_remote(piece.uri))  # few large requests, or few bytes held
        groups = list(range(piece.first_group, piece.first_group + len(piece.rows)))
        rows = batch_bytes * sum(piece.rows) // max(_decoded(file.metadata, groups, names), 1)
        for batch in file.iter_batches(
            max(1, min(batch_rows, rows)), row_groups=groups, columns=names, use_threads=False
        ):
            yield batch.append_column(FAULT, pa.nulls(len(batch), pa.string())) if FAULT in columns else batch


def compressed_bytes(piece: Piece) -> dict[str, int]:
    """Bytes of every source column as stored in the piece's first row group."""
    if is_tar(piece.uri):
        return stored_bytes(piece)
    filesystem, path = resolve(piece.uri)
    with filesystem.open_input_file(path) as source:
        group = pq.ParquetFile(source).metadata.row_group(piece.first_group)
    found: dict[str, int] = {}
    for column in map(group.column, range(group.num_columns)):
        name = column.path_in_schema.partition(".")[0]
        found[name] = found.get(name, 0) + column.total_compressed_size
    return found


def _decoded(metadata: pq.FileMetaData, groups: list[int], columns: list[str]) -> int:
    """Uncompressed bytes of some columns in some row groups."""
    leaves = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.partition(".")[0] in columns]
    return sum(metadata.row_group(g).column(c).total_uncompressed_size for g in groups for c in leaves)
