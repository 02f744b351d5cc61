"""Rows as lines of JSON, through polars. Bytes, which JSON has no form for, become base64."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def lines(batch: pa.RecordBatch) -> bytes:
    """One JSON object a row and line, UTF-8."""
    import polars as pl

    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    return frame.select(_plain(pl.col(n), t).alias(n) for n, t in frame.schema.items()).write_ndjson().encode()


def _plain(value: Any, kind: Any) -> Any:
    """An expression whose values JSON can hold, for one of some type."""
    import polars as pl

    if kind == pl.Binary:
        return value.bin.encode("base64")
    if isinstance(kind, pl.Struct):
        fields = [_plain(value.struct.field(f.name), f.dtype).alias(f.name) for f in kind.fields]
        return pl.when(value.is_not_null()).then(pl.struct(fields))
    if isinstance(kind, pl.List) and _has_bytes(kind):
        return value.list.eval(_plain(pl.element(), kind.inner))
    return value


def _has_bytes(kind: Any) -> bool:
    import polars as pl

    if isinstance(kind, pl.Struct):
        return any(_has_bytes(f.dtype) for f in kind.fields)
    return _has_bytes(kind.inner) if isinstance(kind, pl.List) else kind == pl.Binary
