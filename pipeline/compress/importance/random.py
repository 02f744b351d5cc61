"""Chance: the control that every criterion has to beat at the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pipeline.compress.importance.base import Importance

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration
    from pipeline.compress.units import Units


class Random(Importance):
    """A number between 0 and 1 for every unit, drawn from the seed."""

    kind: Literal["random"] = "random"
    seed: int = 0
    data: ClassVar[str] = "none"
    source: ClassVar[str] = "control; Liu et al. 2022, arXiv 2202.02643, on how strong it can be"

    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        return [rng.random(units.count) for units in groups]
