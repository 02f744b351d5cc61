"""What the corpus is: its files in a fixed order, their row groups, and which of them cannot be read.

The listing is one thin table (a row a file) and is kept in the run. A local corpus is looked at again on every run and
only footers that are new or changed are read; a corpus on an object store is listed once, until `corpus.refresh` asks
for more, because listing six million objects is not free. Files known from before keep their place and new ones come
behind them, so an address never changes and an added file makes only new shards. A file that cannot be read
(truncated, not Parquet, another schema) stays in the table with the reason.

A file is identified by its size and the bytes of its Parquet footer (offsets, sizes and statistics of every column
chunk), not by its path or its time: a moved or freshly cloned corpus is still the same corpus.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.corpus.storage import Store, is_remote, resolve
from pipeline.errors import CorpusError

LISTING = pa.schema(
    [
        ("uri", pa.string()),
        ("size", pa.int64()),
        ("mtime", pa.int64()),
        ("identity", pa.string()),
        ("schema", pa.binary()),
        ("rows", pa.list_(pa.int64())),
        ("bytes", pa.list_(pa.int64())),
        ("error", pa.string()),
    ]
)
"""A row a file: rows and compressed bytes of every row group; `error` says why a file is left out."""

FOOTERS_A_UNIT = 512
WILDCARD = re.compile(r"[*?\[]")


def expand(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Files, directories and globs to a sorted list of (uri, size, mtime in ns) for every path in turn.

    A directory means every `*.parquet` below it; names that begin with `.` or `_` are left out, as Spark, Arrow and
    Hive do. Raises CorpusError for a path that matches nothing.
    """
    found: dict[str, tuple[int, int]] = {}
    for path in paths:
        files = _expand_one(path)
        if not files:
            raise CorpusError(f"corpus.path: no Parquet file at {path!r}; `tamis ingest` makes Parquet of other formats")
        found.update(files)
    return [(uri, *stat) for uri, stat in found.items()]


def _expand_one(path: str) -> dict[str, tuple[int, int]]:
    filesystem, root = resolve(path)
    prefix = path[: path.index("://") + 3] if is_remote(path) else ""
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.File:
        return {prefix + root: (info.size, info.mtime_ns or 0)}
    matches: Callable[[str], bool] = _visible_parquet
    if info.type == pafs.FileType.NotFound:
        if not WILDCARD.search(root):
            return {}
        pattern = _translate(root)
        matches = lambda name: bool(pattern.match(name))  # noqa: E731 (a second def would hide that both are filters)
        root = posixpath.dirname(root[: WILDCARD.search(root).start()])  # type: ignore[union-attr]  # searched above
    selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
    files = [i for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File]
    kept = [i for i in files if (matches(i.path) if matches is not _visible_parquet else matches(i.path[len(root) :]))]
    return {prefix + i.path: (i.size, i.mtime_ns or 0) for i in sorted(kept, key=lambda i: i.path)}


def _visible_parquet(relative: str) -> bool:
    parts = relative.strip("/").split("/")
    return parts[-1].endswith(".parquet") and not any(p.startswith((".", "_")) for p in parts)


def _translate(pattern: str) -> re.Pattern[str]:
    from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern))


def read_footers(files: Sequence[tuple[str, int, int]]) -> pa.Table:
    """One listing row a file; reading is waiting, so sixteen threads read at a time."""
    with ThreadPoolExecutor(16) as threads:
        rows = list(threads.map(_read_footer, files))
    return pa.Table.from_pylist(rows, schema=LISTING)


def _read_footer(file: tuple[str, int, int]) -> dict[str, Any]:
    uri, size, mtime = file
    row: dict[str, Any] = {"uri": uri, "size": size, "mtime": mtime}
    try:
        filesystem, path = resolve(uri)
        with filesystem.open_input_file(path) as source:
            metadata = pq.ParquetFile(source).metadata
            footer = source.read_at(metadata.serialized_size, size - 8 - metadata.serialized_size)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return row | {
            "identity": hashlib.sha256(footer + size.to_bytes(8, "little")).hexdigest()[:32],
            "schema": metadata.schema.to_arrow_schema().remove_metadata().serialize().to_pybytes(),
            "rows": [g.num_rows for g in groups],
            "bytes": [sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups],
        }
    except (pa.ArrowException, OSError, ValueError) as error:
        return row | {"error": f"unreadable: {error}"}


