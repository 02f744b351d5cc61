"""From wanted shares to whole pieces: what every allocation ends with.

What limits a part: at least `floor` pieces stay, at most `cap` of it goes, heads go evenly from their groups, widths
stay multiples, and layers that are left out keep everything. `spread` meets the target within those limits; a share
that a limit cuts short is made up for by the others, in proportion to their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.compress.allocation.base import Target
from pipeline.compress.units import Part, Units
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """How many pieces each part may lose: 0, or `first` plus any number of `step`s, up to `most`; (parts,) int64."""

    first: np.ndarray
    step: np.ndarray
    most: np.ndarray
    cost: np.ndarray
    """Parameters of one piece, (parts,) float64."""
    budget: float
    """Parameters that are to go."""

    def down(self, removed: np.ndarray) -> np.ndarray:
        """The largest numbers allowed that are not above some (float) ones."""
        removed = np.minimum(np.floor(removed + 1e-9).astype(np.int64), self.most)
        return np.where(removed < self.first, 0, removed - (removed - self.first) % self.step)

    def only(self, chosen: np.ndarray) -> Limits:
        """Of some of the parts, by a mask; the budget is that of all."""
        return Limits(self.first[chosen], self.step[chosen], self.most[chosen], self.cost[chosen], self.budget)

    def up(self, removed: np.ndarray) -> np.ndarray:
        """The next allowed numbers above some allowed ones; they may be above `most`."""
        return np.where(removed == 0, self.first, removed + self.step)


def free(parts: Sequence[Part], target: Target) -> np.ndarray:
    """Which parts may lose something, (parts,) bool: those of no layer (-1) and of layers that are not left out."""
    layers = np.array([part.layer for part in parts], np.int64)
    depth = int(layers.max(initial=-1)) + 1
    first, end, _ = slice(*target.layers).indices(depth)
    return (layers < 0) | ((layers >= first) & (layers < end))


def limits(parts: Sequence[Part], target: Target) -> Limits:
    """Raises ConfigError where the target cannot be met, and says what could."""
    count = np.array([part.count for part in parts], np.int64)
    cost = np.array([part.cost for part in parts], np.float64)
    step = np.array([_step(part, target) for part in parts], np.int64)
    open_ = free(parts, target)
    most = np.minimum(np.floor(target.cap * count + 1e-9).astype(np.int64), count - target.floor)
    most = np.where(open_, np.maximum(most, 0), 0)
    first = np.where(count % step == 0, step, count % step)
    prunable = float((count * cost)[open_].sum())
    bounds = Limits(first, step, most, cost, target.share * prunable)
    bounds = Limits(first, step, bounds.down(most.astype(np.float64)), cost, bounds.budget)
    feasible = float(bounds.most @ cost)
    slack = float((step * cost)[bounds.most > 0].max(initial=0)) / 2
    if target.share and (not prunable or bounds.budget > feasible + slack):
        raise ConfigError(
            f"ratio {target.share:g} cannot be met: at most {feasible / prunable if prunable else 0:.4g} of "
            f"{len(parts)} parts can go with cap {target.cap:g}, floor {target.floor}, multiple {target.multiple} and "
            f"layers {target.layers}; lower the ratio or loosen these"
        )
    return bounds


def spread(parts: Sequence[Part], target: Target, shares: np.ndarray) -> np.ndarray:
    """Pieces that every part keeps, (parts,) int64, for wanted shares of removal, (parts,) at least 0.

    The shares are scaled together until the removed parameters come to the target; parts that reach their limit stay
    there. Parts with share 0 lose something only where all others are at their limit. Whole pieces by the largest
    fractions, ties to the first part; the total is within half of one piece (one step, where pieces go together).
    Raises ConfigError where the target cannot be met.
    """
    bounds = limits(parts, target)
    count = np.array([part.count for part in parts], np.int64)
    wanted = water(np.asarray(shares, np.float64) * count * bounds.cost, bounds.most * bounds.cost, bounds.budget)
    pieces = wanted / np.maximum(bounds.cost, 1e-300)
    removed = bounds.down(pieces)
    over = bounds.up(removed)
    step = over - removed
    fraction = (pieces - removed) / step
    gap = bounds.budget - float(removed @ bounds.cost)
    for i in np.argsort(-fraction, kind="stable"):
        size = float(step[i] * bounds.cost[i])
        # a step that fits, or that comes nearer than what is missing: after it nothing is missing
        if fraction[i] > 1e-9 and size < 2 * gap * (1 - 1e-12):
            removed[i], gap = over[i], gap - size
    return np.asarray(count - removed)


def water(wanted: np.ndarray, most: np.ndarray, total: float) -> np.ndarray:
    """Amounts that sum to `total`, in proportion to `wanted`, none above `most`; what is wanted at 0 comes last."""
    given = np.zeros(len(wanted))
    largest = float(wanted.max(initial=0)) or 1.0
    wanted = np.where(wanted > 1e-12 * largest, wanted / largest, 0.0)
    for weight in (np.where(most > 0, wanted, 0.0), np.where(wanted > 0, 0.0, most)):
        rising = weight > 0
        while rising.any() and total - given.sum() > 1e-12 * total:
            left = total - given[~rising].sum()
            at = weight * (left / weight[rising].sum())
            full = rising & (at >= most)
            if not full.any():
                given[rising] = at[rising]
                break
            given[full] = most[full]
            rising &= ~full
    return given


def _step(part: Part, target: Target) -> int:
    """Pieces that go together: heads and experts, one from every group; widths of all else stay multiples."""
    return part.groups if isinstance(part, Units) and part.kind not in ("neuron", "hidden") else target.multiple
