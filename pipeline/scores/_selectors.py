"""Greedy subset selectors as plain NumPy: from the rows of one concept to the order in which they are picked.

An order is nested: its first m rows are what the same greedy picks for a quota of m. Every selector returns all n rows,
the first m of them picked one by one, the others behind them by what each would add after those m. Ties go to the
lowest row, and no row comes twice, duplicates or not.

- `farthest_first`: the row with the greatest distance to its nearest pick. k-center (Gonzalez 1985) and max-min
  (DivPrune, Alvar et al. 2025), which differ in the first pick.
- `greatest_sum`: the greatest sum of distances to all picks. Max-sum (ToDRE v2, Li et al. 2025, arXiv 2505.18757).
- `marginal_relevance`: lam * importance - (1 - lam) * similarity to the nearest pick. MMR (IDPruner, Tencent 2026).
- `facility_location`: the greatest gain of the sum over all rows of the similarity to the nearest pick. Classic.
- `information_gain`: alpha * relevance - beta * similarity to the nearest other row, picked or not. MIG (COMI 2026).

Those papers choose visual tokens or groups of a context; that their rules help with rows of a corpus is not their
claim. k-center stays within twice the best radius and max-min above half of the best least distance, both in a metric:
1 - cosine is none, but sqrt(2 - 2 cosine) is one and gives the same order. Facility location reaches 1 - 1/e of the
best coverage.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

From = Callable[[int], np.ndarray]
"""Number of a row to the distances, or similarities, of all n rows to it; (n,)."""

GRID = 2.0**-20
"""Cosines of a matrix product are rounded to this: their last bits depend on threads and neighbours. Sums of what is on
the grid are exact in float64, so ties are ties whatever the order of the rows."""
BLOCK = 1024


def cosines_from(x: np.ndarray) -> From:
    """Of (n, d) unit vectors; row by row, so no value depends on its neighbours."""
    return lambda i: np.asarray(np.vecdot(x, x[i]))


def distances_from(x: np.ndarray) -> From:
    """1 - cosine of (n, d) unit vectors."""
    return lambda i: np.asarray(1 - np.vecdot(x, x[i]))


def farthest_first(distance: From, n: int, m: int, first: int) -> np.ndarray:
    """k-center where `first` is the most central row, max-min where it is the loneliest; order of n rows, int64.

    m calls of `distance`, and no n x n matrix.
    """
    return _greedy(distance, n, m, first, np.minimum, lambda least: least)


def greatest_sum(distance: From, n: int, m: int, first: int) -> np.ndarray:
    """Max-sum: takes the border of the cloud, near copies of its rows among it, and leaves the middle for last."""
    return _greedy(distance, n, m, first, np.add, lambda total: total)


def marginal_relevance(similarity: From, importance: np.ndarray, m: int, lam: float) -> np.ndarray:
    """MMR from the row of greatest importance; `importance` (n,) on the scale of a similarity, see `scaled`."""
    first = int(np.argmax(importance))
    return _greedy(similarity, len(importance), m, first, np.maximum, lambda most: lam * importance - (1 - lam) * most)


def _greedy(
    near: From, n: int, m: int, first: int, fold: Callable[..., np.ndarray], worth: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """`fold` joins what `near` says of the chosen rows to one number a row, and `worth` makes its value of that."""
    picks, free, row = np.empty(min(m, n), np.int64), np.ones(n, bool), first
    held, values = np.empty(0), np.zeros(n)
    for at in range(len(picks)):
        picks[at], free[row] = row, False
        seen = near(row).astype(np.float64)
        held = fold(held, seen) if at else seen
        values = np.where(free, worth(held), -np.inf)
        row = int(np.argmax(values))
    return _completed(picks, values)


def _completed(picks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The picks, and behind them the other rows by descending value; int64 (n,)."""
    order = np.argsort(-values, kind="stable")
    return np.concatenate([picks, order[~np.isin(order, picks)]])


