"""Activation norm: ||x_j||^c of what a unit puts out. One forward pass.

Source: what the released code of CFSP (Wang et al. 2024, arXiv 2409.13199) computes: each of its terms is normalised
within the neuron, so the weights cancel and (3/d) ||x_j||^c is left. `cfsp` is the criterion as the paper means it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress._weights import consumers, unit_means
from pipeline.compress.calibration import InputMoments
from pipeline.compress.importance.base import Importance

if TYPE_CHECKING:
    import numpy as np

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Units


class Actnorm(Importance):
    """L2 norm over tokens of a unit's output, to a power; of heads the mean over their entries."""

    kind: Literal["actnorm"] = "actnorm"
    power: float = Field(1.0, gt=0, description="c, the exponent of the norm")
    source: ClassVar[str] = "the released code of Wang et al. 2024, arXiv 2409.13199"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        return [InputMoments(consumers(self.kind, groups))]

    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        sums = calibration.measure(*self.probes(body, groups))
        return [unit_means(sums[f"{units.consumer}.square"] ** (self.power / 2), units) for units in groups]
