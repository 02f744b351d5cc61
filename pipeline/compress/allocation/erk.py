"""ER and ERK: densities from shapes alone, small matrices denser. The mandatory control of unstructured pruning.

Density of a matrix = eps r, with r = (n_in + n_out) / (n_in n_out) (ER), or the sum of all its dimensions over their
product (ERK, which differs for convolutions); eps so that the total is met. Matrices that would be more than dense are
dense, the largest r first, and the others share what is left. Mocanu et al. 2018 and Evci et al. 2020 as used by Liu et
al. 2022, "The Unreasonable Effectiveness of Random Pruning" (arXiv 2202.02643; VITA-Group/Random_Pruning).

For parts that are matrices; units of heads or neurons have no such shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pipeline.compress.allocation._blocks import parameters_of
from pipeline.compress.allocation._fill import free, spread, water
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.units import Units
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.units import Part


class Erk(Allocation):
    """Densities by shape; `kernel: false` is ER."""

    kind: Literal["erk"] = "erk"
    kernel: bool = True
    source: ClassVar[str] = "Liu et al. 2022, arXiv 2202.02643"

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        if units := next((part for part in parts if isinstance(part, Units)), None):
            raise ConfigError(f"allocation erk: goes by the shape of matrices; {units.name} are units: use uniform")
        shares = np.zeros(len(parts))
        open_ = free(parts, target)
        shapes = [tuple(parameters_of(evidence.body, part)[0].shape) for part in parts]
        chosen = [shape for shape, there in zip(shapes, open_, strict=True) if there]
        if chosen:
            shares[open_] = 1 - densities(chosen, 1 - target.share, self.kernel)
        return spread(parts, target, shares)


def densities(shapes: Sequence[tuple[int, ...]], density: float, kernel: bool) -> np.ndarray:
    """Share of each matrix that stays, (matrices,) in [0, 1]; shapes (out, in, ...)."""
    size = np.array([np.prod(shape) for shape in shapes], np.float64)
    ratio = np.array(
        [sum(shape) / np.prod(shape) if kernel else sum(shape[:2]) / np.prod(shape[:2]) for shape in shapes]
    )
    return water(ratio * size, size, density * float(size.sum())) / size
