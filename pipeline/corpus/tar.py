"""Tars of samples read in place, by the run's index of them (`pipeline.corpus.tar_index`); nothing is unpacked.

A tar is a table with the columns `key`, `image`, `text` and `json`; a field of the JSON documents is one more column,
`json.FIELD` (or `json.OUTER.INNER`), as text. A document that is not UTF-8 is null. A sample that the index has a
fault for, or one of whose members is larger than the limit, has nothing but its key, and `FAULT` says why.

Only the members asked for are read. Those that lie near each other come in one read, up to 4 MiB a time: in an object
store a request costs as much as 256 KiB, so there captions are mostly read along with the images between them.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.storage import is_remote, resolve
from pipeline.corpus.tar_index import COMPRESSED_NAMES, INDEX, ROLES, SCHEMA, compressed, index_tar
from pipeline.corpus.text import as_utf8
from pipeline.errors import CorpusError

if TYPE_CHECKING:
    from pipeline.corpus.shards import Piece
    from pipeline.corpus.storage import Store

FAULT = "source.fault"
"""Column of a batch of the source, where it is asked for: why a sample cannot be used, null where it can."""
NEAR_BYTES, NEAR_BYTES_REMOTE = 4 << 10, 256 << 10
RANGE_BYTES = 4 << 20
READERS = 8
AHEAD, AHEAD_REMOTE = 16 << 10, 1 << 20
"""Bytes read at a time while indexing: enough for some headers, or what a request of an object store is worth."""


@dataclass(frozen=True, slots=True)
class Tar:
    """What reading a tar takes beside its place: URI of its index, bytes of the largest member that is read."""

    index: str
    limit: int


def is_tar(uri: str) -> bool:
    """Whether a file is read as a tar, or would be if it were not compressed; by its name."""
    return uri.lower().endswith(".tar") or bool(COMPRESSED_NAMES.search(uri))


def index_place(uri: str, size: int, mtime: int) -> tuple[str, ...]:
    """Where in a run the index of a tar is."""
    name = hashlib.sha256(f"{uri}\n{size}\n{mtime}".encode()).hexdigest()[:32]
    return ("corpus", "tar", f"{name}.parquet")


def list_tar(uri: str, size: int, mtime: int, store: Store) -> dict[str, Any]:
    """Index a tar into the run; what the listing has to know of it. Raises CorpusError for what is no plain tar."""
    if COMPRESSED_NAMES.search(uri):
        raise CorpusError(compressed(posixpath.splitext(uri)[1].lstrip(".")))
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as source:
        found = index_tar(source, size, AHEAD_REMOTE if is_remote(uri) else AHEAD)
    with store.sink(*index_place(uri, size, mtime)) as sink:
        with pq.ParquetWriter(sink, INDEX, compression="zstd") as writer:
            start = 0
            for rows in found.rows:
                writer.write_table(found.table.slice(start, rows), row_group_size=rows)
                start += rows
    schema = SCHEMA.serialize().to_pybytes()
    return {"identity": found.identity, "schema": schema, "rows": found.rows, "bytes": found.bytes, "cut": found.cut}


def read_tar(piece: Piece, columns: Sequence[str], batch_rows: int, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    """Columns of some row groups, in batches of at most `batch_rows` rows and about `batch_bytes`.

    Raises CorpusError for a tar or an index that cannot be read.
    """
    index = _index(piece, list(range(piece.first_group, piece.first_group + len(piece.rows))))
    with _open(piece) as source:
        for start, end in _cuts(index, _roles(columns), batch_rows, batch_bytes):
            yield _batch(source, piece, index.slice(start, end - start), columns)


def take_from_tar(piece: Piece, group: int, rows: np.ndarray, columns: Sequence[str], most: int) -> pa.RecordBatch:
    """Some rows of a row group of the file; of texts and images the first `most` bytes."""
    index = _index(piece, [group]).take(pa.array(rows))
    with _open(piece) as source:
        return _batch(source, piece, index, columns, most)


def stored_bytes(piece: Piece) -> dict[str, int]:
    """Bytes of every column in the piece's first row group."""
    index = _index(piece, [piece.first_group])
    return {role: pc.sum(index[f"{role}_size"]).as_py() or 0 for role in ROLES} | {"key": index["key"].nbytes}


