"""Which branches go: one shot, greedily, or as the cheapest set that is large enough.

Candidates have a cost in parameters; a choice comes to the target as near as whole candidates do. What would overshoot
by more than is missing is passed over. Of candidates that are `needed` (n,) bool, one stays: a model without any
attention is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.compress.allocation._knapsack import cheapest

Evaluate = Callable[[Sequence[int], Sequence[int]], np.ndarray]
"""(already left out, candidates) -> distance from the dense output with each candidate left out besides."""


def one_shot(cost: np.ndarray, harm: np.ndarray, target: float, needed: np.ndarray | None = None) -> list[int]:
    """The candidates with the least harm, one by one; ties to the first."""
    chosen: list[int] = []
    for i in np.argsort(harm, kind="stable").tolist():
        if i in _fitting(cost, target, chosen, needed):
            chosen.append(i)
    return chosen


def greedy(
    cost: np.ndarray,
    target: float,
    evaluate: Evaluate,
    late: np.ndarray | None = None,
    after: float = 0.0,
    needed: np.ndarray | None = None,
) -> list[int]:
    """At each step the candidate whose loss besides what is gone does least harm; in the order in which they went.

    `late`: candidates, (n,) bool, that may go only once more than `after` parameters are gone, or when no other fits.
    """
    chosen: list[int] = []
    late = np.zeros(len(cost), bool) if late is None else late
    while True:
        gone = float(cost[chosen].sum())
        fitting = _fitting(cost, target, chosen, needed)
        early = [i for i in fitting if gone > after or not late[i]]
        if not fitting:
            return chosen
        trial = early or fitting
        chosen.append(trial[int(np.argmin(evaluate(chosen, trial)))])


def least_sum(cost: np.ndarray, harm: np.ndarray, target: float, needed: np.ndarray | None = None) -> list[int] | None:
    """The set of at least `target` parameters whose harms add up to the least; None where all are too few."""
    sizes, prices = [np.array([0.0, c]) for c in cost.tolist()], [np.array([0.0, h]) for h in harm.tolist()]
    levels = cheapest(sizes, prices, target, bins=10_000)
    if levels is not None and needed is not None and needed.any() and levels[needed].all():
        found = []
        for spared in np.flatnonzero(needed):
            without = [size * (i != spared) for i, size in enumerate(sizes)]
            found.append(cheapest(without, prices, target, bins=10_000))
        possible = [other for other in found if other is not None]
        levels = min(possible, key=lambda other: float(harm[other > 0].sum())) if possible else None
    return None if levels is None else np.flatnonzero(levels).tolist()


def _fitting(cost: np.ndarray, target: float, chosen: Sequence[int], needed: np.ndarray | None) -> list[int]:
    """Candidates that may go next: with them the total is nearer to the target, and one that is needed stays."""
    missing = target - float(cost[list(chosen)].sum())
    fits = cost < 2 * missing * (1 - 1e-12)
    fits[list(chosen)] = False
    if needed is not None and needed.sum() - needed[list(chosen)].sum() == 1:
        fits &= ~needed
    found: list[int] = np.flatnonzero(fits).tolist()
    return found
