"""How a budget is shared among concepts: wanted shares, then the nearest feasible whole numbers.

Source: Density-Based Pruning (Abbas et al. 2024, arXiv 2401.04578), whose quadratic program has the closed form of
`water_fill`; no solver is needed and, unlike rounding a solver's output, the sum is exact. All amounts are in the unit
of the budget (rows, tokens or bytes).
"""

from __future__ import annotations

import numpy as np

from pipeline.errors import TamisError


def softmax(values: np.ndarray, tau: float) -> np.ndarray:
    """exp(v / tau) / sum, max-subtracted so that any tau > 0 is safe; float64 (k,). Empty in, empty out."""
    weight = np.exp((values - values.max(initial=-np.inf)) / tau)
    return np.asarray(weight / weight.sum())


def water_fill(wanted: np.ndarray, lower: np.ndarray, upper: np.ndarray, total: float) -> np.ndarray:
    """The point nearest to `wanted` in L2 with lower <= x <= upper and sum x = total; float64 (k,).

    KKT: x = clip(wanted + lam, lower, upper) with one lam for all, found among the 2k breakpoints of the sum, which
    is piecewise linear in lam. The shift is additive: what a capped concept leaves is shared equally by the others.
    Raises TamisError where the bounds leave no such point.
    """
    if not lower.sum() <= total <= upper.sum():
        raise TamisError(f"quotas that sum to {total:g} do not fit between {lower.sum():g} and {upper.sum():g}")
    points = np.concatenate([lower - wanted, upper - wanted])
    order = np.argsort(points, kind="stable")
    points = points[order]
    free = np.cumsum(np.where(order < len(wanted), 1, -1))  # concepts strictly between their bounds after each point
    sums = lower.sum() + np.concatenate([[0.0], np.cumsum(free[:-1] * np.diff(points))])
    at = int(np.clip(np.searchsorted(sums, total, side="right") - 1, 0, len(points) - 1))
    lam = points[at] + (total - sums[at]) / max(free[at], 1)
    return np.asarray(np.clip(wanted + lam, lower, upper))


def whole(x: np.ndarray, lower: np.ndarray, upper: np.ndarray, total: int) -> np.ndarray:
    """Round to integers within bounds that sum to `total` exactly, by largest remainder, ties by index; int64 (k,)."""
    quota: np.ndarray = np.clip(np.floor(x).astype(np.int64), lower, upper)
    order = np.argsort(quota - x, kind="stable")
    while missing := total - int(quota.sum()):
        room = (
            order[quota[order] < upper[order]] if missing > 0 else order[::-1][quota[order[::-1]] > lower[order[::-1]]]
        )
        quota[room[: abs(missing)]] += np.sign(missing)
    return quota


def floors(available: np.ndarray, total: int, balance: float, least: int = 0) -> np.ndarray:
    """min(n_j, max(least, floor(balance * total / k))) over the k concepts that have anything; int64 (k,).

    Zeros where they would sum to more than `total`, which needs more concepts than units to share.
    """
    share = int(balance * total / max(int((available > 0).sum()), 1))
    lower = np.minimum(available, max(share, least))
    return lower if lower.sum() <= total else np.zeros_like(lower)


def allocate(share: np.ndarray, available: np.ndarray, total: int, lower: np.ndarray) -> np.ndarray:
    """Whole quotas near `share * total`, between `lower` and `available`, that sum to `total` exactly; int64 (k,)."""
    x = water_fill(share * total, lower.astype(np.float64), available.astype(np.float64), total)
    return whole(x, lower, available, total)


def effective(share: np.ndarray) -> float:
    """exp of the entropy of the shares: how many concepts would hold as much if all had the same."""
    positive = share[share > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))
