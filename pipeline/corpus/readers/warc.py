"""WARC and WET (plain, .gz, .zst): the pages of a crawl, by FastWARC; main text of HTML by `readers.extract`.

A document is an HTTP response with status 200, a resource or a conversion (WET) of an http(s) address whose type is
HTML or plain text; all other records are counted by kind, none is a bad row. `id` is the WARC-Record-ID.

FastWARC ends quietly where a file is cut off, and a record with a false Content-Encoding derails it. So bytes are
decompressed by Arrow, which notices; every block is measured against its header; the file must end as a WARC file
does; and HTTP is parsed on a copy of the record's own bytes, whose failure costs that record alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.readers.base import BLOCK, Batch, IngestOptions, Reject, Source, may_pass, too_large
from pipeline.corpus.readers.extract import Extractor, PageError, extractor
from pipeline.errors import CorpusError

FIELDS = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("url", pa.string()),
        ("date", pa.timestamp("us", "UTC")),
        ("content_type", pa.string()),
        ("language", pa.string()),
    ]
)
HTML = ("text/html", "application/xhtml+xml")
HEAD = 1024
"""Bytes of a rejected record that quarantine keeps; `offset` finds the rest, and pages without text are many."""
ROWS_A_BATCH = 1024


def schema(source: Source, options: IngestOptions) -> pa.Schema:
    return FIELDS


class _Stream:
    """A stream that knows its place and its last four bytes."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.place, self.tail = stream, 0, b""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.stream.read(size if size >= 0 else None)
        self.place += len(data)
        self.tail = (self.tail + data[-4:])[-4:]
        return data

    def tell(self) -> int:
        return self.place


@dataclass
class _Rows:
    """Columns under way. `size` is their bytes of text."""

    values: list[tuple[Any, ...]] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    size: int = 0

    def batch(self, fields: pa.Schema) -> Batch:
        columns = dict(
            zip(FIELDS.names, zip(*self.values, strict=True) if self.values else [()] * len(FIELDS), strict=True)
        )
        arrays = [
            pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(len(self.records), f.type)
            for f in fields
        ]
        rows = pa.RecordBatch.from_arrays(arrays, fields.names)
        return Batch(rows, np.array(self.records, np.int64), self.rejects, self.skipped)


def read(source: Source, options: IngestOptions, fields: pa.Schema) -> Iterator[Batch]:
    from fastwarc import ArchiveIterator

    pages = extractor(options.extractor, options.page_seconds)
    with source.open() as raw:
        stream: Any = _Stream(raw)  # it has what is used of a file, `read`, and not all that fastwarc's types ask for
        rows, number = _Rows(), 0
        try:
            for number, record in enumerate(ArchiveIterator(stream, parse_http=False, stream_detect=False), 1):
                _add(rows, record, number, options.limit, pages)
                if len(rows.records) + len(rows.rejects) >= ROWS_A_BATCH or rows.size >= BLOCK:
                    yield rows.batch(fields)
                    rows = _Rows()
        except OSError as error:
            message = f"{f'after record {number}' if number else 'not WARC, or damaged'}: {error}"
            raise CorpusError(message) from (error if may_pass(error) else None)
        if stream.place and stream.tail != b"\r\n\r\n":
            raise CorpusError(f"ends inside record {number}: truncated")
        yield rows.batch(fields)


def _add(rows: _Rows, record: Any, number: int, limit: int, pages: Extractor) -> None:
    """Make a record a row, a reject or a count."""
    from fastwarc.warc import WarcRecordType as Kind

    url = (record.headers.get("WARC-Target-URI") or "").strip("<>")
    if record.record_type not in (Kind.response, Kind.resource, Kind.conversion) or not url.startswith("http"):
        rows.skipped["other record"] += 1
        return
    size, offset = record.content_length, record.stream_pos
    block = record.reader.read(min(size, limit))
    if len(block) < min(size, limit):
        raise CorpusError(f"ends inside record {number}: {len(block)} bytes where its header says {size}")
    try:
        page = _page(record, block, Kind)
        if isinstance(page, str):
            rows.skipped[page] += 1
            return
        if size > limit:
            raise PageError(too_large(limit))
        text = pages.main_text(page.body(limit), page.charset, plain=page.kind not in HTML)
    except PageError as error:
        rows.rejects.append(Reject(number, offset, str(error), size, block[:HEAD]))
        return
    language = record.headers.get("WARC-Identified-Content-Language")
    rows.values.append((record.record_id, text, url, record.record_date, page.kind, language))
    rows.records.append(number)
    rows.size += len(text)


@dataclass
class _Page:
    kind: str
    charset: str | None
    reader: Any

    def body(self, limit: int) -> bytes:
        """Decoded payload, at most `limit` bytes: a small record may unpack to anything."""
        try:
            body: bytes = self.reader.read(limit + 1)
        except OSError as error:
            raise PageError(f"undecodable HTTP: {error}") from error
        if len(body) > limit:
            raise PageError(too_large(limit))
        return body


def _page(record: Any, block: bytes, kinds: Any) -> _Page | str:
    """The page in a record, or why it is no document. Raises PageError for HTTP that cannot be parsed."""
    from fastwarc.warc import WarcRecord

    identified = record.headers.get("WARC-Identified-Payload-Type")
    copy = WarcRecord()
    copy.set_bytes_content(block)
    if record.record_type == kinds.response and record.is_http:
        copy.is_http = True
        try:
            copy.parse_http(auto_decode="all")
        except OSError as error:
            raise PageError(f"undecodable HTTP: {error}") from error
        if copy.http_headers.status_code is None:
            raise PageError("undecodable HTTP: no status")
        if copy.http_headers.status_code != 200:
            return "status not 200"
        declared, charset = copy.http_content_type, copy.http_charset
    else:
        declared, _, charset = (record.headers.get("Content-Type") or "").partition("charset=")
    kind = (identified or declared or "").partition(";")[0].strip().lower()
    return _Page(kind, charset, copy.reader) if kind in (*HTML, "text/plain") else "not HTML or text"
