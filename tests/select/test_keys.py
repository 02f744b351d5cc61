from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.select.keys import order_keys

floats = st.floats(width=32, allow_nan=False)


@given(st.lists(floats, min_size=2))
def test_keys_order_as_the_scores_do(values: list[float]) -> None:
    scores = np.array(values, np.float32)
    keys = order_keys(scores)
    assert ((keys[:, None] < keys) == (scores[:, None] < scores)).all()
    assert ((keys[:, None] == keys) == (scores[:, None] == scores)).all()


def test_both_zeros_are_one_and_infinities_are_the_ends() -> None:
    low, below, zero, minus, high = order_keys(np.array([-np.inf, -1e-45, 0.0, -0.0, np.inf], np.float32)).tolist()
    assert minus == zero == 2**31 > below
    assert 0 < low < below < zero < high < 2**32 - 1


def test_a_nan_and_another_type_are_refused() -> None:
    for bits in (0x7FC00000, 0x7F800001, 0xFFFFFFFF):
        with pytest.raises(ValueError, match="NaN"):
            order_keys(np.array([0, bits], np.uint32).view(np.float32))
    with pytest.raises(TypeError, match="float64"):
        order_keys(np.zeros(3))
