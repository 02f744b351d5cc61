"""Which units go: exactly so many, ties from the lowest index, evenly from groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compress.units import Part, lowest

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=24)


def test_ties_do_not_remove_more_than_was_asked() -> None:
    """Half of (.5, 1, 1, 1, 2, 2, 3, 4) is four; a threshold at the fourth value and `<=` at a half would take six."""
    assert lowest(np.array([0.5, 1, 1, 1, 2, 2, 3, 4]), 4).tolist() == [0, 1, 2, 3]
    assert lowest(np.array([2.0, 1, 1, 1, 1, 9]), 4).tolist() == [1, 2]


def test_groups_lose_the_same_number() -> None:
    assert lowest(np.array([1.0, 2, 3, 9, 8, 7]), 4, groups=2).tolist() == [0, 5]
    with pytest.raises(ValueError, match="1 of 6 units cannot be removed evenly from 2 groups"):
        lowest(np.arange(6.0), 5, groups=2)


@given(SCORES, st.data())
def test_what_goes_scores_no_more_than_what_stays(scores: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(scores)))
    values = np.array(scores)
    gone = lowest(values, keep)
    assert len(gone) == len(scores) - keep
    assert (np.diff(gone) > 0).all()
    stays = np.delete(values, gone)
    if len(gone) and len(stays):
        assert values[gone].max() <= stays.min()


@pytest.mark.parametrize("keep", [-1, 4])
def test_a_number_out_of_range_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=f"{keep} of 3 units cannot be kept"):
        lowest(np.arange(3.0), keep)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        lowest(np.array([1.0, bad, 2.0]), 1)


def test_parameters_of_a_part() -> None:
    assert Part("0.neuron", 0, 48, 96.0).parameters == 4608
