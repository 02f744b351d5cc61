"""The same share from every part: the allocation that all others are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.compress.allocation._fill import limits, spread
from pipeline.compress.allocation.base import Allocation, Evidence, Target

if TYPE_CHECKING:
    from pipeline.compress.units import Part


class Uniform(Allocation):
    """Every part loses `target.share` of its pieces, rounded.

    Rounding so that the total is met to a piece gives some parts one piece less than others: a model whose layers
    differ, which an ordinary configuration cannot say. `even` rounds every part alike, so that equal layers stay equal,
    and the total is off by up to half a piece a part.
    """

    kind: Literal["uniform"] = "uniform"
    even: bool = False

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        if not self.even:
            return spread(parts, target, np.full(len(parts), target.share))
        bounds = limits(parts, target)
        count = np.array([part.count for part in parts], np.int64)
        wanted = np.minimum(target.share * count, bounds.most)
        below = bounds.down(wanted)
        above = np.minimum(bounds.up(below), bounds.most)
        return count - np.where(above - wanted < wanted - below, above, below)
