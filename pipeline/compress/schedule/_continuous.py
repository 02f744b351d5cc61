"""State of continuous pruning: running averages of unit scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pipeline.compress._weights import unit_sums
from pipeline.compress.allocation.base import Evidence, Target
from pipeline.compress.architecture import anatomy
from pipeline.compress.schedule._cutting import in_layers, lost
from pipeline.compress.schedule.base import Callback, Change, cubic
from pipeline.compress.surgery import cut
from pipeline.compress.units import lowest

if TYPE_CHECKING:
    from pipeline.compress.schedule.continuous import Continuous


class ContinuousPruner(Callback):
    """Scores every step, cuts every few."""

    def __init__(self, recipe: Continuous, model: nn.Module) -> None:
        super().__init__()
        self.recipe = recipe
        self.body = anatomy(model)
        self.groups = self.body.units(*recipe.units)
        self.whole = self._parameters()
        self.scores = {units.name: np.zeros(units.count) for units in self.groups}
        self.step = 0

    def gradients(self, model: nn.Module, done: float) -> None:
        for units in self.groups:
            now = unit_sums(self.body, units, _salience)
            before = self.scores[units.name]
            self.scores[units.name] = self.recipe.decay * before + (1 - self.recipe.decay) * now
        self.step += 1

    def after_step(self, model: nn.Module, done: float) -> Change | None:
        r = self.recipe
        if not self.step or (self.step % r.every and done < r.until):
            return None
        due = cubic(0, r.ratio, done / r.until)
        share = 1 - (1 - due) * self.whole / self._parameters()
        if share <= 0:
            return None
        scores = [self.scores[units.name] for units in self.groups]
        target = Target(share, r.cap, r.floor, 1, r.layers)
        keep = r.allocation.keep(self.groups, target, Evidence(self.body, None, scores))
        removal = {
            units.name: lowest(score, int(k), units.groups)
            for units, score, k in zip(self.groups, scores, keep, strict=True)
            if k < units.count
        }
        if not removal:
            return None
        gone = lost(model, self.groups, removal)
        cut(model, self.groups, removal)
        self.scores = {name: np.delete(score, removal.get(name, ())) for name, score in self.scores.items()}
        self.body = anatomy(model)
        self.groups = self.body.units(*r.units)
        return Change(gone)

    def _parameters(self) -> float:
        return sum(u.parameters for u in in_layers(self.groups, self.recipe.layers, len(self.body.layers)))

    def state(self) -> dict[str, np.ndarray]:
        return self.scores | {"step": np.array([self.step]), "whole": np.array([self.whole])}

    def restore(self, model: nn.Module, state: Mapping[str, np.ndarray]) -> None:
        self.body = anatomy(model)
        self.groups = self.body.units(*self.recipe.units)
        self.scores = {units.name: state[units.name] for units in self.groups if units.name in state}
        self.step, self.whole = int(state["step"][0]), float(state["whole"][0])


def _salience(parameter: nn.Parameter) -> torch.Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else (parameter.detach() * gradient).abs().float()
