"""CSV and TSV with a header line: Arrow's streaming reader, one block at a time.

CSV says nothing of types, so every field stays the string that was written (`007` keeps its zeros); an empty field
without quotes is null. Quoted values may span lines. A row with too few or too many fields is rejected alone. A quote
that is never closed swallows what follows it: up to `record_mb` that is one rejected row, beyond it the file fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.readers.base import BLOCK, RAW, Batch, IngestOptions, Reject, Source
from pipeline.errors import CorpusError


def schema(source: Source, options: IngestOptions) -> pa.Schema:
    with source.open() as stream:
        names: list[str] = _open(stream, source, options, [], lambda row: "skip").schema.names
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CorpusError(f"two columns are named {twice[0]!r}: rename one of them")
    return pa.schema([(name, pa.string()) for name in names])


def read(source: Source, options: IngestOptions, fields: pa.Schema) -> Iterator[Batch]:
    bad: list[Reject] = []

    def reject(row: Any) -> str:
        raw = row.text.encode("utf-8", "surrogateescape")
        reason = f"{row.actual_columns} fields where the header has {row.expected_columns}"
        bad.append(Reject(row.number - 1, None, reason, len(raw), raw[:RAW]))  # Arrow counts the header
        return "skip"

    following, ragged = 1, np.empty(0, np.int64)
    with source.open() as stream:
        for rows in _open(stream, source, options, fields.names, reject):
            rejects, bad[:] = list(bad), []
            ragged = np.concatenate([ragged[ragged >= following], [r.record for r in rejects]]).astype(np.int64)
            free = np.setdiff1d(np.arange(following, following + rows.num_rows + len(ragged)), ragged)
            records = free[: rows.num_rows]
            following = int(records[-1]) + 1 if len(records) else following
            yield Batch(rows, records, rejects)
        if bad:
            yield Batch(rows.slice(0, 0) if following > 1 else _nothing(fields), np.empty(0, np.int64), bad)


def _nothing(fields: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], pa.schema([(name, pa.binary()) for name in fields.names]))


def _open(stream: Any, source: Source, options: IngestOptions, names: list[str], reject: Any) -> Any:
    """Arrow's reader of these columns (all without `names`) as bytes, which become strings once they are known to be."""
    from pyarrow import csv

    stem = source.uri.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2").removesuffix(".lz4")
    try:
        return csv.open_csv(
            stream,
            read_options=csv.ReadOptions(use_threads=False, block_size=max(BLOCK, options.limit), encoding=options.encoding),
            parse_options=csv.ParseOptions(
                delimiter=options.delimiter or ("\t" if stem.endswith(".tsv") else ","),
                newlines_in_values=True,
                invalid_row_handler=reject,
            ),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.binary()),
                include_columns=names,
                include_missing_columns=True,
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise CorpusError(f"not CSV with a header: {error}") from error
