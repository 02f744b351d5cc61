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
    """W + s B A, for each of a stack of matrices (experts, out, in) too. A is uniform as nn.Linear's weight, B is 0."""

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(weight.device, torch.bool), persistent=False)
        self.scale = scale
        *stack, rows, columns = weight.shape
        self.a = nn.Parameter(torch.empty(*stack, rank, columns, device=weight.device))
        self.b = nn.Parameter(torch.zeros(*stack, rows, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a.flatten(0, -2), a=math.sqrt(5))

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
        self.corrected: dict[str, tuple[nn.Module, str]] = {}
        for name, mask in masks.items() if adapter else ():
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            register_parametrization(module, own, ADAPTERS[adapter or ""](getattr(module, own), mask, rank, scale))
            self.corrected[name] = module, own
        self.kept = {name: self.masks.pop(name) for name in self.corrected}

    def merge(self) -> nn.Module:
        for name, (module, own) in self.corrected.items():
            remove_parametrizations(module, own, leave_parametrized=True)
            with torch.no_grad():
                getattr(module, own).mul_(self.kept[name])
        return super().merge()
