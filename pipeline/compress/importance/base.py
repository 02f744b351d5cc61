"""What a criterion of importance is: a number per unit, where greater means keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Units


class Importance(Recipe, ABC):
    """Scores units. One file and one class a criterion; the module's name is its `kind`."""

    kind: str
    data: ClassVar[str] = "forward"
    """What it asks of calibration data: `none`, `forward` or `backward`."""
    source: ClassVar[str] = ""
    """Paper and equation, in a line."""

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        """What it measures in the forward pass that all parts of a method share."""
        return []

    @abstractmethod
    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        """For each of the groups its units' scores, (count,) float64, finite, greater is more important."""
