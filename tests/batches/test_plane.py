"""The error-uncertainty plane: the numbers of the example, beside a slow definition, properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.batches._plane import bisect, lowest, quadrants, quantile, smoothed, support, thresholds
from pipeline.batches.q_tuning import QTuning

PERPLEXITY = np.array([2, 3, 4, 5, 6, 8, 9, 20.0])
ENTROPY = np.array([0.5, 1.6, 0.9, 1.8, 1.0, 0.6, 1.9, 0.7])
TOKENS = np.array([1, 9, 1, 2, 10.0])


def test_the_isolated_spike_survives_and_the_one_at_the_edge_goes() -> None:
    found = smoothed(TOKENS, np.array([5]), 0.5)
    np.testing.assert_allclose(found, [3, 5, 3.25, 3.75, 8])
    assert lowest(found, np.array([5]), 0.6).nonzero()[0].tolist() == [0, 2, 3]
    assert lowest(found, np.array([5]), 0.8).nonzero()[0].tolist() == [0, 1, 2, 3]


def test_rows_are_smoothed_each_by_itself() -> None:
    both, lengths = np.concatenate([TOKENS, TOKENS[:1], TOKENS]), np.array([5, 1, 5])
    alone = smoothed(TOKENS, np.array([5]), 0.5)
    np.testing.assert_allclose(smoothed(both, lengths, 0.5), [*alone, 1, *alone])
    assert lowest(smoothed(both, lengths, 0.5), lengths, 0.6).sum() == 3 + 1 + 3  # one token is never masked


def test_support_of_the_example() -> None:
    expected = [0, 0.7302, 0.1746, 0.7619, 0.1349, 0.2619, 0.6111, 0.8571]
    np.testing.assert_allclose(support(PERPLEXITY, ENTROPY), expected, atol=5e-5)
    assert support(np.full(4, 3.0), np.full(4, 1.0)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("share", "alpha", "mistakes", "unsure", "kept"),
    [
        (0.25, 0.25, [5, 7], [1], [1, 7]),
        (0.5, 0.375, [5, 7], [1, 3], [1, 3, 5, 7]),
        (0.75, 0.49, [5, 7], [1, 3], [1, 2, 3, 5, 6, 7]),
    ],
)
def test_the_batch_of_the_example(
    share: float, alpha: float, mistakes: list[int], unsure: list[int], kept: list[int]
) -> None:
    found = bisect(PERPLEXITY, ENTROPY, share)
    assert alpha <= found < alpha + 0.49 / 2**9
    rows, quadrant, filled = QTuning(rows=share).choose(PERPLEXITY, ENTROPY)
    assert (quadrant == 2).nonzero()[0].tolist() == mistakes
    assert (quadrant == 4).nonzero()[0].tolist() == unsure
    assert rows.tolist() == kept
    assert filled == pytest.approx(1 / 3 if share == 0.75 else 0)


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 100)), st.floats(0, 1))
def test_a_quantile_is_the_smallest_that_a_share_does_not_exceed(values: np.ndarray, share: float) -> None:
    found = quantile(values, share)
    assert (values <= found).mean() >= share - 1e-8
    assert found in values
    smaller = values[values < found]
    assert not len(smaller) or (values <= smaller.max()).mean() < share + 1e-8


@settings(max_examples=50)
@given(st.integers(8, 60), st.floats(0.05, 1), st.integers(0, 1000))
def test_exactly_the_share_is_kept_in_any_order(size: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    perplexity, entropy, order = rng.gamma(2, 3, size), rng.gamma(2, 1, size), rng.permutation(size)
    recipe = QTuning(rows=share)
    assume(len(set(support(perplexity, entropy))) == size)  # ties go by position
    kept, quadrant, _ = recipe.choose(perplexity, entropy)
    assert len(kept) == max(1, int(share * size + 1e-9))
    again, same, _ = recipe.choose(perplexity[order], entropy[order])
    assert set(order[again]) == set(kept)
    np.testing.assert_array_equal(same, quadrant[order])
    wanted = np.isin(quadrant, (2, 4))
    assert wanted[kept].sum() == min(len(kept), wanted.sum())  # support fills in, and never takes their place


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0.05, 1), st.integers(0, 99))
def test_so_many_tokens_of_each_row_stay(lengths: list[int], share: float, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 5, sum(lengths)).astype(float)  # many ties
    mask = np.split(lowest(values, np.array(lengths), share), np.cumsum(lengths)[:-1])
    for kept, row in zip(mask, np.split(values, np.cumsum(lengths)[:-1]), strict=True):
        assert kept.sum() == max(1, int(share * len(row) + 1e-9))
        assert not (~kept).any() or row[kept].max() <= row[~kept].min()


def test_larger_alphas_hold_more_rows() -> None:
    rng = np.random.default_rng(0)
    perplexity, entropy = rng.normal(size=500), rng.normal(size=500)
    sizes = [
        np.count_nonzero(quadrants(perplexity, entropy, thresholds(perplexity, entropy, alpha)))
        for alpha in (0.05, 0.2, 0.35, 0.49)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 450
