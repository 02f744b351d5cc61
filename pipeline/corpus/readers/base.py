"""What a reader of a foreign format is: a module with two functions, registered by name in `READERS`.

- `schema(source, options)`: the fields that the file has, from its first bytes alone.
- `read(source, options, fields)`: the file as batches with exactly these fields, in the file's order.

A reader streams: it holds one block, never the file. A record that gives no row is a `Reject`; a file that cannot be
read on (truncated, another format) raises, and nothing of that file is published. Whether a text is usable (null,
blank, not UTF-8, too large) is decided after the reader, once for all formats.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.corpus.storage import resolve
from pipeline.errors import CorpusError

Format = Literal["jsonl", "csv", "text", "arrow", "warc", "html"]

READERS: dict[str, str] = {
    name: f"pipeline.corpus.readers.{name}" for name in ("jsonl", "csv", "text", "arrow", "warc", "html")
}
FIELDED = ("jsonl", "csv", "arrow")
"""Formats whose fields the user names; the others have `id`, `text` and fields of their own."""
WEB = ("warc", "html")
"""Formats that need the extra `web`."""

BLOCK = 8 << 20
"""Bytes read at a time."""
RAW = 64 << 10
"""Bytes of a rejected record that quarantine keeps; the source, which stays as it is, has the rest."""
RUNAWAY = 64
"""A record this many times longer than a record may be ends the file: a decompression bomb or another format."""
DAMAGE = re.compile(r"compressed stream|decompress|inflate|WARC|Expected to be able to read")
"""What Arrow and FastWARC say of bad bytes, which they raise as OSError, like a lost connection."""
TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}


class IngestOptions(BaseModel):
    """How files become rows. The options are part of the identity of what is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format | None = Field(None, description="format of every file (default: by the name's ending)")
    text: str = Field("text", description="field that holds the text (jsonl, csv, arrow)")
    id: str | None = Field(
        None, description="field that holds the id (default: `id` where there is one, else the hash of the text)"
    )
    fields: tuple[str, ...] | None = Field(
        None, description="other fields to keep, `name` or `name:type` (default: all)"
    )
    document: Literal["file", "line"] = Field("file", description="what one document is in plain text")
    encoding: str = Field("utf-8", description="encoding of csv and text files")
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="between csv fields (default: `,`; tab in .tsv)"
    )
    extractor: Literal["trafilatura", "resiliparse"] = Field(
        "trafilatura", description="what finds the main text of HTML"
    )
    page_seconds: float = Field(10, gt=0, description="cpu seconds that one HTML page may take")
    record_mb: float = Field(32, gt=0, description="MiB of one record; longer ones go to quarantine")
    file_mb: float = Field(128, gt=0, description="compressed MiB that an output file aims at")
    row_group_mb: float = Field(8, gt=0, description="uncompressed MiB that a row group aims at")

    @field_validator("fields")
    @classmethod
    def _known_types(cls, fields: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name, kind in (f.split(":", 1) for f in fields or () if ":" in f):
            if kind not in TYPES:
                raise ValueError(f"field {name!r} has the type {kind!r}; the types are {', '.join(TYPES)}")
        return fields

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except LookupError as error:
            raise ValueError(f"{encoding!r} is no encoding: write utf-8, latin-1, cp1252, ...") from error
        return encoding

    @property
    def limit(self) -> int:
        """Bytes that one record may have."""
        return int(self.record_mb * (1 << 20))

    def kept(self) -> dict[str, pa.DataType | None] | None:
        """Names of the other fields to keep and their types where given; None for all."""
        if self.fields is None:
            return None
        return {name: TYPES.get(kind) for name, _, kind in (f.partition(":") for f in self.fields)}


@dataclass(frozen=True)
class Source:
    """One input file. `name` is the stem of its outputs: it depends on the file's place alone."""

    uri: str
    size: int
    mtime_ns: int
    format: Format
    name: str

    def open(self) -> Any:
        """Its bytes as an Arrow stream, decompressed as the name's ending says. Reads no more than is asked for."""
        filesystem, path = resolve(self.uri)
        return filesystem.open_input_stream(path, compression="detect")


class Reject(NamedTuple):
    """A record without a row: its number from 1, where it starts in the decompressed bytes, why, its size, its head.

    The reason is of the form `kind` or `kind: detail`; kinds are counted.
    """

    record: int
    offset: int | None
    reason: str
    size: int
    raw: bytes


class Batch(NamedTuple):
    """Rows with their record numbers (int64, shape (n,)), rejected records, and counts of what is no document."""

    rows: pa.RecordBatch
    records: np.ndarray
    rejects: Sequence[Reject] = ()
    skipped: Mapping[str, int] = MappingProxyType({})


class Reader(Protocol):
    def schema(self, source: Source, options: IngestOptions) -> pa.Schema: ...
    def read(self, source: Source, options: IngestOptions, fields: pa.Schema) -> Iterator[Batch]: ...


def reader_of(source: Source) -> Reader:
    return cast(Reader, importlib.import_module(READERS[source.format]))


class Lines(NamedTuple):
    """Whole lines: how many, number of the first (from 1) and its offset. With `size`: one line too long, its head."""

    data: bytes
    total: int
    first: int
    offset: int
    size: int = 0


def line_blocks(stream: Any, limit: int, block: int = BLOCK) -> Iterator[Lines]:
    """A stream of bytes as blocks of whole lines; memory stays below `limit` + 2 `block` whatever the stream holds.

    A line above `limit` bytes (which does not fit a block) is skipped and named. Raises CorpusError for a line that
    does not end within 64 limits.
    """
    chunk: bytes = stream.read(block)
    mark = len(chunk) - len(chunk.removeprefix(b"\xef\xbb\xbf"))
    chunk, first, offset = chunk[mark:] or stream.read(block), 1, mark
    held: list[bytes] = []  # the beginning of a line that has not ended yet
    while chunk:
        end = chunk.rfind(b"\n") + 1
        held_size = sum(map(len, held))
        if end:
            data = b"".join([*held, memoryview(chunk)[:end]])
            lines = Lines(data, data.count(b"\n"), first, offset)
            yield lines
            first, offset = first + lines.total, offset + len(data)
            held = [chunk[end:]]
        elif held_size + len(chunk) <= limit:
            held.append(chunk)
        else:
            head, size = b"".join([*held, chunk])[:RAW], held_size
            while chunk and not end:
                size += len(chunk)
                if size > RUNAWAY * limit:
                    raise CorpusError(f"line {first} does not end within {size} bytes: not lines, or a bomb")
                chunk = stream.read(block)
                end = chunk.find(b"\n") + 1
            size += end
            yield Lines(head, 1, first, offset, size)
            first, offset, held, chunk = first + 1, offset + size, [], chunk[end:]
            if chunk:
                continue
        chunk = stream.read(block)
    if data := b"".join(held):
        yield Lines(data, 1, first, offset)


def may_pass(error: BaseException) -> bool:
    """Whether a try later may end better: trouble on the way to the bytes, not with the bytes themselves."""
    lasting = isinstance(error, FileNotFoundError | PermissionError) or DAMAGE.search(str(error))
    return isinstance(error, OSError) and not lasting


def too_large(limit: int) -> str:
    return f"record too large: above record_mb={limit / (1 << 20):g}"
