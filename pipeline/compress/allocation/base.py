"""What an allocation is: how many pieces every part keeps, so that what goes comes to a target.

The parts are units of layers (structured), weights of matrices (unstructured) or branches (depth): the same rules serve
all three. What all guarantee, and the tests check: the parameters removed come within one piece of the target; no part
keeps less than its floor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipeline.errors import ConfigError
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Part


@dataclass(frozen=True)
class Target:
    """What is to go: `share` of the parts' parameters, no more than `cap` of one part, at least `floor` pieces left.

    `multiple`: neurons, channels and weights stay a multiple of so many (an MLP's width on GPUs); heads and experts go
    one from each of their groups (`Units.groups`) instead. Parts outside `layers` (first, one behind the last; negative
    from the end) keep everything and do not count in what the share is of.
    """

    share: float
    cap: float = 0.9
    floor: int = 1
    multiple: int = 1
    layers: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"ratio {self.share:g}: write the share to remove, at least 0 and below 1")


@dataclass
class Evidence:
    """What an allocation may look at: the model, its calibration data, the units' scores where there are some."""

    body: Anatomy
    calibration: Calibration | None = None
    scores: Sequence[np.ndarray] | None = None
    """For each part its pieces' scores, (count,) float64."""


class Allocation(Recipe, ABC):
    """Shares a target out over parts. One file and one class a rule; the module's name is its `kind`."""

    kind: str
    data: ClassVar[str] = "none"
    """What it asks of calibration data: `none`, `forward` or `backward`."""
    source: ClassVar[str] = ""
    """Paper and equation, in a line."""

    def probes(self, body: Anatomy, parts: Sequence[Part]) -> list[Probe]:
        """What it measures in the forward pass that all parts of a method share."""
        return []

    @abstractmethod
    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        """Pieces that every part keeps, (parts,) int64. Raises ConfigError where the target cannot be met."""
