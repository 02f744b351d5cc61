"""Whole pieces from wanted shares: totals, limits, ties, and what is said where a target cannot be met."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.compress.allocation._fill import free, limits, spread, water
from pipeline.compress.allocation.base import Target
from pipeline.compress.units import Part, Units
from pipeline.errors import ConfigError

parts_ = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=8).map(
    lambda sizes: [Part(str(i), i, n, float(cost)) for i, (n, cost) in enumerate(sizes)]
)
targets = st.builds(
    Target,
    share=st.floats(0, 0.95),
    cap=st.floats(0.1, 1),
    floor=st.integers(0, 3),
    multiple=st.sampled_from([1, 1, 4]),
)


def removed_cost(parts: list[Part], keep: np.ndarray) -> float:
    return sum((p.count - int(k)) * p.cost for p, k in zip(parts, keep, strict=True))


@settings(deadline=None)
@given(parts_, targets, st.randoms(use_true_random=False))
def test_total_is_met_within_half_a_piece_and_limits_hold(parts: list[Part], target: Target, random: Any) -> None:
    shares = np.array([random.random() * (random.random() < 0.8) for _ in parts])
    try:
        keep = spread(parts, target, shares)
    except ConfigError:
        assume(False)
    total = sum(p.parameters for p in parts)
    biggest = max(p.cost for p in parts) * target.multiple
    assert abs(removed_cost(parts, keep) - target.share * total) <= biggest / 2 + 1e-6
    for part, k in zip(parts, keep.tolist(), strict=True):
        assert part.count - k <= target.cap * part.count + 1e-9
        assert k >= min(target.floor, part.count)
        assert k == part.count or k % target.multiple == 0


@settings(deadline=None)
@given(parts_, st.floats(0.01, 0.8), st.floats(0.01, 0.1))
def test_more_is_never_less_to_a_piece(parts: list[Part], share: float, more: float) -> None:
    wanted = np.linspace(1, 2, len(parts))
    before = spread(parts, Target(share, cap=1, floor=0), wanted)
    after = spread(parts, Target(share + more, cap=1, floor=0), wanted)
    assert (after <= before + 1).all()


def test_largest_fractions_get_the_remainder_and_ties_go_to_the_first() -> None:
    parts = [Part(str(i), i, 10, 1.0) for i in range(4)]
    assert spread(parts, Target(0.25), np.full(4, 0.25)).tolist() == [7, 7, 8, 8]
    assert spread(parts, Target(0.25), np.array([0.22, 0.28, 0.24, 0.26])).tolist() == [8, 7, 8, 7]
    # a total between two pieces goes to the nearer one
    assert sum(40 - spread(parts, Target(s), np.ones(4)).sum() for s in (0.26, 0.265)) == 10 + 11


def test_a_limit_that_bites_is_made_up_for_by_the_others_in_proportion() -> None:
    parts = [Part(str(i), i, 100, 1.0) for i in range(3)]
    assert spread(parts, Target(0.5, cap=0.6), np.array([0.9, 0.4, 0.2])).tolist() == [40, 40, 70]
    assert spread(parts, Target(0.5, cap=0.9), np.array([1.0, 0, 0])).tolist() == [10, 70, 70]
    assert water(np.array([3.0, 1, 0]), np.array([1.0, 1, 1]), 1.5).tolist() == [1, 0.5, 0]


def test_heads_go_evenly_from_their_groups_and_widths_stay_multiples() -> None:
    heads = Units("0.query_head", 0, 9, 128.0, "query_head", (), groups=3)
    neurons = Units("0.neuron", 0, 100, 3.0, "neuron", ())
    keep = spread([heads, neurons], Target(0.4, multiple=8), np.full(2, 0.4))
    assert (keep % np.array([3, 8])).tolist() == [0, 0]
    assert keep[0] == 6
    # nothing is cut from a width that is no multiple just to make it one
    assert spread([neurons], Target(0.001, multiple=8), np.ones(1)).tolist() == [100]


def test_layers_that_are_left_out_keep_everything() -> None:
    parts = [Part(str(i), i, 10, 1.0) for i in range(5)] + [Part("hidden", -1, 10, 1.0)]
    assert free(parts, Target(0.5, layers=(1, -1))).tolist() == [False, True, True, True, False, True]
    keep = spread(parts, Target(0.5, layers=(1, -1)), np.full(6, 0.5))
    assert keep.tolist() == [10, 5, 5, 5, 10, 5]


@pytest.mark.parametrize(
    ("target", "most"),
    [(Target(0.95), "0.9 of"), (Target(0.8, floor=3), "0.7 of"), (Target(0.5, layers=(2, None)), "0 of")],
)
def test_a_target_that_cannot_be_met_names_what_can(target: Target, most: str) -> None:
    parts = [Part("a", 0, 10, 1.0), Part("b", 1, 10, 2.0)]
    with pytest.raises(ConfigError, match=f"cannot be met: at most {most}"):
        spread(parts, target, np.ones(2))


def test_nothing_goes_at_ratio_0() -> None:
    parts = [Part("a", 0, 10, 1.0), Part("b", 1, 7, 2.0)]
    assert spread(parts, Target(0.0, multiple=4), np.ones(2)).tolist() == [10, 7]
    assert limits(parts, Target(0.0)).budget == 0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="write the share to remove"):
        Target(share)
