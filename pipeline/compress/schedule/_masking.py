"""Schedules of masks (`pipeline.compress.schedule._sparsity`) as the loop calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pipeline.compress.allocation._blocks import linears
from pipeline.compress.architecture import anatomy
from pipeline.compress.schedule._sparsity import Gradual, SoftShrinkage
from pipeline.compress.schedule.base import Callback, Change
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup


def matrices(kind: str, setup: Setup, session: Session) -> list[str]:
    """Names of the weights of the layers' matrices. Raises ConfigError where they are not all trained."""
    names = [f"{name}.weight" for block in linears(anatomy(setup.student)) for name in block]
    if session.masks or any(name not in session.parameters() for name in names):
        raise ConfigError(f"schedule: {kind} masks a model that is trained whole, without masks: use full or distill")
    return names


class Masking(Callback):
    """Passes steps on; from `final` of the budget on, what the masks leave out gets no gradient any more."""

    def __init__(self, inner: Gradual | SoftShrinkage, final: float) -> None:
        super().__init__()
        self.inner, self.final = inner, final
        self.held: dict[str, torch.Tensor] = {}
        self.progress = "event_done" if isinstance(inner, Gradual) else "hardened"

    def after_step(self, model: nn.Module, done: float) -> Change | None:
        self.inner.after_step(model, done)
        masks = self.inner.masks()
        if done < self.final or not masks or all(torch.equal(m, self.held.get(n, ~m)) for n, m in masks.items()):
            return None
        self.held = {name: mask.clone() for name, mask in masks.items()}
        return Change(masks=self.held)

    def state(self) -> dict[str, np.ndarray]:
        masks = {f"mask {name}": mask.cpu().numpy() for name, mask in self.inner.masks().items()}
        return masks | {"at": np.array([int(getattr(self.inner, self.progress)), int(bool(self.held))])}

    def restore(self, model: nn.Module, state: Mapping[str, np.ndarray]) -> None:
        device = next(model.parameters()).device
        for key, mask in state.items():
            if key.startswith("mask "):
                self.inner.masks()[key.removeprefix("mask ")] = torch.from_numpy(mask).to(device)
        at, held = state["at"].tolist()
        setattr(self.inner, self.progress, type(getattr(self.inner, self.progress))(at))
        self.held = {name: mask.clone() for name, mask in self.inner.masks().items()} if held else {}
