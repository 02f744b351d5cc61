"""Arrow IPC, the files of a `datasets` directory (`save_to_disk` or its cache): one record batch at a time.

Types stay as they are. Offsets and lengths are checked before use, since an Arrow file can lie about them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from pipeline.corpus.readers.base import Batch, IngestOptions, Source
from pipeline.corpus.storage import resolve


def schema(source: Source, options: IngestOptions) -> pa.Schema:
    with resolve(source.uri)[0].open_input_file(resolve(source.uri)[1]) as file:
        return _open(file)[0].remove_metadata()


def read(source: Source, options: IngestOptions, fields: pa.Schema) -> Iterator[Batch]:
    first = 1
    with resolve(source.uri)[0].open_input_file(resolve(source.uri)[1]) as file:
        for batch in _open(file)[1]:
            columns = [
                _as_bytes(batch.column(f.name)) if f.name in batch.schema.names else pa.nulls(batch.num_rows, f.type)
                for f in fields
            ]
            rows = pa.RecordBatch.from_arrays(columns, fields.names)
            rows.validate(full=True)
            yield Batch(rows, np.arange(first, first + rows.num_rows))
            first += rows.num_rows


def _open(file: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of the stream format (which `datasets` writes) or the file format."""
    if file.read(6) == b"ARROW1":
        reader = ipc.open_file(file)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    file.seek(0)
    stream = ipc.open_stream(file)
    return stream.schema, iter(stream)


def _as_bytes(values: pa.Array) -> pa.Array:
    """Strings as the bytes they are, so that one that is not UTF-8 is a bad row and not a bad file."""
    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    return values.view(kinds[values.type]) if values.type in kinds else values