def list_corpus(
    paths: Sequence[str],
    store: Store,
    columns: Sequence[str] | None,
    refresh: bool,
    read_chunks: Callable[[list[list[tuple[str, int, int]]]], Iterable[pa.Table]],
) -> pa.Table:
    """The listing of a corpus, taken from the run where it is still true and stored there again.

    `columns`: the source columns that every file must have alike (None: all of the first readable file).
    `read_chunks`: reads the footers of each chunk of files, in order; the run gives an engine to it.
    """
    name = "corpus/files.parquet"
    known = pq.read_table(pa.BufferReader(store.read(name))) if store.exists(name) else LISTING.empty_table()
    same_paths = (known.schema.metadata or {}).get(b"paths") == repr(list(paths)).encode()
    known = known if same_paths else LISTING.empty_table()
    if known.num_rows and not refresh and all(is_remote(p) for p in paths):
        return known
    found = expand(paths)
    cached = dict(zip(zip(*(known[c].to_pylist() for c in ("uri", "size", "mtime")), strict=True), range(len(known)), strict=True))
    fresh = [f for f in found if f not in cached]
    chunks = [fresh[i : i + FOOTERS_A_UNIT] for i in range(0, len(fresh), FOOTERS_A_UNIT)]
    kept = known.take(pa.array(sorted(cached[f] for f in found if f in cached), pa.int64()))
    listing = pa.concat_tables([kept, *read_chunks(chunks)]) if chunks else kept
    listing = _mark_other_schemas(listing, columns).replace_schema_metadata({"paths": repr(list(paths))})
    sink = pa.BufferOutputStream()
    pq.write_table(listing, sink, compression="zstd")
    store.write(sink.getvalue().to_pybytes(), *name.split("/"))
    return listing


def reference_schema(listing: pa.Table) -> pa.Schema:
    """Arrow schema of the first readable file. Raises CorpusError where no file can be read."""
    for schema, error in zip(listing["schema"], listing["error"], strict=True):
        if not error.is_valid or error.as_py().startswith("schema"):
            return pa.ipc.read_schema(pa.BufferReader(schema.as_py()))
    reasons = "; ".join(f"{u}: {e}" for u, e in zip(listing["uri"][:3].to_pylist(), listing["error"][:3].to_pylist(), strict=True))
    raise CorpusError(f"corpus.path: none of the {len(listing)} files can be read ({reasons})")


def _mark_other_schemas(listing: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """Say of every file whose columns differ from the first one's how they differ."""
    reference = reference_schema(listing)
    wanted = {name: reference.field(name).type for name in (columns or reference.names) if name in reference.names}
    missing = [name for name in columns or () if name not in reference.names]
    if missing:
        raise CorpusError(f"the corpus has no column {missing[0]!r}; it has {', '.join(reference.names)}")
    verdicts: dict[bytes, str | None] = {}
    errors = []
    for raw, error in zip(listing["schema"].to_pylist(), listing["error"].to_pylist(), strict=True):
        if raw is None:
            errors.append(error)
            continue
        if raw not in verdicts:
            verdicts[raw] = _difference(pa.ipc.read_schema(pa.BufferReader(raw)), wanted, exact=columns is None)
        errors.append(verdicts[raw])
    return listing.set_column(listing.schema.get_field_index("error"), LISTING.field("error"), pa.array(errors, pa.string()))


def _difference(schema: pa.Schema, wanted: dict[str, pa.DataType], exact: bool) -> str | None:
    for name, kind in wanted.items():
        if name not in schema.names:
            return f"schema: no column {name!r}, which the first file has"
        if schema.field(name).type != kind:
            return f"schema: column {name!r} is {schema.field(name).type}, in the first file {kind}"
    extra = [name for name in schema.names if name not in wanted] if exact else []
    return f"schema: column {extra[0]!r} is not in the first file (list `corpus.columns` to leave it out)" if extra else None
