"""State of LoRAPrune: running scores of every unit and matrix, and masks on what units put out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pipeline.compress.allocation.base import Evidence, Target
from pipeline.compress.allocation.uniform import Uniform
from pipeline.compress.architecture import anatomy
from pipeline.compress.importance._loraprune import averaged, saliency
from pipeline.compress.schedule.base import Callback, Change, cubic
from pipeline.compress.surgery import cut
from pipeline.compress.units import Member, Units, lowest

if TYPE_CHECKING:
    from pipeline.compress.schedule.lora_prune import LoraPrune


class LoraPruner(Callback):
    """Chooses units by LoRA's gradients; they are cut when LoRA is merged."""

    def __init__(self, recipe: LoraPrune, model: nn.Module) -> None:
        super().__init__()
        self.recipe, self.body = recipe, anatomy(model)
        self.groups = self.body.units(*recipe.units)
        first = max(0, round(0.1 * len(self.body.layers)))
        self.layers = recipe.layers or (first, len(self.body.layers) - 1)
        self.scores: dict[str, torch.Tensor] = {}
        self.removal: dict[str, np.ndarray] = {}
        self.step = 0
        self.chosen_last = False
        """Whether the final ratio was chosen."""
        for units in self.groups:
            model.get_submodule(units.consumer).register_forward_pre_hook(partial(self._mask, units))

    def gradients(self, model: nn.Module, done: float) -> None:
        saliencies: dict[str, torch.Tensor] = {}
        for units in self.groups:
            for member in units.members:
                if member.module not in saliencies:
                    saliencies[member.module] = _saliency(model.get_submodule(member.module))
                now = unit_sums(saliencies[member.module], member, units)
                key = f"{units.name} {member.module} {member.offset}"
                if (score := averaged(self.scores.get(key), now)) is not None:
                    self.scores[key] = score
        self.step += 1

    def after_step(self, model: nn.Module, done: float) -> Change | None:
        r = self.recipe
        way = (done - r.warmup) / (1 - r.warmup - r.cooldown)
        if self.scores and not self.chosen_last and (way >= 1 or (way > 0 and self.step % r.every == 0)):
            self._choose(cubic(0, r.ratio, way))
            self.chosen_last = way >= 1
        return None

    def _choose(self, share: float) -> None:
        scores = [self._score(units) for units in self.groups]
        target = Target(share, self.recipe.cap, layers=self.layers)
        keep = Uniform().keep(self.groups, target, Evidence(self.body, None, scores))
        self.removal = {
            units.name: lowest(score, int(k), units.groups)
            for units, score, k in zip(self.groups, scores, keep, strict=True)
            if k < units.count
        }

    def _score(self, units: Units) -> np.ndarray:
        parts = [score for key, score in self.scores.items() if key.split(" ")[0] == units.name]
        return torch.stack(parts).sum(0).double().cpu().numpy() if parts else np.zeros(units.count)

    def _mask(self, units: Units, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What removed units put out is 0 before their consumer reads it."""
        if units.name not in self.removal:
            return None
        kept = torch.ones(units.count, dtype=inputs[0].dtype, device=inputs[0].device)
        kept[torch.from_numpy(self.removal[units.name]).to(kept.device)] = 0
        return (inputs[0] * kept.repeat_interleave(units.width), *inputs[1:])

    def merged(self, model: nn.Module) -> None:
        cut(model, anatomy(model).units(*self.recipe.units), self.removal)

    def state(self) -> dict[str, np.ndarray]:
        found = {f"score {key}": score.cpu().numpy() for key, score in self.scores.items()}
        found |= {f"removed {name}": indices for name, indices in self.removal.items()}
        return found | {"at": np.array([self.step, int(self.chosen_last)])}

    def restore(self, model: nn.Module, state: Mapping[str, np.ndarray]) -> None:
        device = next(model.parameters()).device
        for key, values in state.items():
            what, _, name = key.partition(" ")
            if what == "score":
                self.scores[name] = torch.from_numpy(values).to(device)
            elif what == "removed":
                self.removal[name] = values
        self.step, self.chosen_last = int(state["at"][0]), bool(state["at"][1])


def _saliency(layer: Any) -> torch.Tensor:
    """Of the weights of a linear that PEFT wrapped, (out, in)."""
    from transformers.pytorch_utils import Conv1D

    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.get_base_layer()
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    with torch.no_grad():
        return saliency(weight, a, b, a.grad, b.grad, layer.scaling["default"])


def unit_sums(values: torch.Tensor, member: Member, units: Units) -> torch.Tensor:
    """Sum over a member's entries of every unit, (count,), of values (out, in) of its module."""
    along = values.sum(1 if member.side == "out" else 0)
    return along[member.offset : member.offset + units.count * member.size].view(units.count, member.size).sum(1)
