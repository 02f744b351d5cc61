"""Magnitude: how large the weights of a unit are. Needs no data; the baseline that criteria with data should beat.

Every weight of the unit counts, biases with them: rows of gate and up and a column of down for a neuron. What it
trades away: scale means little in a network that can move it from a producer to its consumer, and it collapses early
(LLaMA-7B at 20 %: perplexity 582 for L2 against 19.1 for first-order Taylor, table 1 of LLM-Pruner, arXiv 2305.11627).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pipeline.compress._weights import unit_sums
from pipeline.compress.importance.base import Importance

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration
    from pipeline.compress.units import Units


class Magnitude(Importance):
    """L1 or L2 norm of a unit's weights."""

    kind: Literal["magnitude"] = "magnitude"
    norm: Literal["l1", "l2"] = "l2"
    data: ClassVar[str] = "none"
    source: ClassVar[str] = "Li et al. 2017, arXiv 1608.08710, for filters; here over coupled units"

    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        if self.norm == "l1":
            return [unit_sums(body, units, lambda p: p.detach().float().abs()) for units in groups]
        return [np.sqrt(unit_sums(body, units, lambda p: p.detach().float().square())) for units in groups]
