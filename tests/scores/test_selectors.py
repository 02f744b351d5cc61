"""The selectors on lines and triangles whose answer is known, their properties, and subtopics planted in a cloud."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scores._selectors import (
    GRID,
    From,
    cosines_from,
    coverage_gains,
    distances_from,
    facility_location,
    farthest_first,
    greatest_sum,
    in_two_stages,
    information_gain,
    kernel,
    marginal_relevance,
    nearest_cosines,
    scaled,
)
from pipeline.scores.diversity import Diversity, Method
from pipeline.select.quotas import softmax

LINE = np.array([0, 1, 2, 8, 9, 20])
SIMILARITY = np.array([[1, 0.95, 0.1], [0.95, 1, 0.1], [0.1, 0.1, 1]], np.float32)
METHODS: tuple[Method, ...] = ("facility_location", "k_center", "max_min", "max_sum", "mmr", "mig")


def on_line(points: np.ndarray) -> From:
    return lambda i: np.abs(points - points[i])


def radius(distance: np.ndarray, picks: np.ndarray) -> float:
    return float(distance[:, picks].min(axis=1).max())


def test_k_center_on_a_line() -> None:
    order = farthest_first(on_line(LINE), 6, 3, first=3)  # 8 is nearest to the mean, 6.67
    assert order[:3].tolist() == [3, 5, 0]
    assert radius(np.abs(LINE[:, None] - LINE), order[:3]) == 2  # the best is 1: {1, 8 or 9, 20}


def test_max_min_on_a_line_finds_the_optimum() -> None:
    order = farthest_first(on_line(LINE), 6, 3, first=5)  # 20, whose nearest neighbour is farthest
    assert order[:3].tolist() == [5, 0, 4]
    assert min(abs(int(a) - int(b)) for a, b in ((20, 0), (20, 9), (0, 9))) == 9


def test_max_sum_takes_a_near_copy() -> None:
    """Every inner point has the same sum of distances to both ends: the tie rule takes the copy of an end."""
    order = greatest_sum(on_line(LINE), 6, 3, first=5)
    assert order[:3].tolist() == [5, 0, 1]
    assert radius(np.abs(LINE[:, None] - LINE), order[:3]) == 8


@pytest.mark.parametrize(("lam", "second"), [(1.0, 1), (0.7, 1), (0.5, 2)])
def test_mmr_flips_as_similarity_weighs_more(lam: float, second: int) -> None:
    importance = np.array([1, 0.9, 0.2])
    order = marginal_relevance(lambda i: SIMILARITY[i], importance, 3, lam)
    assert order.tolist() == [0, second, 3 - second]
    value = lam * importance[1:] - (1 - lam) * SIMILARITY[0, 1:]
    np.testing.assert_allclose(value, {1.0: (0.9, 0.2), 0.7: (0.345, 0.11), 0.5: (-0.025, 0.05)}[lam], atol=1e-6)


def test_facility_location_gains() -> None:
    np.testing.assert_allclose(coverage_gains(SIMILARITY, np.zeros(3, np.float32)), [2.05, 2.05, 1.2], rtol=1e-6)
    np.testing.assert_allclose(coverage_gains(SIMILARITY, SIMILARITY[0])[1:], [0.05, 0.90], rtol=1e-5)
    assert facility_location(SIMILARITY, 3).tolist() == [0, 2, 1]


def test_information_gain_and_its_group_sizes() -> None:
    relevance, nearest = np.array([0.8, 0.75, 0.4]), np.array([0.9, 0.9, 0.3])
    gain = information_gain(nearest, relevance)
    np.testing.assert_allclose(gain, [-0.1, -0.15, 0.1])
    np.testing.assert_allclose(12 * softmax(-gain, 1), [4.18, 4.40, 3.42], atol=0.005)


def test_information_gain_puts_both_copies_last() -> None:
    """As the paper writes it the rule looks at all rows: of two copies neither is kept, which a greedy rule does not
    do."""
    x = units(np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32))
    flat = np.zeros(4)
    assert set(np.argsort(-information_gain(nearest_cosines(x), flat), kind="stable")[:2].tolist()) == {2, 3}
    assert marginal_relevance(cosines_from(x), flat, 4, 0.5).tolist() == [0, 2, 3, 1]


def test_mmr_of_a_constant_importance_is_farthest_first() -> None:
    x = cloud(60, 8, 0)
    flat = scaled(np.full(60, 7.0))
    assert not flat.any()
    order = marginal_relevance(cosines_from(x), flat, 60, 0.5)
    np.testing.assert_array_equal(order, farthest_first(distances_from(x), 60, 60, first=0))


def test_a_kernel_is_on_the_grid() -> None:
    x = cloud(50, 16, 1)
    s = kernel(x)
    np.testing.assert_allclose(s, (1 + x @ x.T) / 2, atol=GRID)
    np.testing.assert_array_equal(np.rint(s / GRID) * GRID, s)
    np.testing.assert_array_equal(np.diag(s), 1)
    np.testing.assert_allclose(nearest_cosines(x), np.sort(x @ x.T)[:, -2], atol=GRID)


def units(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def cloud(rows: int, dims: int, seed: int) -> np.ndarray:
    """Unit vectors; a third of the rows repeat another one."""
    rng = np.random.default_rng(seed)
    x = units(rng.standard_normal((rows, dims)))
    return np.asarray(x[rng.integers(0, max(1, rows * 2 // 3), rows)])


def order_of(method: Method, x: np.ndarray, importance: np.ndarray | None = None, **fields: float) -> np.ndarray:
    asked = {"importance": "other"} if method in ("mmr", "mig") else {}
    recipe = Diversity.model_validate({"method": method} | asked | fields)
    n = len(x)
    return recipe.order(x, np.zeros(n) if importance is None else importance, np.random.default_rng(5).permutation(n))


@settings(max_examples=25)
@given(st.sampled_from(METHODS), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([1.0, 0.3]))
def test_every_row_once_whatever_repeats(method: Method, rows: int, seed: int, depth: float) -> None:
    order = order_of(method, cloud(rows, 3, seed), depth=depth)
    assert sorted(order.tolist()) == list(range(rows))


@settings(max_examples=20)
@given(st.sampled_from(METHODS), st.integers(2, 40), st.integers(0, 10**6), st.floats(0.05, 1))
def test_a_smaller_depth_is_a_prefix(method: Method, rows: int, seed: int, depth: float) -> None:
    x = cloud(rows, 4, seed)
    picks = math.ceil(rows * depth)
    short, full = order_of(method, x, depth=depth), order_of(method, x)
    np.testing.assert_array_equal(short[:picks], full[:picks])


@settings(max_examples=20)
@given(st.sampled_from(["k_center", "max_sum", "mmr"]), st.integers(3, 40), st.integers(0, 10**6))
def test_the_order_of_the_rows_does_not_matter(method: Method, rows: int, seed: int) -> None:
    """But for ties, which go to the lowest row. The other selectors have ties wherever two rows are each other's
    nearest."""
    rng = np.random.default_rng(seed)
    x, importance, shuffle = units(rng.standard_normal((rows, 6))), rng.random(rows), rng.permutation(rows)
    there = order_of(method, x, importance)
    np.testing.assert_array_equal(there, shuffle[order_of(method, x[shuffle], importance[shuffle])])


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(0, 10**6))
def test_coverage_is_submodular_and_the_lazy_order_greedy(rows: int, seed: int) -> None:
    s = kernel(cloud(rows, 4, seed))
    order, best, before = facility_location(s, rows), np.zeros(rows, np.float32), np.full(rows, np.inf)
    free = np.ones(rows, bool)
    for row in order:
        gains = coverage_gains(s, best)
        assert (gains <= before).all()
        assert row == np.argmax(np.where(free, gains, -1))  # the lowest of the greatest
        before, free[row] = gains, False
        np.maximum(best, s[row], out=best)


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(0, 10**6))
def test_the_radius_never_grows(rows: int, seed: int) -> None:
    x = cloud(rows, 4, seed)
    order, distance = order_of("k_center", x), np.sqrt(np.maximum(2 - 2 * x @ x.T, 0))
    radii = [radius(distance, order[:m]) for m in range(1, rows + 1)]
    assert (np.diff(radii) <= 1e-6).all()


def subtopics(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """2,000 rows of 50 subtopics whose sizes follow a power law, each of two rows at least."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 51) ** 1.5
    label = np.concatenate([np.repeat(np.arange(50), 2), rng.choice(50, 1900, p=share / share.sum())])
    x = units(rng.standard_normal((50, 32)))[label] + 0.08 * rng.standard_normal((2000, 32))
    return units(x), label


