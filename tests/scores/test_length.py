"""Length: the right unit, and a score that is not negative exactly inside the band."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.scores.length import Length


def measured(recipe: Length, values: pa.Array) -> pa.RecordBatch:
    column = recipe.column(None)  # type: ignore[arg-type]  # a length asks nothing of the run
    out = column.open()(pa.record_batch([values], list(column.inputs)))
    assert out.schema == column.fields
    assert out.schema.names[0] == "score"
    return out


def by_tokens(recipe: Length, *lengths: int) -> list[float]:
    return measured(recipe, pa.array(lengths, pa.int64()))["score"].to_pylist()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize(("unit", "expected"), [("chars", [5, 12, 4]), ("words", [1, 3, 1])])
def test_units_that_are_read_from_the_text(unit: str, expected: list[int], kind: pa.DataType) -> None:
    texts = pa.array(["héllo", " one\t two\n3 ", "中文文本"], kind)
    assert measured(Length(unit=unit), texts)["length"].to_pylist() == expected


@given(st.lists(st.text().filter(str.strip), min_size=1))  # blank texts never reach a score
def test_words_are_those_of_str_split(texts: list[str]) -> None:
    found = measured(Length(unit="words"), pa.array(texts, pa.string()))["length"].to_pylist()
    assert found == [len(t.split()) for t in texts]


@pytest.mark.parametrize(("unit", "reference"), [("tokens", "row.tokens"), ("bytes", "row.bytes"), ("chars", "text")])
def test_counts_come_from_the_row_column_where_it_has_them(unit: str, reference: str) -> None:
    assert Length(unit=unit).column(None).inputs == (reference,)  # type: ignore[arg-type]  # as above


def test_scores_are_octaves_from_the_edge() -> None:
    band = Length(min=100, max=1600)
    assert by_tokens(band, 50, 100, 400, 1600, 3200) == [-1, 0, 2, 4, -1]
    assert by_tokens(band.model_copy(update={"prefer": "short"}), 50, 100, 400, 1600, 3200) == [-1, 4, 2, 0, -1]
    assert by_tokens(band.model_copy(update={"prefer": None}), 50, 100, 400, 1600, 3200) == [-1, 0, 0, 0, -1]


def test_without_a_maximum_long_has_no_end_and_an_empty_text_is_below_every_band() -> None:
    assert by_tokens(Length(), 1, 2, 1 << 30, 0) == [0, 1, 30, -1]
    assert by_tokens(Length(prefer="short"), 1, 1024, 0) == [40, 30, -1]


@given(
    st.lists(st.integers(0, 1 << 24), min_size=2, max_size=20),
    st.integers(1, 1 << 20),
    st.integers(0, 1 << 20),
    st.sampled_from(["long", "short", None]),
)
def test_floor_of_zero_is_the_band_and_the_order_is_the_preference(
    lengths: list[int], low: int, width: int, prefer: str | None
) -> None:
    recipe = Length(prefer=prefer, min=low, max=low + width)
    scores = np.array(by_tokens(recipe, *lengths))
    inside = np.array([low <= n <= low + width for n in lengths])
    assert (inside == (scores >= 0)).all()
    order = {"long": 1, "short": -1, None: 0}[prefer]
    for a, b in zip(np.flatnonzero(inside), np.flatnonzero(inside)[1:], strict=False):
        assert np.sign(scores[b] - scores[a]) in (0, order * np.sign(lengths[b] - lengths[a]))


def test_an_empty_band_is_an_error_that_says_so() -> None:
    with pytest.raises(ValidationError, match=r"max \(5\) is below min \(10\): no text fits"):
        Length(min=10, max=5)
