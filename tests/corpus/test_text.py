"""What counts as text, against Python's own decoder and `str.isspace`."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.corpus.text import clean_text, is_text

KINDS = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
SPACES = " \t\n\r\x0b\x0c\u00a0\u2003\u3000"


def verdict(value: bytes | None) -> tuple[str | None, str | None]:
    """Text and reason by the definition."""
    if value is None:
        return None, "null text"
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return None, "text is not UTF-8"
    return (None, "blank text") if not text.strip(SPACES) else (text, None)


rows = st.one_of(
    st.none(), st.binary(max_size=8), st.text(max_size=8).map(str.encode), st.text(SPACES, max_size=90).map(str.encode)
)


@given(st.lists(rows, max_size=12), st.sampled_from(KINDS), st.integers(0, 3))
@example([("\u3000" * 70 + "x").encode(), b"", None, b"\xc3("], pa.binary(), 1)
@example([b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\xc0\x80"], pa.binary(), 0)  # a surrogate, a face, an overlong NUL
def test_verdicts(values: list[bytes | None], kind: pa.DataType, skip: int) -> None:
    known = [v for v in values if not (v and v.decode(errors="replace").strip(SPACES) in UNDECIDED)]
    array = pa.array(known, pa.binary()).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(known).cast(kind)
    text, reasons = clean_text(array.slice(skip))
    expected = [verdict(v) for v in known[skip:]]
    assert text.to_pylist() == [t for t, _ in expected]
    assert (reasons.to_pylist() if reasons is not None else [None] * len(text)) == [r for _, r in expected]
    assert (reasons is None) == all(r is None for _, r in expected)


UNDECIDED = {c * n for c in "\x1c\x1d\x1e\x1f\x85\u1680\u2028\u2029\u202f\u205f\u180e\u200b\ufeff" for n in (1, 2)}
"""Strange separators on which Unicode's lists differ; nothing depends on them."""


def test_strings_of_any_width_stay_as_they_are() -> None:
    for kind in (pa.string(), pa.large_string()):
        values = pa.array(["a", "é", "中文"], kind)
        text, reasons = clean_text(values)
        assert reasons is None
        assert text.equals(values)
    views, _ = clean_text(pa.array(["a", None], pa.string_view()))
    assert views.to_pylist() == ["a", None]


def test_a_text_of_20_mb() -> None:
    big = b" " * 100 + b"x" * 20_000_000
    text, reasons = clean_text(pa.array([big, b" " * 20_000_000, big[:-1] + b"\xff"]))
    assert [len(t) if t else t for t in text.to_pylist()] == [20_000_100, None, None]
    assert reasons.to_pylist() == [None, "blank text", "text is not UTF-8"]


def test_no_rows() -> None:
    for values in (pa.array([], pa.binary()), pa.array([b"a"]).slice(1)):
        text, reasons = clean_text(values)
        assert (len(text), text.type, reasons) == (0, pa.string(), None)


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (pa.string(), True),
        (pa.large_binary(), True),
        (pa.string_view(), True),
        (pa.dictionary(pa.int8(), pa.string()), True),
        (pa.int64(), False),
        (pa.list_(pa.string()), False),
        (pa.binary(16), False),
    ],
)
def test_types_of_a_text_column(kind: pa.DataType, fits: bool) -> None:
    assert is_text(kind) == fits
