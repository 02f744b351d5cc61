"""The cheapest shares by measured distortion: dynamic programming over curves.

Xu et al. 2023, "Efficient Joint Optimization of Layer-Adaptive Weight Pruning" (arXiv 2308.10438, ICCV 2023;
Akimoto-Cris/RD_VIT_PRUNE): delta(s) of a part is how far the model's output moves when the share s of that part alone
is set to zero; assuming that distortions add up, the shares with the least sum that come to the target are found by a
knapsack over bins of parameters. For language models the distortion is KL(dense || pruned) a token; `mse` is the
paper's squared error of the output.

Pieces go by the scores that the method ranks with; weights without scores by magnitude. The paper measures 101 shares a
part; here `levels` of them are measured, made to rise (isotonic least squares) and interpolated linearly to `grid`
shares.

The dearest of the allocations: levels x parts reruns of `rows` rows of calibration data, each from the block that
changes on (`depth.rerun`). It needs no gradients and holds for any mix of parts. The weights are put back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.allocation._fill import Limits, limits, spread
from pipeline.compress.allocation._knapsack import cheapest, rising
from pipeline.compress.allocation._trial import scores_of, without
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.depth.rerun import Trial, distances
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.units import Part


class Dp(Allocation):
    """Least sum of distortions; `levels` shares are measured for every part."""

    kind: Literal["dp"] = "dp"
    distortion: Literal["kl", "mse"] = "kl"
    levels: int = Field(10, ge=1)
    grid: int = Field(101, ge=2)
    bins: int = Field(1000, ge=10)
    rows: int = Field(16, ge=1)
    data: ClassVar[str] = "forward"
    source: ClassVar[str] = "Xu et al. 2023, arXiv 2308.10438"

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        bounds = limits(parts, target)
        if not target.share:
            return spread(parts, target, np.zeros(len(parts)))
        shares, curves = self.curves(parts, bounds, evidence)
        return spread(parts, target, best_shares(parts, shares, curves, bounds.budget, self.grid, self.bins))

    def curves(
        self, parts: Sequence[Part], bounds: Limits, evidence: Evidence
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For every part the shares that were measured, from 0 on, and the distortions there, as they were measured."""
        calibration, body = evidence.calibration, evidence.body
        if calibration is None:
            raise ConfigError("allocation dp: measures outputs and needs calibration data")
        ladders = []
        for i in range(len(parts)):
            asked = np.linspace(0, bounds.most[i], self.levels + 1)
            one = bounds.only(np.arange(len(parts)) == i)
            ladders.append(np.unique([int(one.down(np.array([x]))[0]) for x in asked]))
        trials = []
        for i, part in enumerate(parts):
            scores = scores_of(evidence, part, i)
            for removed in ladders[i][1:]:
                change = partial(without, calibration.model, body, part, scores, int(removed))
                trials.append(Trial(max(part.layer, 0), change))
        found = iter(distances(calibration, body, trials, self.distortion, self.rows))
        shares = [ladder / part.count for ladder, part in zip(ladders, parts, strict=True)]
        return shares, [np.array([0.0, *(next(found) for _ in ladder[1:])]) for ladder in ladders]


def best_shares(
    parts: Sequence[Part],
    shares: Sequence[np.ndarray],
    curves: Sequence[np.ndarray],
    budget: float,
    grid: int,
    bins: int,
) -> np.ndarray:
    """Shares of removal, (parts,), whose parameters come to the budget with the least sum of (rising) distortions."""
    fine = [np.unique(np.concatenate([s, np.linspace(0, s[-1], grid)])) for s in shares]
    prices = [np.interp(f, s, rising(curve)) for f, s, curve in zip(fine, shares, curves, strict=True)]
    sizes = [f * part.parameters for f, part in zip(fine, parts, strict=True)]
    # rounding to bins may leave the last sliver of the budget out of reach
    reach = min(budget, sum(float(size[-1]) for size in sizes) * (1 - len(parts) / bins))
    levels = cheapest(sizes, prices, reach, bins)
    if levels is None:
        raise ConfigError("allocation dp: the target is out of reach of bins this coarse: raise `bins`")
    return np.array([f[level] for f, level in zip(fine, levels, strict=True)])