def _index(piece: Piece, groups: list[int]) -> pa.Table:
    """Index of some row groups, with a fault for every member that is too large."""
    if piece.tar is None:
        raise CorpusError(f"{piece.uri} is a tar, and whoever reads it has no index of it")
    filesystem, path = resolve(piece.tar.index)
    try:
        with filesystem.open_input_file(path) as source:
            table = pq.ParquetFile(source).read_row_groups(groups, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        where = piece.tar.index.rpartition("/tar/")[0]
        raise CorpusError(f"the index of {piece.uri} cannot be read ({error}): delete {where} and run again") from error
    for role in ROLES:
        large = pc.fill_null(pc.greater(table[f"{role}_size"], piece.tar.limit), False)
        if pc.any(large).as_py():
            fault = pc.if_else(large, f"{role} is larger than corpus.max_image_mb", pa.scalar(None, pa.string()))
            table = table.set_column(len(INDEX) - 1, "fault", pc.coalesce(table["fault"], fault))
    return table


def _open(piece: Piece) -> Any:
    filesystem, path = resolve(piece.uri)
    source = filesystem.open_input_file(path)
    if source.size() != piece.size:
        source.close()
        raise CorpusError(f"{piece.uri} has changed since it was listed: run again with --refresh")
    return source


def _roles(columns: Sequence[str]) -> list[str]:
    """Members that some columns are made of."""
    return [role for role in ROLES if role in {c.partition(".")[0] for c in columns}]


def _cuts(index: pa.Table, roles: list[str], rows: int, size: int) -> Iterator[tuple[int, int]]:
    """First and end row of every batch."""
    sizes = np.zeros(len(index), np.int64)
    for role in roles:
        sizes += _filled(index, f"{role}_size")
    ends = np.cumsum(np.where(index["fault"].is_valid().to_numpy(), 0, sizes))
    start = 0
    while start < len(index):
        before = ends[start - 1] if start else 0
        end = min(start + rows, max(start + 1, int(np.searchsorted(ends, before + size, side="right"))))
        yield start, min(end, len(index))
        start = end


def _filled(index: pa.Table, name: str) -> np.ndarray:
    values: np.ndarray = index[name].fill_null(0).to_numpy()
    return values


def _batch(
    source: Any, piece: Piece, index: pa.Table, columns: Sequence[str], most: int | None = None
) -> pa.RecordBatch:
    """The rows of an index. `most`: bytes of texts and images to read at the most (documents are read whole)."""
    usable = index["fault"].is_null().to_numpy()
    roles = _roles(columns)
    wanted = {role: usable & index[f"{role}_at"].is_valid().to_numpy() for role in roles}
    at = {role: _filled(index, f"{role}_at")[wanted[role]] for role in roles}
    size = {role: _filled(index, f"{role}_size")[wanted[role]] for role in roles}
    if most is not None:
        size |= {role: np.minimum(size[role], most) for role in roles if role != "json"}
    read = iter(_fetch(source, piece.uri, _joined(at), _joined(size)))
    members = {role: [next(read) if there else None for there in wanted[role]] for role in roles}
    values = {role: pa.array(members[role], pa.binary()) for role in roles}
    made = {"key": index["key"].combine_chunks(), FAULT: index["fault"].combine_chunks()}
    made |= {role: v if role == "image" else v.view(pa.string()) for role, v in values.items() if role != "json"}
    if "json" in values:  # JSON is UTF-8, and what is not would spoil the file that it is carried to
        made["json"] = as_utf8(values["json"])[0]
    for column in columns:
        if column not in made:
            made[column] = _json_field(members["json"], column.split(".")[1:])
    return pa.RecordBatch.from_arrays([made[c] for c in columns], list(columns))


def _joined(values: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *values.values()])


def _fetch(source: Any, uri: str, at: np.ndarray, size: np.ndarray) -> list[memoryview]:
    """The bytes of n members, int64 (n,) each, in the order given; near ones are read together."""
    near = NEAR_BYTES_REMOTE if is_remote(uri) else NEAR_BYTES
    order = np.argsort(at, kind="stable")
    begin, end = at[order], (at + size)[order]
    apart = begin[1:] - end[:-1] > near
    first = np.flatnonzero(np.concatenate([[True] * bool(len(at)), apart | (np.diff(begin // RANGE_BYTES) > 0)]))
    low, high = begin[first], end[np.append(first[1:], len(at)) - 1] if len(at) else end

    def read(edges: tuple[int, int]) -> memoryview:
        content = source.read_at(edges[1] - edges[0], edges[0])
        if len(content) < edges[1] - edges[0]:
            raise CorpusError(f"{uri} has changed since it was listed: run again with --refresh")
        return memoryview(content)

    edges = list(zip(low.tolist(), high.tolist(), strict=True))
    try:
        if is_remote(uri) and len(edges) > 1:
            with ThreadPoolExecutor(READERS) as threads:
                ranges = list(threads.map(read, edges))
        else:
            ranges = [read(e) for e in edges]
    except OSError as error:
        raise CorpusError(f"{uri}: {error}") from error
    place = np.empty(len(at), np.int64)
    place[order] = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(at))))
    offset = at - low[place]
    return [ranges[p][a:b] for p, a, b in zip(place.tolist(), offset.tolist(), (offset + size).tolist(), strict=True)]


def _json_field(documents: Sequence[memoryview | None], path: Sequence[str]) -> pa.Array:
    """A field of JSON documents as text: strings as they are, numbers and truth values as JSON, null for the rest."""
    found = [None if d is None else _text_at(bytes(d), path) for d in documents]
    return pa.array(found, pa.string())


def _text_at(document: bytes, path: Sequence[str]) -> str | None:
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        return None
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if value is None or isinstance(value, dict | list):
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
