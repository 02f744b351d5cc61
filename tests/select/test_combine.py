from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import TamisError
from pipeline.hashing import row_keys
from pipeline.select.combine import Combination, Moments, Percentiles, gumbel, mixed, percentile

A, B = np.array([4, 3, 2, 1], np.float32), np.array([2, 4, 1, 3], np.float32)  # ranks 1 2 3 4 and 3 1 4 2
BOTH = np.ones(2)


def combination(rule: str, weights: tuple[float, ...] = (1, 1)) -> Combination:
    return Combination(rule, ("a.score", "b.score"), weights, 0, 0, None)


def apply(memory_run: Any, rule: str, a: np.ndarray, b: np.ndarray, **options: Any) -> np.ndarray:
    run = memory_run.of({"a.score": a, "b.score": b}, shards=2, batch_rows=3)
    kind = Moments if rule == "zscore" else Percentiles
    batch = pa.record_batch({"a.score": pa.array(a), "b.score": pa.array(b)})
    return combination(rule, **options).apply(run.aggregate(kind(("a.score", "b.score"))), batch)


def test_the_toy_of_ranks(memory_run: Any) -> None:
    assert apply(memory_run, "rrf", A, B) == pytest.approx([0.032266, 0.032522, 0.031498, 0.031754], abs=5e-7)
    assert apply(memory_run, "geometric", A, B) == pytest.approx([0.5728, 0.7395, 0.2165, 0.2795], abs=5e-5)
    mean = apply(memory_run, "rank", A, B)
    assert 4 * (1 - mean) + 0.5 == pytest.approx([2, 1.5, 3.5, 3])
    for rule in ("rrf", "geometric", "rank"):
        assert np.argsort(-apply(memory_run, rule, A, B)).tolist() == [1, 0, 3, 2]


def test_fusion_prefers_one_first_place_and_the_mean_prefers_two_fair_ones() -> None:
    p = 1 - (np.array([[1, 40], [100, 40]]) - 0.5) / 1000
    fused, mean = mixed("rrf", p, BOTH, 1000), mixed("rank", p, BOTH, 1000)
    assert fused == pytest.approx([0.02264, 0.02000], abs=5e-6)
    assert 1000 * (1 - mean) + 0.5 == pytest.approx([50.5, 40])


def test_minimum_is_good_in_all_and_maximum_good_in_any(memory_run: Any) -> None:
    assert apply(memory_run, "minimum", A, B) * 8 == pytest.approx([3, 5, 1, 1])
    assert apply(memory_run, "maximum", A, B) * 8 == pytest.approx([7, 7, 3, 5])


def test_weights_are_shares(memory_run: Any) -> None:
    heavy = apply(memory_run, "rank", A, B, weights=(3.0, 1.0))
    assert heavy == pytest.approx(0.75 * np.array([7, 5, 3, 1]) / 8 + 0.25 * np.array([3, 7, 1, 5]) / 8)


def test_ties_share_their_middle_rank_and_a_scale_does_not_matter(memory_run: Any) -> None:
    tied = np.array([1, 1, 1, 0], np.float32)
    run = memory_run.of({"a.score": tied})
    table = run.aggregate(Percentiles(("a.score",)))
    assert percentile(table, 0, tied) == pytest.approx([5 / 8, 5 / 8, 5 / 8, 1 / 8])
    assert apply(memory_run, "rank", A, B) == pytest.approx(apply(memory_run, "rank", np.exp(A), B * 1000))


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50), shards=st.integers(1, 4))
def test_percentiles_keep_the_order_and_stay_within_a_bin(memory_run: Any, values: list[float], shards: int) -> None:
    scores = np.array(values, np.float32) + np.float32(0)
    table = memory_run.of({"a.score": scores}, shards).aggregate(Percentiles(("a.score",)))
    p = percentile(table, 0, scores)
    assert ((scores[:, None] < scores) <= (p[:, None] < p)).all()
    assert ((scores[:, None] == scores) <= (p[:, None] == p)).all()
    exact = ((scores < scores[:, None]).sum(axis=1) + (scores <= scores[:, None]).sum(axis=1)) / 2 / len(scores)
    share = table["count"][0][scores.view(np.uint32) >> 16 ^ np.where(scores < 0, 0xFFFF, 0x8000)] / len(scores)
    assert (np.abs(p - exact) <= share).all()
    assert p.min() > 0
    assert p.max() < 1


def test_the_error_of_interpolation_on_a_million_normals(memory_run: Any) -> None:
    scores = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    table = memory_run.of({"a.score": scores}, 3, 65_536).aggregate(Percentiles(("a.score",)))
    exact = (np.argsort(np.argsort(scores)) + 0.5) / len(scores)
    assert np.abs(percentile(table, 0, scores) - exact).max() < 3e-4


def test_z_scores_are_the_textbooks_and_a_constant_says_nothing(memory_run: Any) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(5, 2, 40).astype(np.float32), rng.normal(-1, 9, 40).astype(np.float32)
    z = [(v.astype(np.float64) - v.mean(dtype=np.float64)) / v.std(dtype=np.float64) for v in (a, b)]
    assert apply(memory_run, "zscore", a, b, weights=(1.0, 3.0)) == pytest.approx((z[0] + 3 * z[1]) / 4)
    assert apply(memory_run, "zscore", a, np.full(40, 7, np.float32)) == pytest.approx(z[0] / 2)
    with pytest.raises(TamisError, match=r"infinite.*combine: rank"):
        apply(memory_run, "zscore", a, np.full(40, np.inf, np.float32))


def test_first_picks_of_gumbel_are_the_softmax_and_inclusion_follows_the_score() -> None:
    scores = np.array([0.0, 0.5, 1.0, 2.0])
    keys = row_keys(pa.array([str(i) for i in range(4)]))
    order = np.argsort([-(scores / 0.8 + gumbel(keys, seed)) for seed in range(20_000)], axis=1)
    first = np.bincount(order[:, 0], minlength=4) / len(order)
    share = np.exp(scores / 0.8) / np.exp(scores / 0.8).sum()
    assert first == pytest.approx(share, abs=4 * 0.5 / np.sqrt(len(order)))
    included = np.bincount(order[:, :2].ravel(), minlength=4)
    assert (np.diff(included) > 0).all()
