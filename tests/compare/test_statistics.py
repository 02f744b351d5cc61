"""Intervals hold what they promise, tests reject as often as they say, and small cases come out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.compare import statistics
from pipeline.compare.statistics import Flips, equivalent, flips, holm, interaction, over_items, over_runs


def test_the_bootstrap_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 80), rng.normal(0, 1, 80)
    found = over_items(a, b, seed=1)
    theirs = stats.bootstrap(((a - b),), np.mean, n_resamples=10_000, method="percentile", rng=2).confidence_interval
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert over_items(a, b, seed=1) == found != over_items(a, b, seed=2)


def test_pairs_share_their_items() -> None:
    """What is hard is hard for both: paired, the interval is narrow although the items differ widely."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 200)
    found = over_items(hard + 0.1 + rng.normal(0, 0.1, 200), hard, seed=0)
    assert found.shown
    assert found.high - found.low < 0.05
    three = over_items(np.stack([hard + 0.1] * 3), np.stack([hard] * 3), seed=0)
    assert (three.low, three.high) == pytest.approx((0.1, 0.1))


def test_nothing_is_significant_against_itself() -> None:
    a = np.random.default_rng(0).random(50)
    found = over_items(a, a)
    assert (found.mean, found.low, found.high, found.p, found.shown) == (0, 0, 0, 1, False)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(0).random((2, 37))
    whole = over_items(a, b, seed=3)
    monkeypatch.setattr(statistics, "CHUNK", 1000)
    assert over_items(a, b, seed=3) == whole


def test_a_bootstrap_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [
        (e := over_items(rng.normal(1, 2, 60), np.zeros(60), seed=i, resamples=500)).low <= 1 <= e.high
        for i in range(400)
    ]
    assert 0.91 < np.mean(covered) < 0.98


def test_over_runs_is_students_t() -> None:
    values = np.array([0.2, 0.5, 0.4])
    found, theirs = over_runs(values), stats.ttest_1samp(values, 0)
    low, high = theirs.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, theirs.pvalue))
    same = over_runs(np.array([1.0, 1.0]))
    assert (same.low, same.high, same.p) == (1, 1, 0)


@pytest.mark.parametrize(("seed_spread", "draw_spread"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)])
def test_a_grid_of_seeds_and_draws_covers_as_often_as_it_says(seed_spread: float, draw_spread: float) -> None:
    rng = np.random.default_rng(0)
    shape = (600, 3, 5)
    runs = rng.normal(0, 0.5, shape) + 2
    runs += seed_spread * rng.normal(size=(600, 3, 1)) + draw_spread * rng.normal(size=(600, 1, 5))
    covered = [(e := over_runs(grid)).low <= 2 <= e.high for grid in runs]
    assert np.mean(covered) > 0.92  # conservative where there is no effect of either


def test_a_grid_by_hand() -> None:
    """Rows 1 and 3, columns alike: MS_seed = 2 * 2 = 4 on 1 degree, nothing else: sqrt(4 / 4) = 1 a standard error."""
    found = over_runs(np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(12.7062, abs=1e-3)
    assert found.p == pytest.approx(2 * stats.t.sf(2, 1))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all()
    assert (adjusted <= np.minimum(1, np.array(p) * len(p)) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_equivalence_is_shown_by_items_not_by_their_lack() -> None:
    rng = np.random.default_rng(0)
    dense, pruned = rng.normal(0, 1, 2000), rng.normal(0, 1, 2000)
    assert not over_items(pruned[10:20], dense[10:20]).shown  # which proves nothing
    assert not equivalent(pruned[10:20], dense[10:20], margin=0.15).shown
    assert equivalent(pruned, dense, margin=0.15).shown
    assert not equivalent(pruned + 0.15, dense, margin=0.15).shown
    spread = np.std(pruned - dense, ddof=1) / np.sqrt(2000)
    theirs = stats.norm.sf((0.1 - abs((pruned - dense).mean())) / spread)
    assert equivalent(pruned, dense, margin=0.1).p == pytest.approx(theirs, abs=0.01)
    for margin in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="tests nothing"):
            equivalent(pruned, dense, margin)


def test_net_accuracy_hides_what_flips_show() -> None:
    before = np.repeat([1, 1, 0, 0], [40, 10, 12, 38])
    after = np.repeat([1, 0, 1, 0], [40, 10, 12, 38])
    found = flips(before, after)
    assert found == Flips(gained=12, lost=10, items=100)
    assert (found.net, found.churn) == (0.02, 0.22)
    for wrong in ((before * 0.5, after), (before, after * 2)):
        with pytest.raises(ValueError, match="right"):
            flips(*wrong)


def test_interaction_finds_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    item = rng.normal(0, 3, (1, 300))
    e = item + rng.normal(0, 0.2, (3, 300))
    b = item + 1 + rng.normal(0, 0.2, (3, 300))
    f = e + 0.3 + rng.normal(0, 0.2, (3, 300))
    c = b + 0.3 + 0.2 + rng.normal(0, 0.2, (3, 300))  # pruned models gain 0.2 more of the data
    found = interaction(c, b, f, e)
    assert found.mean == pytest.approx(0.2, abs=0.04)
    assert found.shown
    none = interaction(b + (f - e), b, f, e)
    assert none.mean == pytest.approx(0)
    assert not none.shown or abs(none.high) < 1e-9


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31))
def test_turned_round_the_interval_turns_round(items: int, runs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, runs, items))
    one, other = over_items(a, b, seed, 200), over_items(b, a, seed, 200)
    assert (one.mean, one.low, one.high, one.p) == pytest.approx((-other.mean, -other.high, -other.low, other.p))


def test_errors_at_the_door() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        over_items(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="not pairs"):
        over_items(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="not finite"):
        over_items(np.array([np.nan]), np.zeros(1))
    with pytest.raises(ValueError, match="two seeds"):
        over_runs(np.zeros(1))
    with pytest.raises(ValueError, match="two seeds and two draws"):
        over_runs(np.zeros((3, 1)))
