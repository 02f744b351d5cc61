"""What a step is: it makes a model smaller in one way and says what went."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from pipeline.compress.calibration import Calibration


@dataclass
class Outcome:
    """What a step leaves: the model (the same object, changed, unless said otherwise), masks of weights that were set
    to zero and must stay so (by parameter name, True where kept), kept token ids where the vocabulary was trimmed, and
    `report`, JSON-able, for the model's card."""

    model: nn.Module
    removed: dict[str, np.ndarray] = field(default_factory=dict)
    """Indices of units that were cut, by the name of `Units`; an optimizer cuts its moments along with them."""
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    vocabulary: np.ndarray | None = None
    report: dict[str, Any] = field(default_factory=dict)


class Step(Recipe, ABC):
    """One way to make a model smaller. One file and one class; the module's name is its `kind`."""

    kind: str

    @abstractmethod
    def apply(self, model: nn.Module, calibration: Calibration) -> Outcome:
        """Change a model in place. Raises ConfigError where it has nothing that could go, or too little would stay."""
