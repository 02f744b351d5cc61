"""Masks that change while a model trains: cubic gradual magnitude pruning, and iterative soft shrinkage (ISS-P).

A schedule is called after every optimiser step: `after_step(model, done)` with `done` the share of the training budget
that is spent (0..1). It changes weights in place, outside autograd, and never the optimiser's moments; weight decay
shrinks on top of it. `masks()` gives, by parameter name, what is kept right now (bool), which is what has to be kept
zero from then on. The same weights and the same `done` give the same masks.

Sources: Zhu & Gupta 2017, "To prune, or not to prune", arXiv 1710.01878; Wang et al. 2023, "Iterative Soft Shrinkage
Learning for Efficient Image Super-Resolution", arXiv 2303.09650.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from pipeline.compress.schedule.base import cubic
from pipeline.compress.sparse._select import select
from pipeline.compress.sparse.base import Pattern, Quota

Masks = dict[str, torch.Tensor]


class Schedule(Protocol):
    """What acts after every optimiser step."""

    def after_step(self, model: nn.Module, done: float) -> None:
        """Prune or shrink for `done`, the share of the budget that is spent."""

    def masks(self) -> Masks:
        """By parameter name what is kept (bool)."""


@dataclass
class Gradual:
    """Sparsity rises by the cubic from `initial` at `start` to `final` at `end` of the budget, in `events` equal steps.

    At each event the mask is taken anew from the magnitudes of that moment, per matrix. Between events masked weights
    stay zero, so they stay masked; with `regrow` they train freely and may come back. After `end` the mask is frozen.
    `names`: the parameters (2-D weights) to prune.
    """

    names: Sequence[str]
    final: float
    initial: float = 0.0
    start: float = 0.0
    end: float = 0.6
    events: int = 100
    regrow: bool = False
    _masks: Masks = field(default_factory=dict, init=False)
    event_done: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        if not (0 <= self.initial <= self.final < 1 and 0 <= self.start < self.end <= 1 and self.events > 0):
            raise ValueError("a gradual schedule needs 0 <= initial <= final < 1, 0 <= start < end <= 1 and an event")

    def after_step(self, model: nn.Module, done: float) -> None:
        # 1e-9: `done` is a quotient of whole numbers and may fall short of an event by rounding
        event = min(int((done - self.start) / (self.end - self.start) * self.events + 1e-9), self.events)
        if done < self.start:
            return
        with torch.no_grad():
            if event > self.event_done:
                self.event_done = event
                share = cubic(self.initial, self.final, event / self.events)
                for name in self.names:
                    weight = model.get_parameter(name)
                    self._masks[name] = select(weight.abs(), _quota(weight, share), by_row=False)
            elif self.regrow and event < self.events:
                return
            for name, mask in self._masks.items():
                model.get_parameter(name).masked_fill_(~mask, 0.0)

    def masks(self) -> Masks:
        return self._masks


@dataclass
class SoftShrinkage:
    """ISS-P: after every step the smallest `share` of each matrix's current weights is multiplied by `rate`.

    The set is chosen anew each time, so weights can recover. At `harden` of the budget the smallest become zero for
    good and the mask is kept. With a `pattern` the set is the lowest of every group along the inputs (weights stored
    as (out, in)). `share` is ignored then.
    """

    names: Sequence[str]
    share: float = 0.0
    pattern: Pattern | None = None
    rate: float = 0.95
    harden: float = 0.75
    _masks: Masks = field(default_factory=dict, init=False)
    hardened: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not (0 <= self.share < 1 and 0 <= self.rate <= 1 and 0 < self.harden <= 1):
            raise ValueError("soft shrinkage needs 0 <= share < 1, 0 <= rate <= 1 and 0 < harden <= 1")

    def after_step(self, model: nn.Module, done: float) -> None:
        with torch.no_grad():
            for name in self.names:
                weight = model.get_parameter(name)
                if not self.hardened:
                    self._masks[name] = select(weight.abs(), _quota(weight, self.share, self.pattern), by_row=False)
                weight.mul_(torch.where(self._masks[name], 1.0, 0.0 if done >= self.harden else self.rate))
        self.hardened = self.hardened or done >= self.harden

    def masks(self) -> Masks:
        """What is not being shrunk; final once the schedule has hardened."""
        return self._masks


def _quota(weight: torch.Tensor, share: float, pattern: Pattern | None = None) -> Quota:
    return Quota(weight.numel() - round(share * weight.numel()), pattern)
