"""What counts as text: valid UTF-8 with something in it. The rest is named, nulled and quarantined, never guessed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def is_text(kind: pa.DataType) -> bool:
    """Types that a text column may have; binary is taken as UTF-8 bytes."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(kind) for check in (*checks, pa.types.is_string_view, pa.types.is_binary_view))


def clean_text(values: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Text of n rows as string with nulls where it is not usable, and the reasons (None when all rows are fine).

    Reasons are `null text`, `text is not UTF-8` and `blank text`.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    text, broken = as_utf8(values)
    blank = _blank_rows(text)
    if text.null_count == 0 and not blank.any():
        return text, None
    nothing = pa.scalar(None, pa.string())
    reasons = pc.if_else(pa.array(blank), "blank text", nothing)
    reasons = pc.if_else(pa.array(broken), "text is not UTF-8", reasons)
    reasons = pc.if_else(values.is_null(), "null text", reasons)
    return pc.if_else(reasons.is_null(), text, pa.scalar(None, text.type)), reasons


def as_utf8(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Values as string, null where they are not UTF-8, and the mask of those; shape (n,)."""
    import polars as pl  # checks three times as fast as Arrow's own cast, which would cost a fifth of reading

    wide = pa.types.is_large_string(values.type) or pa.types.is_large_binary(values.type)
    raw = values.cast(pa.large_binary() if wide else pa.binary())
    string = pa.large_string() if wide else pa.string()
    try:
        pl.Series(raw).cast(pl.String)  # Parquet readers do not check
        return raw.view(string), np.zeros(len(values), bool)
    except pl.exceptions.ComputeError:
        broken = np.array([_is_broken(v) for v in raw])  # only batches that hold a broken row come here
        return pc.if_else(pa.array(broken), pa.scalar(None, raw.type), raw).cast(string), broken


def _is_broken(value: pa.Scalar) -> bool:
    try:
        value.is_valid and value.as_buffer().to_pybytes().decode()
    except UnicodeDecodeError:
        return True
    return False


def _blank_rows(text: pa.Array) -> np.ndarray:
    """Mask of the rows with nothing but white space; shape (n,). Nearly all are settled by their first byte."""
    offsets = np.frombuffer(text.buffers()[1], np.int64 if pa.types.is_large_string(text.type) else np.int32)
    offsets = offsets[text.offset : text.offset + len(text) + 1]
    content = np.frombuffer(text.buffers()[2] or b"", np.uint8)
    first = content[np.minimum(offsets[:-1], len(content) - 1)] if len(content) else np.zeros(len(text), np.uint8)
    blank: np.ndarray = (np.diff(offsets) == 0) | (first <= 32) | (first >= 127)
    for head in (64, None):  # a long run of white space at the start is rare: few rows are looked at whole
        rows = np.flatnonzero(blank)
        if not len(rows):
            break
        some = text.take(pa.array(rows))
        some = pc.utf8_slice_codeunits(some, 0, head) if head else some
        empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(some)), 0)
        blank[rows] = pc.fill_null(empty, False).to_numpy(zero_copy_only=False)
    return blank