@pytest.mark.parametrize("cap", [None, 500])
def test_planted_subtopics_are_covered(cap: int | None) -> None:
    """A quota of 100 of 2,000 rows, also where the concept is compared in parts."""
    covered: dict[str, list[float]] = {}
    for seed in range(3):
        x, label = subtopics(seed)
        fields = {} if cap is None else {"cap": cap}
        orders = {m: order_of(m, x, depth=0.2, **fields) for m in ("facility_location", "k_center", "max_min")}
        orders["random"] = np.random.default_rng(seed).permutation(2000)
        for name, order in orders.items():
            covered.setdefault(name, []).append(len(set(label[order[:100]].tolist())) / 50)
    share = {name: float(np.mean(found)) for name, found in covered.items()}
    assert share["random"] < 0.7
    assert min(share["facility_location"], share["k_center"], share["max_min"]) > 0.95


def test_two_stages_put_the_union_first() -> None:
    part = np.arange(12) % 3
    order = in_two_stages(lambda rows: np.argsort(rows)[::-1], part, cap=6)  # the greatest row number first
    assert order[:6].tolist() == [11, 10, 9, 8, 7, 6]
    assert order[6:].tolist() == [3, 4, 5, 0, 1, 2]


def test_the_loneliest_come_last_where_they_are_trimmed() -> None:
    rng = np.random.default_rng(0)
    x = units(np.concatenate([np.ones((95, 8)) + 0.2 * rng.standard_normal((95, 8)), rng.standard_normal((5, 8))]))
    assert len(set(order_of("k_center", x)[:6].tolist()) & set(range(95, 100))) >= 4  # outliers are picked first
    last = order_of("k_center", x, trim=0.05)[-5:]
    assert set(last.tolist()) == set(range(95, 100))
    assert (np.diff(nearest_cosines(x)[last]) <= 0).all()
