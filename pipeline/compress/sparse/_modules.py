"""Linear modules with more than a matrix: a low-rank part beside it (SLiM), block-diagonal matrices around it (ARMOR).

Each takes the place of a Linear or Conv1D, keeps the names `weight` and `bias` for what it takes over, and adds
parameters of its own; no loader of transformers knows these, so they are for models that stay in memory.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from pipeline.compress.sparse.base import Pruned


class LowRankLinear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """y = W x + L (R x) + bias: 2 r (in + out) more operations a token, r (in + out) more parameters."""

    def __init__(self, inner: nn.Module, left: torch.Tensor, right: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.turned = inner.weight, inner.bias, turned(inner)
        self.out_features, self.in_features = len(left), right.shape[1]
        self.left = nn.Parameter(left.to(inner.weight.dtype))
        self.right = nn.Parameter(right.to(inner.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.T if self.turned else self.weight
        return linear(x, weight, self.bias) + linear(linear(x, self.right), self.left)


class WrappedLinear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """y = A W B x + bias with A (out / b, b, b) and B (in / b, b, b) block-diagonal; `weight` (out, in) is the core."""

    def __init__(self, inner: nn.Module, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        super().__init__()
        kind = inner.weight.dtype
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = nn.Parameter(weight.to(kind)), inner.bias
        self.left, self.right = nn.Parameter(left.to(kind)), nn.Parameter(right.to(kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = linear(_blocks(x, self.right), self.weight)
        y = _blocks(inside, self.left)
        return y if self.bias is None else y + self.bias


def _blocks(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x (..., n) times a block-diagonal matrix (n / b, b, b), as if y = M x."""
    count, b, _ = matrix.shape
    return torch.einsum("kij,...kj->...ki", matrix, x.unflatten(-1, (count, b))).flatten(-2)


def turned(module: nn.Module) -> bool:
    """Whether it stores its weight as (in, out)."""
    return isinstance(module, Conv1D)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that full name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def store(model: nn.Module, name: str, pruned: Pruned) -> dict[str, torch.Tensor]:
    """Write what stays of a matrix into the model; returns its mask by parameter name, as the module stores it.

    Without a zero there is no mask.
    """
    module = model.get_submodule(name)
    if pruned.left is not None and pruned.right is not None:
        replace(model, name, WrappedLinear(module, pruned.weight, pruned.left, pruned.right))
        return {f"{name}.weight": pruned.mask}
    module.weight.copy_(pruned.weight.T if turned(module) else pruned.weight)
    mask = (pruned.mask.T if turned(module) else pruned.mask).contiguous()
    return {} if mask.all() else {f"{name}.weight": mask}
