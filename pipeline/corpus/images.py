"""The image column of a corpus, whatever it holds, as encoded bytes: never null, never empty, or with a reason why not.

| column | bytes of a row |
| --- | --- |
| binary | as they are |
| struct with `bytes` and `path` (Hugging Face) | `bytes`; the file at `path` where these are null |
| string | the file at that path or URI |

A path is relative to the directory of the Parquet file that names it, and has to stay inside of it, links followed,
unless it leads into one of `corpus.image_roots`: a corpus that somebody else made must not read the machine's files.
Files are read by sixteen threads, so many at a time that memory holds. A file that is not there is a bad row; one that
an object store fails to give is an error, and the shard is tried again.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.storage import is_remote, resolve
from pipeline.corpus.tar import FAULT

NULL_IMAGE = "null image"
TOO_LARGE = "image is larger than corpus.max_image_mb"
MISSING = "image file is missing"
OUTSIDE = "image path leaves the corpus's directory, and no corpus.image_roots allows it"
READERS = 16
_NOTHING = pa.scalar(None, pa.string())


@dataclass(frozen=True)
class ImageColumn:
    """The source column that holds images, how large they may be in bytes, and where else than beside it they may lie.

    `roots`: directories or URIs.
    """

    name: str
    limit: int
    roots: tuple[str, ...] = ()

    def load(self, batch: pa.RecordBatch, uri: str, batch_bytes: int) -> Iterator[pa.RecordBatch]:
        """The batch, of the file at `uri`, with its images as binary, null where there is none.

        Why there is none goes into the column `FAULT`, where the batch has that. Comes in several pieces of about
        `batch_bytes` where images are read from files. Raises OSError.
        """
        at = batch.schema.get_field_index(self.name)
        values = batch.column(at)
        paths = None
        if pa.types.is_struct(values.type):
            paths, values = pc.struct_field(values, "path"), pc.struct_field(values, "bytes")
        elif is_path(values.type):
            paths, values = values, pa.nulls(len(values), pa.binary())
        if paths is None or not pc.any(pc.and_(values.is_null(), paths.is_valid())).as_py():
            yield self._with(batch, at, values, None)
            return
        for start, content, reasons in self._files(values, paths.to_pylist(), uri, batch_bytes):
            yield self._with(batch.slice(start, len(content)), at, content, reasons)

    def _with(self, batch: pa.RecordBatch, at: int, values: pa.Array, reasons: pa.Array | None) -> pa.RecordBatch:
        """A batch with images in their place, null where they cannot be used."""
        size = pc.binary_length(values)
        why = pc.if_else(pc.equal(size, 0), "empty image", _NOTHING)
        why = pc.if_else(pc.greater(size, self.limit), TOO_LARGE, why)
        why = pc.coalesce(reasons or pa.nulls(len(values), pa.string()), why)
        why = pc.if_else(pc.and_(values.is_null(), why.is_null()), NULL_IMAGE, why)
        images = (
            pc.if_else(why.is_null(), values, pa.scalar(None, values.type)) if why.null_count < len(why) else values
        )
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        columns[self.name] = images.cast(pa.binary())
        if FAULT in columns:
            columns[FAULT] = pc.coalesce(columns[FAULT], why)
        return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))

    def _files(
        self, values: pa.Array, paths: list[str | None], uri: str, batch_bytes: int
    ) -> Iterator[tuple[int, pa.Array, pa.Array]]:
        """First row, images and reasons of some rows at a time."""
        base = uri.rpartition("/")[0]
        start, held, size = 0, list[bytes | str | None](), 0
        with ThreadPoolExecutor(READERS) as threads:
            for row in range(0, len(paths), READERS):
                stored = values[row : row + READERS].to_pylist()
                found = list(threads.map(partial(self._one, base), stored, paths[row : row + READERS]))
                held += found
                size += sum(len(f) for f in found if isinstance(f, bytes))
                if size >= batch_bytes or row + READERS >= len(paths):
                    reasons = pa.array([f if isinstance(f, str) else None for f in held], pa.string())
                    yield start, pa.array([f if isinstance(f, bytes) else None for f in held], pa.binary()), reasons
                    start, held, size = start + len(held), [], 0

    def _one(self, base: str, content: bytes | None, path: str | None) -> bytes | str | None:
        """The bytes of an image, or why there are none; None where nothing says what they are."""
        if content is not None or path is None:
            return content
        place = place_of(path, base, self.roots)
        if place is None:
            return OUTSIDE
        try:
            filesystem, where = resolve(place)
            if not is_remote(place) and not os.path.isfile(where):  # a pipe would never be read to its end
                return MISSING
            with filesystem.open_input_file(where) as source:
                return TOO_LARGE if source.size() > self.limit else bytes(source.read())
        except FileNotFoundError:
            return MISSING
        except PermissionError:
            return "image file may not be read"


def is_path(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_image(kind: pa.DataType) -> bool:
    """Types that an image column may have."""
    if pa.types.is_struct(kind):
        fields = {f.name: f.type for f in kind}
        return "path" in fields and is_path(fields["path"]) and _is_bytes(fields.get("bytes", pa.null()))
    return is_path(kind) or _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def place_of(path: str, base: str, roots: tuple[str, ...]) -> str | None:
    """Where a path from the corpus leads; None where that is neither below `base` nor below one of `roots`."""
    if "\0" in path:
        return None
    place = _normal(path if is_remote(path) or path.startswith(("/", "file://")) else f"{base}/{path}")
    return place if any(_below(place, _normal(root)) for root in (base, *roots)) else None


def _below(place: str, root: str) -> bool:
    if is_remote(place) or is_remote(root):
        return place.startswith(root + "/")
    return os.path.realpath(place).startswith(os.path.realpath(root).rstrip("/") + "/")


def _normal(uri: str) -> str:
    if not is_remote(uri):
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    scheme, path = uri.split("://", 1)
    return f"{scheme}://{posixpath.normpath(path)}"
