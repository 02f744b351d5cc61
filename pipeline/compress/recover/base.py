"""What a recovery is: what it trains of a model that was made smaller, by which loss, at which pace.

A recipe is frozen; `begin` opens a `Session`, which holds the model in training. The loop (`pipeline.compress
.healing`) knows batches, optimizer, budget, checkpoints and workers, and nothing of methods.

The budget is tokens. The learning rate depends on the share of the budget that is spent and on nothing else: linear
warm-up over its first part, then down to `floor` of the rate, which is reached where the budget ends.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compress.recover._session import Session

COOLDOWN = 0.2
"""`wsd`: share of the budget at the end over which the rate falls (our choice)."""


@dataclass(frozen=True)
class Cost:
    """What training on one token computes, for a ledger: f is the student's forward pass, f_t the teacher's.

    `full`: 3 f. `adapters`: 2 f + 6 `trained`, for no gradient of a frozen matrix is taken. `last`: f and twice the
    forward pass of the last `layers` with the head. `teacher`: + f_t. `extra`: further FLOPs a token. `step`: FLOPs a
    step, whatever its tokens. `measured`: blocks that go forward once, before the training.
    """

    backward: Literal["full", "adapters", "last"] = "full"
    teacher: bool = False
    trained: int = 0
    layers: int = 0
    extra: float = 0.0
    step: float = 0.0
    measured: int = 0


@dataclass
class Setup:
    """What a session is made of. The student becomes part of it, and is changed.

    `masks`: of weights that were set to 0 and must stay so, by parameter name, True where kept. `vocabulary`: (V,), the
    teacher's id of each of the student's tokens, where the student's vocabulary was trimmed. `blocks`: (n, T) token ids
    that are trained on; `held_out` are not. `domains`, `held_out_domains`: which domain (from 0) each block is of.
    """

    student: nn.Module
    blocks: np.ndarray
    teacher: nn.Module | None = None
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    vocabulary: np.ndarray | None = None
    held_out: np.ndarray | None = None
    domains: np.ndarray | None = None
    held_out_domains: np.ndarray | None = None


class Recovery(Recipe, ABC):
    """How a smaller model is healed. One file and one class a method; the module's name is its `kind`."""

    source: ClassVar[str] = ""
    """Paper and section, in a line."""

    kind: str
    lr: float = Field(3e-4, gt=0)
    batch: int = Field(32, ge=1, description="blocks a step")
    accumulate: int = Field(1, ge=1, description="parts in which a step's blocks run one after another; same result")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the budget over which the rate rises")
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    floor: float = Field(0.1, ge=0, le=1, description="share of the rate that is left where the budget ends")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; never of norms and biases")
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    seed: int = Field(0, ge=0, description="of the order of blocks, new matrices and dropout")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    evaluate_every: int = Field(50, ge=1, description="steps between losses on held-out blocks")
    patience: int | None = Field(
        None, ge=1, description="held-out losses without a new best after which it stops; the best weights are returned"
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from the model before it was made smaller."""
        return False

    @abstractmethod
    def begin(self, setup: Setup) -> Session:
        """The model in training. Raises ConfigError where the method does not fit the student."""

    @abstractmethod
    def cost(self, student: nn.Module, teacher: nn.Module | None = None) -> Cost:
        """What it computes on a student of this shape, with such a teacher where it needs one."""


def rate(recovery: Recovery, before: float, after: float) -> float:
    """Share of the learning rate for a step between two shares of the budget, both in [0, 1]."""
    if after < recovery.warmup:
        return after / recovery.warmup
    done = max(0.0, (before - recovery.warmup) / (1 - recovery.warmup))
    if recovery.decay == "constant":
        return 1.0
    if recovery.decay == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = 1 - done if recovery.decay == "linear" else min(1.0, (1 - before) / COOLDOWN)
    return recovery.floor + (1 - recovery.floor) * left
