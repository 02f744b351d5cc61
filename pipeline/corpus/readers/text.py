"""Plain text: one document a file, or one a line (`document: line`). `file` names where it came from."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.readers.base import RAW, Batch, IngestOptions, Reject, Source, line_blocks, too_large

FIELDS = pa.schema([("text", pa.string()), ("file", pa.string())])


def schema(source: Source, options: IngestOptions) -> pa.Schema:
    return FIELDS


def read(source: Source, options: IngestOptions, fields: pa.Schema) -> Iterator[Batch]:
    with source.open() as raw:
        # UTF-8 passes unchecked: what is not is named row by row later. Other encodings are translated as they stream.
        other = codecs.lookup(options.encoding).name != "utf-8"
        stream = pa.transcoding_input_stream(raw, options.encoding, "utf-8") if other else raw
        if options.document == "file":
            yield _whole(stream, source, options, fields)
            return
        for lines in line_blocks(stream, options.limit):
            if lines.size:
                reject = Reject(lines.first, lines.offset, too_large(options.limit), lines.size, lines.data)
                yield Batch(documents([], source, fields), np.empty(0, np.int64), [reject])
                continue
            texts = [line.removesuffix(b"\r") for line in lines.data.removesuffix(b"\n").split(b"\n")]
            numbers = np.arange(lines.first, lines.first + len(texts))
            written = np.array(
                [bool(t) and not t.isspace() for t in texts]
            )  # an empty line is no document, nor a bad one
            yield Batch(
                documents([t for t, w in zip(texts, written, strict=True) if w], source, fields), numbers[written]
            )


def _whole(stream: Any, source: Source, options: IngestOptions, fields: pa.Schema) -> Batch:
    content = stream.read(options.limit + 1)
    if len(content) > options.limit:
        reason = f"{too_large(options.limit)}; raise it, or set document=line"
        return Batch(
            documents([], source, fields), np.empty(0, np.int64), [Reject(1, 0, reason, source.size, content[:RAW])]
        )
    return Batch(documents([content.removeprefix(b"\xef\xbb\xbf")], source, fields), np.ones(1, np.int64))


def documents(texts: list[bytes], source: Source, fields: pa.Schema) -> pa.RecordBatch:
    """Documents of one file with the fields asked for; what the format does not have is null."""
    values = {"text": pa.array(texts, pa.binary()), "file": pa.array([source.uri] * len(texts), pa.string())}
    columns = [values.get(f.name, pa.nulls(len(texts), f.type)) for f in fields]
    return pa.RecordBatch.from_arrays(columns, fields.names)
