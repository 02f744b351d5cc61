"""SNIP ratios: each matrix keeps the share of its weights that survives a cut of |w g| over all matrices.

Source: Lee et al. 2019 (SNIP, arXiv 1810.02340) as a source of layer ratios in Liu et al. 2022, "The Unreasonable
Effectiveness of Random Pruning" (arXiv 2202.02643): with `method: random` the mask within a matrix is chance. g is the
gradient of the mean loss over the calibration rows. 20 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pipeline.compress._weights import matrix, oriented
from pipeline.compress.allocation._fill import limits
from pipeline.compress.allocation._rank import take_lowest
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.units import Units
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.units import Part


class Snip(Allocation):
    """Counts per matrix by one ranking of |w g|; which weights go is the method's business."""

    kind: Literal["snip"] = "snip"
    data: ClassVar[str] = "backward"
    source: ClassVar[str] = "Liu et al. 2022, arXiv 2202.02643"

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        if units := next((part for part in parts if isinstance(part, Units)), None):
            raise ConfigError(f"allocation snip: ranks single weights; {units.name} are units: use global_rank")
        if evidence.calibration is None:
            raise ConfigError("allocation snip: looks at gradients and needs calibration data")
        gradients = evidence.calibration.gradients()
        body, bounds = evidence.body, limits(parts, target)
        values = [(matrix(body, p.name) * oriented(body, p.name, gradients)).abs().flatten().double() for p in parts]
        removed = take_lowest(parts, [v.cpu().numpy() for v in values], bounds, bounds.budget)
        kept: np.ndarray = np.array([part.count for part in parts], np.int64) - removed
        return kept
