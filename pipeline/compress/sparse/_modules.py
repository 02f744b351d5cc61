"""Linear modules with more than a matrix: a low-rank part beside it (SLiM), block-diagonal matrices around it (ARMOR).

Each takes the place of a Linear or Conv1D, keeps the names `weight` and `bias` for what it takes over, and adds
parameters of its own. Low-rank parts are Linears (or Conv1Ds) themselves, so whatever reads, cuts or trains these takes
them too, and `pipeline.compress.folder` writes and reads them. Block-diagonal matrices are for models that stay in
memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from pipeline.compress._weights import matrix, oriented, place
from pipeline.compress.sparse.base import Pruned

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy


class LowRankPart(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """y = W x + L (R x) + bias: 2 r (in + out) more operations a token, r (in + out) more parameters.

    `left` is L (out, r), `right` is R (r, in). Made by `with_low_rank`; what W is comes from the second base.
    """

    left: nn.Parameter
    right: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + linear(linear(x, self.right), self.left)


class LowRankLinear(LowRankPart, nn.Linear):  # type: ignore[misc]  # torch is untyped here
    pass


class LowRankConv1D(LowRankPart, Conv1D):  # type: ignore[misc]  # transformers is untyped here
    pass


def with_low_rank(inner: nn.Module, left: torch.Tensor, right: torch.Tensor) -> LowRankPart:
    """A Linear or Conv1D, its parameters the same objects, with L (out, r) and R (r, in) beside it."""
    module: LowRankPart = object.__new__(LowRankConv1D if turned(inner) else LowRankLinear)
    nn.Module.__init__(module)
    for name, value in vars(inner).items():
        if not name.startswith("_"):
            setattr(module, name, value)
    module.weight, module.bias = inner.weight, inner.bias
    module.left = nn.Parameter(left.to(inner.weight.dtype))
    module.right = nn.Parameter(right.to(inner.weight.dtype))
    return module


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


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that full name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def store(model: nn.Module, body: Anatomy, name: str, pruned: Pruned, masks: dict[str, torch.Tensor]) -> None:
    """Write what stays of a matrix into the model, and its mask to the others: by parameter name, as that stores it.

    Without a zero there is no mask; of stacked experts one mask (experts, out, in) for all.
    """
    parameter, _ = place(body, name)
    if pruned.left is not None and pruned.right is not None:
        put(model, name, WrappedLinear(model.get_submodule(name), pruned.weight, pruned.left, pruned.right))
        masks[parameter] = pruned.mask
        return
    matrix(body, name).copy_(pruned.weight)
    if not pruned.mask.all():
        whole = masks.setdefault(parameter, torch.ones_like(model.get_parameter(parameter), dtype=torch.bool))
        oriented(body, name, {parameter: whole}).copy_(pruned.mask)