def facility_location(similarity: np.ndarray, m: int) -> np.ndarray:
    """Lazy greedy over an (n, n) `kernel`, Minoux 1978; order of n rows, int64.

    Gains only fall, so the row on top of the heap is picked as soon as its gain is known anew and leaves it there.
    """
    n = len(similarity)
    picks, best = np.empty(min(m, n), np.int64), np.zeros(n, np.float32)
    heap = [(-gain, row, 0) for row, gain in enumerate(coverage_gains(similarity, best).tolist())]
    heapq.heapify(heap)
    for at in range(len(picks)):
        while heap[0][2] < at:
            row = heap[0][1]
            gain = coverage_gains(similarity[row : row + 1], best)[0]
            heapq.heapreplace(heap, (-float(gain), row, at))
        picks[at] = row = heapq.heappop(heap)[1]
        np.maximum(best, similarity[row], out=best)
    return _completed(picks, coverage_gains(similarity, best))


def coverage_gains(similarity: np.ndarray, best: np.ndarray) -> np.ndarray:
    """sum_j max(0, S_ij - best_j) of every row i of S (r, n), where `best` (n,) is what is covered; float64 (r,)."""
    gains = [
        np.maximum(similarity[at : at + BLOCK] - best, 0).sum(axis=1, dtype=np.float64)
        for at in range(0, len(similarity), BLOCK)
    ]
    return np.concatenate(gains)


def kernel(x: np.ndarray) -> np.ndarray:
    """(1 + cosine) / 2 of (n, d) unit vectors, on the grid in [0, 1]; float32 (n, n), so 4 n^2 bytes."""
    similarity: np.ndarray = x @ x.T
    for block in (similarity[at : at + BLOCK] for at in range(0, len(x), BLOCK)):
        np.rint((block + 1) * np.float32(0.5 / GRID), out=block)
        block *= np.float32(GRID)
        np.clip(block, 0, 1, out=block)
    return similarity


def nearest_cosines(x: np.ndarray) -> np.ndarray:
    """Cosine of each of (n, d) unit vectors to the nearest other one, on the grid; float32 (n,), -1 where n = 1."""
    nearest = np.empty(len(x), np.float32)
    for at in range(0, len(x), BLOCK):
        cosine = x[at : at + BLOCK] @ x.T
        cosine[np.arange(len(cosine)), at + np.arange(len(cosine))] = -1
        nearest[at : at + BLOCK] = cosine.max(axis=1)
    return on_grid(nearest)


def on_grid(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.rint(values / GRID) * GRID, np.float32)


def information_gain(nearest: np.ndarray, relevance: np.ndarray, alpha: float = 1.0, beta: float = 1.0) -> np.ndarray:
    """MIG of n rows from `nearest_cosines` and a relevance on their scale; (n,).

    Not a greedy rule: of two copies both are marked down, neither is spared.
    """
    return np.asarray(alpha * relevance - beta * nearest)


def scaled(importance: np.ndarray) -> np.ndarray:
    """Min-max scaled as in IDPruner's code, (I - min) / (max - min + 1e-6); zeros where it is constant."""
    low, high = float(importance.min()), float(importance.max())
    return np.asarray((importance - low) / (high - low + 1e-6), np.float64)


def in_two_stages(order_of: Callable[[np.ndarray], np.ndarray], part: np.ndarray, cap: int) -> np.ndarray:
    """Greedy on parts, then on the union of their first picks: composable core-sets, for concepts too large to compare.

    `order_of`: the rows of a subset to their order, as places in the subset; `part` (n,): which part each row is in.
    The union, about `cap` rows, comes first in its own order; the others follow in those of their parts, side by side.
    k-center and facility location lose a constant factor by it.
    """
    rank = np.empty(len(part), np.int64)
    parts = int(part.max()) + 1
    for number in range(parts):
        rows = np.flatnonzero(part == number)
        rank[rows[order_of(rows)]] = np.arange(len(rows))
    first = max(1, cap // parts)
    union, rest = np.flatnonzero(rank < first), np.flatnonzero(rank >= first)
    head = union[order_of(union)]
    return np.concatenate([head, rest[np.argsort(rank[rest], kind="stable")]])
