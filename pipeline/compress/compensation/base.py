"""What a compensation is: a change to the weights that stay, which makes up for those that go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Removal, Units


class Compensation(Recipe, ABC):
    """Changes the consumers of removed units (o_proj, down_proj) before these are cut. One file, one class a method."""

    kind: str
    source: ClassVar[str] = ""
    """Paper and equation, in a line."""

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        """What it measures in the forward pass that all parts of a method share."""
        return []

    @abstractmethod
    def apply(self, body: Anatomy, groups: Sequence[Units], removal: Removal, calibration: Calibration) -> None:
        """Change weights and biases in place; what was measured was measured on the model before."""
