"""Shapes of a model that is cut while it trains: what metrics tell a ledger, and how a checkpoint takes them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

Shapes = dict[str, Any]
"""`hidden_size`, and `layers`: of every layer the sizes by the names of transformers' configurations."""


def shapes(model: nn.Module) -> Shapes:
    from pipeline.compress.architecture import anatomy
    from pipeline.compress.folder import per_layer

    return {"hidden_size": anatomy(model).hidden, "layers": per_layer(model)}


def take(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model weights of other sizes, by the names of all its parameters; modules and configuration follow."""
    from torch import nn

    from pipeline.compress.surgery import resize, tell

    for name, weight in weights.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_parameter(own, nn.Parameter(weight))
        resize(module)
    model.tie_weights()
    tell(model)
