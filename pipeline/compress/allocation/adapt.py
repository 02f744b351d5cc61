"""Adapt-Pruner's step: blocks that turn the residual stream less lose more, and a little at a time.

Wang et al. 2025 (arXiv 2502.03460; research4pan/AdaptPruner): a block's importance is -cos(h_in, h_out), mean over
tokens, centred over blocks and divided by the largest absolute value, c in [-1, 1]; a step adds D - A c to its share.
Meant to be asked again at every step of a progressive schedule, where the target is the step's own D, a share of what
the model has left; `amplitude` is A for steps of about 0.05 (paper: 0.02 to 0.03), and D - A c below 0 counts as 0.

Where a limit cuts a share short the others make up for it, so that the mean stays on schedule; the released code leaves
it behind. One forward pass a step; the first token of a row does not count.
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


class Adapt(Allocation):
    """Shares per block around the target's by its centred importance."""

    kind: Literal["adapt"] = "adapt"
    amplitude: float = Field(0.02, ge=0)
    data: ClassVar[str] = "forward"
    source: ClassVar[str] = "Wang et al. 2025, arXiv 2502.03460, layer-wise sparsity"

    def probes(self, body: Anatomy, parts: Sequence[Part]) -> list[Probe]:
        return [Turns(body.blocks)]

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        cosine = turns(evidence, self.kind, "cosine")
        return spread(parts, target, by_block(parts, target, -cosine, self._shares))

    def _shares(self, importance: np.ndarray, weight: np.ndarray, share: float) -> np.ndarray:
        return step_shares(importance, weight, share, self.amplitude)


def step_shares(importance: np.ndarray, weight: np.ndarray, share: float, amplitude: float) -> np.ndarray:
    """Share that each block loses in a step, (blocks,) at least 0; mean by `weight` is `share` if none is clipped."""
    centred = importance - np.average(importance, weights=weight)
    largest = float(np.abs(centred).max())
    # of equal blocks only rounding noise is left, which must not be blown up to 1
    scaled = centred / largest if largest > 1e-12 * float(np.abs(importance).max()) else np.zeros_like(centred)
    shares: np.ndarray = np.clip(share - amplitude * scaled, 0, None)
    return shares
