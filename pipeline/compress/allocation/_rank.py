"""One ranking over the pieces of many parts: the lowest go until the budget is reached, no part beyond its limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.compress.allocation._fill import Limits
from pipeline.compress.units import Part, Units
from pipeline.errors import ConfigError


def take_lowest(parts: Sequence[Part], values: Sequence[np.ndarray], bounds: Limits, budget: float) -> np.ndarray:
    """Pieces to remove per part, (parts,) int64: a prefix of the ranking whose parameters come nearest to the budget.

    `values`: per part its pieces' ranks, (count,), comparable across parts. Pieces that go together (heads of all
    groups, multiples) rank by their mean. Ties: the earlier part, then the smaller number of pieces.
    """
    ladders = [
        _ladder(part, value, int(first), int(step), int(most))
        for part, value, first, step, most in zip(parts, values, bounds.first, bounds.step, bounds.most, strict=True)
    ]
    owner = np.repeat(np.arange(len(parts), dtype=np.int32), [len(ladder) for ladder in ladders])
    order = np.argsort(np.concatenate([*ladders, np.empty(0)]), kind="stable")
    owner = owner[order]
    starts = np.zeros(len(owner), bool)
    starts[np.unique(owner, return_index=True)[1]] = True
    size = np.where(starts, bounds.first[owner], bounds.step[owner])
    spent = np.cumsum(size * bounds.cost[owner])
    taken = int(np.searchsorted(spent, budget, side="right"))
    if taken < len(spent) and spent[taken] - budget < budget - (spent[taken - 1] if taken else 0.0):
        taken += 1
    removed: np.ndarray = np.bincount(owner[:taken], weights=size[:taken], minlength=len(parts)).astype(np.int64)
    return removed


def pieces(evidence_scores: Sequence[np.ndarray] | None, parts: Sequence[Part], kind: str) -> list[np.ndarray]:
    """Every part's scores, float64. Raises ConfigError where there are none."""
    if evidence_scores is None:
        raise ConfigError(f"allocation {kind}: ranks scores, and here nothing is scored beforehand; use another one")
    return [np.asarray(score, np.float64) for score in evidence_scores]


def _ladder(part: Part, values: np.ndarray, first: int, step: int, most: int) -> np.ndarray:
    """Mean value of what goes at the first, second, ... time that pieces of a part go; ascending."""
    if not np.isfinite(values).all():
        raise ValueError(f"{part.name}: {np.count_nonzero(~np.isfinite(values))} scores are not finite")
    groups = part.groups if isinstance(part, Units) else 1
    ranked: np.ndarray = np.sort(values.reshape(groups, -1), axis=1).mean(0)
    first, step, most = first // groups, step // groups, most // groups
    if most == 0:
        return np.empty(0)
    if step == 1:
        return ranked[:most]
    rest = ranked[first:most].reshape(-1, step).mean(1)
    return np.concatenate([[ranked[:first].mean()], rest])
