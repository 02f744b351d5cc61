"""Counts that are known already: the shape of another cut, so that arms of a comparison have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.units import Part


class Given(Allocation):
    """What every part keeps, by its name; the target is not asked."""

    kind: Literal["given"] = "given"
    kept: dict[str, int]

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        if missing := [part.name for part in parts if part.name not in self.kept]:
            raise ConfigError(f"allocation: given: nothing is said of {', '.join(missing[:3])}")
        return np.array([self.kept[part.name] for part in parts], np.int64)
