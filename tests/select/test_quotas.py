from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from pipeline.errors import TamisError
from pipeline.select.quotas import allocate, effective, floors, softmax, water_fill, whole

COMPLEXITY = np.array([0.2, 0.3, 0.4, 0.5]) * np.array([0.5, 0.5, 0.5, 0.6])
SIZES = np.array([400, 60, 50, 90])
ONES = np.ones(4, np.int64)


def test_the_toy_of_density_based_pruning() -> None:
    assert COMPLEXITY.tolist() == pytest.approx([0.10, 0.15, 0.20, 0.30])
    share = softmax(COMPLEXITY, 0.1)
    assert share == pytest.approx([0.078394, 0.129250, 0.213097, 0.579259], abs=5e-7)
    assert share * 240 == pytest.approx([18.8146, 31.0200, 51.1434, 139.0220], abs=5e-5)
    x = water_fill(share * 240, ONES, SIZES, 240)
    assert x == pytest.approx([43.897288, 56.102712, 50, 90], abs=5e-7)
    assert (x - share * 240)[:2] == pytest.approx([25.082700, 25.082700], abs=5e-7)
    assert whole(x, ONES, SIZES, 240).tolist() == [44, 56, 50, 90]
    assert allocate(share, SIZES, 240, ONES).tolist() == [44, 56, 50, 90]
    assert effective(share) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_the_shift_is_additive_not_a_factor() -> None:
    """Clipping lam * t, which shares the surplus in proportion, gives (40, 60, 50, 90)."""
    wanted = softmax(COMPLEXITY, 0.1) * 240
    lam = brentq(lambda a: np.clip(a * wanted, 1, SIZES).sum() - 240, 0.1, 100)
    assert np.clip(lam * wanted, 1, SIZES) == pytest.approx([40, 60, 50, 90], abs=1e-6)
    assert water_fill(wanted, ONES, SIZES, 240)[0] == pytest.approx(43.9, abs=0.01)


@pytest.mark.parametrize(
    ("tau", "share"),
    [
        (0.05, [0.0152, 0.0414, 0.1125, 0.8310]),
        (0.2, [0.1504, 0.1931, 0.2479, 0.4087]),
        (0.5, [0.2075, 0.2294, 0.2535, 0.3096]),
    ],
)
def test_the_temperature_sharpens_shares(tau: float, share: list[float]) -> None:
    assert softmax(COMPLEXITY, tau) == pytest.approx(share, abs=5e-5)


def test_extreme_temperatures_and_equal_complexity() -> None:
    assert softmax(COMPLEXITY, 1e-9) == pytest.approx([0, 0, 0, 1])
    assert softmax(COMPLEXITY, 1e9) == pytest.approx([0.25] * 4)
    assert effective(softmax(np.full(4, 0.3), 0.1)) == pytest.approx(4)


def test_floors_balance_and_give_way() -> None:
    assert floors(np.array([1000, 100]), 220, 0.5).tolist() == [55, 55]
    assert floors(np.array([1000, 0, 3]), 100, 0.5).tolist() == [25, 0, 3]
    assert floors(np.array([9, 9, 9]), 5, 0.5, least=1).tolist() == [1, 1, 1]
    assert floors(np.array([9, 9, 9]), 2, 0.5, least=1).tolist() == [0, 0, 0]  # more concepts than rows


def test_quotas_that_do_not_fit_are_an_error() -> None:
    for total in (3, 601):
        with pytest.raises(TamisError, match="do not fit between 4 and 600"):
            water_fill(np.zeros(4), ONES, SIZES, total)
    assert water_fill(np.zeros(4), ONES, SIZES, 600).tolist() == SIZES.tolist()
    assert water_fill(np.full(4, 9.0), ONES, SIZES, 4).tolist() == [1, 1, 1, 1]


def instances(count: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    rng = np.random.default_rng(11)
    made = []
    for _ in range(count):
        k = int(rng.integers(1, 12))
        upper = rng.integers(0, 10 ** int(rng.integers(1, 7)), k)
        lower = (upper * rng.random(k) * rng.integers(0, 2)).astype(np.int64)
        total = int(rng.integers(lower.sum(), upper.sum() + 1))
        made.append((rng.random(k) ** 3 * upper.sum(), lower, upper, total))
    return made


def test_the_sum_is_exact_and_the_shift_is_one_on_a_thousand_instances() -> None:
    for wanted, lower, upper, total in instances(1000):
        x = water_fill(wanted, lower, upper, total)
        quota = whole(x, lower, upper, total)
        assert quota.sum() == total
        assert ((lower <= quota) & (quota <= upper)).all()
        assert (np.abs(quota - x) < 1 + 1e-6).all()
        free = (x > lower + 1e-6) & (x < upper - 1e-6)
        assert np.ptp((x - wanted)[free]) < 1e-6 * max(total, 1) if free.any() else True


def test_it_is_the_nearest_point_that_a_generic_solver_finds() -> None:
    for wanted, lower, upper, total in instances(1000):
        scale = max(float(upper.max()), 1.0)
        t, low, high = wanted / scale, lower / scale, upper / scale
        found = minimize(
            lambda x, t=t: ((x - t) ** 2).sum() / 2,
            low + (high - low) / 2,
            jac=lambda x, t=t: x - t,
            method="SLSQP",
            bounds=list(zip(low, high, strict=True)),
            constraints={"type": "eq", "fun": lambda x, n=total / scale: x.sum() - n, "jac": lambda x: np.ones_like(x)},
            options={"ftol": 1e-15, "maxiter": 200},
        )
        assert water_fill(wanted, lower, upper, total) / scale == pytest.approx(found.x, abs=1e-6)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 10**13), st.floats(0.001, 1)), min_size=1, max_size=30), st.floats(0, 1))
def test_relabelled_concepts_get_the_same_and_huge_sums_stay_exact(rows: list[tuple[int, float]], part: float) -> None:
    available = np.array([n for n, _ in rows])
    total = int(part * int(available.sum()))
    share = np.array([s for _, s in rows]) / sum(s for _, s in rows)
    lower = floors(available, total, 0.5)
    quota = allocate(share, available, total, lower)
    assert quota.sum() == total
    back = allocate(share[::-1], available[::-1], total, lower[::-1])[::-1]
    assert np.abs(quota - back).max(initial=0) <= 1 + total * 1e-15 * len(rows)
