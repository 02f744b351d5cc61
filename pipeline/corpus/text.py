"""What counts as text: valid UTF-8 with something in it. The rest is named, nulled and quarantined, never guessed."""

from __future__ import annotations

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
    wide = pa.types.is_large_string(values.type) or pa.types.is_large_binary(values.type)
    string, binary = (pa.large_string(), pa.large_binary()) if wide else (pa.string(), pa.binary())
    invalid = None
    try:
        # Parquet readers do not check UTF-8; casting binary to string does, at several GB/s.
        text = values.cast(binary).cast(string)
    except pa.ArrowInvalid:
        invalid = pa.array([_broken(v) for v in values.cast(binary)])  # only batches that hold a broken row come here
        text = pc.if_else(invalid, None, values.cast(binary)).cast(string)
    blank = pc.equal(pc.utf8_length(pc.utf8_ltrim_whitespace(pc.utf8_slice_codeunits(text, 0, 64))), 0)
    if pc.any(blank).as_py():
        # A long leading run of blanks is rare: only rows that look blank in their first 64 characters are read whole.
        blank = pc.and_(blank, pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.if_else(blank, text, "x"))), 0))
    if invalid is None and text.null_count == 0 and not pc.any(blank).as_py():
        return text, None
    is_null = pc.fill_null(pc.is_null(values), True)
    broken = invalid if invalid is not None else pa.array([False] * len(values), pa.bool_())
    reasons = pc.case_when(
        pc.make_struct(is_null, pc.fill_null(broken, False), pc.fill_null(blank, False)),
        "null text",
        "text is not UTF-8",
        "blank text",
    )
    return pc.if_else(pc.is_null(reasons), text, pa.scalar(None, text.type)), reasons


def _broken(value: pa.Scalar) -> bool:
    if not value.is_valid:
        return False
    try:
        value.as_buffer().to_pybytes().decode()
    except UnicodeDecodeError:
        return True
    return False
