"""Corrections of low rank that leave the zeros of a sparse matrix alone, as parametrizations of its weight.

The weight in use is computed from the frozen one at every forward pass, by the same expression that merges it, so
merging changes no bit of the function. A full gradient of the weight is formed on the way: unlike LoRA's, the
correction does not factor once it is masked.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from pipeline.compress.recover._session import Session


class LowRank(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """W + s B A. A is uniform as nn.Linear's weight, B is 0."""

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(weight.device, torch.bool), persistent=False)
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.b @ self.a)


class MaskLora(LowRank):
    """W + s (B A) * M."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.b @ self.a) * self.mask


class ScaleLora(LowRank):
    """W * (B A), with B A = 1 at first."""

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, rank: int, scale: float) -> None:
        super().__init__(weight, mask, rank, scale)
        nn.init.constant_(self.a, 1 / math.sqrt(rank))
        nn.init.constant_(self.b, 1 / math.sqrt(rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (self.b @ self.a)


ADAPTERS = {"masklora": MaskLora, "scalelora": ScaleLora, "lora_prune": LowRank}


class MaskedSession(Session):
    """Some modules' weights are corrected, other parameters are trained as they are."""

    def __init__(
        self, model: nn.Module, masks: dict[str, torch.Tensor], adapter: str | None, rank: int, scale: float
    ) -> None:
        super().__init__(model, masks)
        self.corrected: dict[str, nn.Module] = {}
        for name, mask in masks.items() if adapter else ():
            module = model.get_submodule(name.rpartition(".")[0])
            correction = ADAPTERS[adapter or ""](module.weight, mask, rank, scale)
            register_parametrization(module, "weight", correction)
            self.corrected[name] = module
        self.kept = {name: self.masks.pop(name) for name in self.corrected}

    def merge(self) -> nn.Module:
        for name, module in self.corrected.items():
            remove_parametrizations(module, "weight", leave_parametrized=True)
            with torch.no_grad():
                module.weight.mul_(self.kept[name])
        return super().merge()
