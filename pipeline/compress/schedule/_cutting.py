"""Cutting a model in training, a little at each of some moments, and what the optimizer must lose with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compress.architecture import anatomy, named
from pipeline.compress.schedule.base import Callback, Change
from pipeline.compress.surgery import axes, entries
from pipeline.compress.units import Removal, Units
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup
    from pipeline.compress.steps.base import Step
    from pipeline.compress.steps.width import Width


def check_whole(kind: str, session: Session) -> None:
    """Raises ConfigError where a model is not trained whole and so cannot be cut while it is."""
    if session.masks or any(not p.requires_grad for p in session.model.parameters()):
        raise ConfigError(
            f"schedule: {kind} cuts a model that is trained whole, without masks: heal it by full or distill"
        )


def check_width(kind: str, step: Step) -> Width:
    from pipeline.compress.steps.width import Width

    if not isinstance(step, Width):
        raise ConfigError(f"schedule: {kind}: a step of kind {step.kind!r} cannot be taken in parts: only `width` can")
    return step


def lost(model: nn.Module, groups: Sequence[Units], removal: Removal) -> dict[str, dict[int, np.ndarray]]:
    """Indices that a removal takes along the axes of parameters, by their names; of a model before or after it."""
    modules, names = named(model), {id(p): name for name, p in model.named_parameters()}
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    for units in groups:
        for member in units.members if len(removal.get(units.name, ())) else ():
            for parameter, axis in axes(modules[member.module], member.side):
                if id(parameter) in names:
                    along = found.setdefault(names[id(parameter)], {})
                    along.setdefault(axis, []).append(entries(member, removal[units.name]))
    return {n: {axis: np.concatenate(parts) for axis, parts in along.items()} for n, along in found.items()}


def in_layers(groups: Sequence[Units], layers: tuple[int, int | None], depth: int) -> list[Units]:
    """Units of the layers from the first named to one before the last, negative from the end; -1 is in all."""
    chosen = range(depth)[slice(*layers)]
    return [units for units in groups if units.layer in chosen or units.layer < 0]


class Cutter(Callback):
    """Takes a step of width in parts: at each moment as much as brings the whole to the share that is due.

    The share is of the parameters in units at the start, measured on the model itself, so that rounding does not add
    up: behind the last moment the model is within a unit of what the step alone would leave.
    """

    def __init__(self, step: Width, moments: Sequence[tuple[float, float]], setup: Setup, rows: int, seed: int) -> None:
        super().__init__()
        self.step, self.moments = step, moments
        order = np.random.default_rng(seed).permutation(len(setup.blocks))
        self.blocks = setup.blocks[np.sort(order[:rows])]
        self.whole = self._parameters(setup.student)
        self.taken = 0

    def after_step(self, model: nn.Module, done: float) -> Change | None:
        from pipeline.compress.calibration import Calibration

        due = sum(at <= done + 1e-9 for at, _ in self.moments)
        if due == self.taken:
            return None
        self.taken = due
        left = (1 - self.moments[due - 1][1]) * self.whole
        ratio = 1 - left / self._parameters(model)
        if ratio <= 0:
            return None
        groups = anatomy(model).units(*self.step.units)
        calibration = Calibration.of_blocks(model, self.blocks)
        outcome = self.step.model_copy(update={"ratio": ratio}).apply(model, calibration)
        self.passes.update(calibration.passes)
        return Change(lost(model, groups, outcome.removed)) if outcome.removed else None

    def _parameters(self, model: nn.Module) -> float:
        body = anatomy(model)
        return sum(u.parameters for u in in_layers(body.units(*self.step.units), self.step.layers, len(body.layers)))

    def state(self) -> dict[str, np.ndarray]:
        return {"taken": np.array([self.taken]), "whole": np.array([self.whole])}

    def restore(self, model: nn.Module, state: Mapping[str, np.ndarray]) -> None:
        self.taken, self.whole = int(state["taken"][0]), float(state["whole"][0])
