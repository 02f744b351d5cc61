"""What a schedule is: something done between the steps of a recovery, such as cutting a little more.

A recipe is frozen; `start` opens a `Callback`, which carries state. What it decides must follow from the model, its
gradients and the data alone, which are the same on all workers, so that all decide the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup


@dataclass(frozen=True)
class Change:
    """What was done to a model in training.

    `lost`: indices that are gone along the axes of each parameter that got smaller, by its name: the optimizer's
    moments lose the same. None: shapes changed in a way that cannot be told, and the optimizer begins anew. `masks`: of
    weights that are 0 from now on, by parameter name, True where kept.
    """

    lost: Mapping[str, Mapping[int, np.ndarray]] | None = None
    masks: Mapping[str, torch.Tensor] | None = None


class Callback:
    """State of a schedule in one training. `done`: share of the budget that is spent."""

    def __init__(self) -> None:
        self.passes: Counter[str] = Counter()
        """Tokens that it ran through the model itself, `forward` and `backward`: a ledger charges them."""

    def gradients(self, model: nn.Module, done: float) -> None:
        """Called before every update, with the step's gradients in place."""

    def after_step(self, model: nn.Module, done: float) -> Change | None:
        """Called once before the first step (`done` 0) and after every step; may change the model."""
        return None

    def rows(self, count: int) -> np.ndarray | None:
        """Indices of the next `count` blocks to train on, where it chooses them."""
        return None

    def merged(self, model: nn.Module) -> None:
        """Called at the end, when what was learned is in the model's own weights; may change the model."""

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold of it."""
        return {}

    def restore(self, model: nn.Module, state: Mapping[str, np.ndarray]) -> None:
        """Go on from such a state; the model has its shapes and weights of then."""


def cubic(initial: float, final: float, progress: float) -> float:
    """s_t = s_f + (s_i - s_f) (1 - progress)^3 with progress clipped to 0..1: fast first, slow at the end.

    Zhu & Gupta 2017, arXiv 1710.01878, equation 1.
    """
    return final + (initial - final) * (1 - min(max(progress, 0.0), 1.0)) ** 3


class Schedule(Recipe, ABC):
    """Something done between steps. One file and one class a method; the module's name is its `kind`."""

    kind: str
    source: ClassVar[str] = ""
    """Paper and section, in a line."""

    @abstractmethod
    def start(self, setup: Setup, session: Session) -> Callback:
        """Open it. Raises ConfigError where it does not fit the recovery or its data."""
