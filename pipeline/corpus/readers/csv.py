"""CSV and TSV with a header line: Arrow's streaming reader, one block at a time.

CSV says nothing of types, so every field stays the string that was written (`007` keeps its zeros) unless `fields`
names another type; an empty field without quotes is null. Quoted values may span lines. A row with too few or too many
fields, or with bytes that are not of the encoding, is rejected alone. A quote that is never closed swallows what
follows it: up to about `record_mb` that is one rejected row, beyond it the file fails.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pacsv

from pipeline.corpus.readers.base import BLOCK, RAW, Batch, IngestOptions, Reject, Source
from pipeline.errors import CorpusError

ESCAPE = 0x10FF00
"""Bytes that are not of the encoding, at which Arrow would stop, pass it as this private character plus the byte."""
ESCAPED = "[\U0010ff00-\U0010ffff]"


def schema(source: Source, options: IngestOptions) -> pa.Schema:
    with source.open() as stream:
        text = io.TextIOWrapper(_Utf8(stream, options.encoding).stream, "utf-8", newline="")
        try:
            names = next((row for row in csv.reader(text, delimiter=_delimiter(source, options)) if row), None)
        except csv.Error as error:
            raise CorpusError(f"not CSV with a header: {error}") from error
    if names is None:
        raise CorpusError("empty: not even a CSV header")
    if any(re.search(ESCAPED, name) for name in names):
        raise CorpusError(f"the header is not {options.encoding}: set encoding=...")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise CorpusError(f"two columns are named {twice[0]!r}: rename one of them")
    return pa.schema([(name, pa.string()) for name in names])


def read(source: Source, options: IngestOptions, fields: pa.Schema) -> Iterator[Batch]:
    ragged: list[Reject] = []

    def reject(row: Any) -> str:
        raw = _unescape(row.text)
        reason = f"ragged row: {row.actual_columns} fields where the header has {row.expected_columns}"
        ragged.append(Reject(row.number - 1, None, reason, len(raw), raw[:RAW]))  # Arrow counts the header
        return "skip"

    following, taken = 1, np.empty(0, np.int64)
    with source.open() as stream, _explained(options):
        bytes_ = _Utf8(stream, options.encoding)
        for rows in _open(bytes_.stream, source, options, fields, reject):
            rejects, ragged[:] = list(ragged), []
            taken = np.concatenate([taken[taken >= following], [r.record for r in rejects]]).astype(np.int64)
            free = np.setdiff1d(np.arange(following, following + rows.num_rows + len(taken)), taken)
            records = free[: rows.num_rows]
            following = int(records[-1]) + 1 if len(records) else following
            if bytes_.escaped:
                broken = list(_broken(rows, records))
                rejects += broken
                whole = ~np.isin(records, [r.record for r in broken])
                rows, records = rows.filter(pa.array(whole)), records[whole]
            yield Batch(rows, records, rejects)
        if ragged:
            yield Batch(pa.RecordBatch.from_pylist([], fields), np.empty(0, np.int64), ragged)


def _open(stream: Any, source: Source, options: IngestOptions, fields: pa.Schema, reject: Any) -> Any:
    return pacsv.open_csv(
        stream,
        read_options=pacsv.ReadOptions(use_threads=False, block_size=max(BLOCK, options.limit)),
        parse_options=pacsv.ParseOptions(
            delimiter=_delimiter(source, options), newlines_in_values=True, invalid_row_handler=reject
        ),
        convert_options=pacsv.ConvertOptions(
            column_types={f.name: f.type if pa.types.is_primitive(f.type) else pa.string() for f in fields},
            include_columns=fields.names,
            include_missing_columns=True,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _delimiter(source: Source, options: IngestOptions) -> str:
    return options.delimiter or ("\t" if ".tsv" in source.uri[-8:].lower() else ",")


@contextlib.contextmanager
def _explained(options: IngestOptions) -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        if "straddling" in str(error):
            raise CorpusError(f"a row above record_mb={options.record_mb:g} (a quote that is never closed?)") from error
        raise


class _Utf8:
    """A stream of bytes in some encoding as valid UTF-8 without byte-order mark; `escaped` once it held other bytes."""

    def __init__(self, stream: Any, encoding: str) -> None:
        codecs.register_error("tamis-escape", self._escape)
        name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        self._decoder = codecs.getincrementaldecoder(name)("tamis-escape")
        self.escaped = False
        self.stream = pa.TransformInputStream(stream, lambda data: self._decoder.decode(data, not data).encode())

    def _escape(self, error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeDecodeError):
            raise error
        self.escaped = True
        return "".join(chr(ESCAPE + byte) for byte in error.object[error.start : error.end]), error.end


def _unescape(text: str) -> bytes:
    """The bytes that were read."""
    return re.sub(b"\xf4\x8f[\xbc-\xbf][\x80-\xbf]", lambda m: bytes([ord(m[0].decode()) - ESCAPE]), text.encode())


def _broken(rows: pa.RecordBatch, records: np.ndarray) -> Iterator[Reject]:
    """Rows with a value of other bytes than the encoding's; the first such value is named."""
    seen: set[int] = set()
    for name, values in zip(rows.schema.names, rows.columns, strict=True):
        if pa.types.is_string(values.type):
            for i in np.flatnonzero(pc.fill_null(pc.match_substring_regex(values, ESCAPED), False)).tolist():
                if i not in seen:
                    seen.add(i)
                    raw = _unescape(values[i].as_py())
                    yield Reject(int(records[i]), None, f"not of the encoding: field {name!r}", len(raw), raw[:RAW])
