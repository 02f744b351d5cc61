"""CFSP's coarse step: blocks that turn the residual stream further keep more.

Wang et al. 2024 (arXiv 2409.13199, COLING 2025; wyxscir/CFSP): a block's importance is the angle between what it reads
and what it puts out, I = mean over tokens of arccos(cos) / pi; it keeps sigmoid((I - mean I) / temperature) over the
mean of these, times 1 - S. Where that is above 1, deviations from the mean shrink together until the largest is 1.

The released code sums over tokens and divides by 1e4, so its ratios depend on how much text it saw; here the mean is
taken, and the temperature says how sharp. The default is the official setting, 1e4 / (128 x 2048 tokens); that length
is from memory, unverified. The paper prunes MLP neurons by these ratios; here all parts of a block take them.

One forward pass. The first token of a row does not count (`calibration.Turns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.allocation._blocks import by_block, turns
from pipeline.compress.allocation._fill import spread
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.calibration import Turns

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Probe
    from pipeline.compress.units import Part


class Angular(Allocation):
    """Densities per block by the sigmoid of its mean angle; `temperature` in half turns."""

    kind: Literal["angular"] = "angular"
    temperature: float = Field(1e4 / (128 * 2048), gt=0)
    data: ClassVar[str] = "forward"
    source: ClassVar[str] = "Wang et al. 2024, arXiv 2409.13199, coarse-grained importance"

    def probes(self, body: Anatomy, parts: Sequence[Part]) -> list[Probe]:
        return [Turns(body.blocks)]

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        angle = turns(evidence, self.kind, "angle")
        return spread(parts, target, by_block(parts, target, angle, self._shares))

    def _shares(self, angle: np.ndarray, weight: np.ndarray, share: float) -> np.ndarray:
        return 1 - densities(angle, weight, share, self.temperature)


def densities(importance: np.ndarray, weight: np.ndarray, share: float, temperature: float) -> np.ndarray:
    """Share that each block keeps, (blocks,) at most 1, whose mean by `weight` is 1 - share."""
    centred = (importance - np.average(importance, weights=weight)) / temperature
    gate = np.exp(-np.logaddexp(0, -centred))
    kept = gate / np.average(gate, weights=weight) * (1 - share)
    if kept.max() > 1:
        kept = 1 - share + (kept - (1 - share)) * share / (kept.max() - (1 - share))
    return np.asarray(kept)
