"""The cheapest choice of one level for each item: a knapsack with multiple choice, by dynamic programming.

O(items x levels x bins) additions, vectorised over bins. Allocation asks how much to take from each part, depth whether
to take a branch (two levels: no and yes).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cheapest(
    sizes: Sequence[np.ndarray], prices: Sequence[np.ndarray], target: float, bins: int = 1000
) -> np.ndarray | None:
    """The level of each item, (items,) int64, that together take at least `target` at the least price.

    sizes[i], prices[i]: (levels,) what item i gives at each level and what it costs; a size of 0 must be among them.
    Sizes are rounded down to a `bins`-th of the target, unless they all are multiples of something larger, which is
    exact. None where all together do not come to the target. Ties: the smaller level of the later item.
    """
    if target <= 0:
        return np.array(
            [int(np.argmin(np.where(size == 0, price, np.inf))) for size, price in zip(sizes, prices, strict=True)]
        )
    unit = target / bins
    whole = np.concatenate([np.rint(size).astype(np.int64) for size in sizes])
    if (whole == np.concatenate(list(sizes))).all() and (common := int(np.gcd.reduce(whole))) > unit:
        unit = float(common)
    goal = int(np.ceil(target / unit - 1e-9))
    best = np.full(goal + 1, np.inf)  # price of having taken so many bins; the last: so many or more
    best[0] = 0
    chosen = np.empty((len(sizes), goal + 1), np.int64)
    came = np.empty((len(sizes), goal + 1), np.int64)
    for i, (size, price) in enumerate(zip(sizes, prices, strict=True)):
        taken = np.minimum(np.floor(size / unit + 1e-9).astype(np.int64), goal)
        now = np.full(goal + 1, np.inf)
        for level in range(len(size)):
            t = int(taken[level])
            offer = np.full(goal + 1, np.inf)
            source = np.arange(goal + 1) - t
            offer[t:] = best[: goal + 1 - t] + price[level]
            # from the states that the step would carry beyond the goal, the cheapest
            if t:
                last = goal - t + int(np.argmin(best[goal - t :]))
                offer[goal], source[goal] = best[last] + price[level], last
            better = offer < now
            now[better], chosen[i, better], came[i, better] = offer[better], level, source[better]
        best = now
    if not np.isfinite(best[goal]):
        return None
    levels, at = np.empty(len(sizes), np.int64), goal
    for i in reversed(range(len(sizes))):
        levels[i] = chosen[i, at]
        at = int(came[i, at])
    return levels


def rising(values: np.ndarray) -> np.ndarray:
    """The nearest sequence (least squares) that never falls: neighbours that do are averaged until none does."""
    blocks: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])
