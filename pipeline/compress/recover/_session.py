"""A model in training, as the loop sees it: parameters, the loss of some blocks, what must hold after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.compress.recover import _losses
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


class Session:
    """Next-token cross-entropy on what of the model takes gradients. Methods override what is different with them."""

    def __init__(self, model: nn.Module, masks: Mapping[str, torch.Tensor] | None = None) -> None:
        self.model = model
        self.beside: dict[str, nn.Module] = {}
        """Modules that are trained with the model and thrown away at the end, by names that the model has not."""
        self.masks: dict[str, torch.Tensor] = {}
        self.put_masks(masks or {})

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; a tied matrix once."""
        found = dict(self.model.named_parameters())
        for beside, module in self.beside.items():
            found |= {f"{beside}.{name}": p for name, p in module.named_parameters()}
        return {name: p for name, p in found.items() if p.requires_grad}

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Sum over the positions that count of the loss of token ids (B, T), with its gradient; nats."""
        return _losses.cross_entropy(self.model, _losses.states(self.model, ids).last_hidden_state, _losses.labels(ids))

    def put_masks(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Set weights to 0 that the masks leave out, for as long as it trains. Raises ConfigError for a misfit."""
        import torch

        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                raise ConfigError(f"masks: {name!r} of shape {tuple(mask.shape)} is no parameter of the model")
            self.masks[name] = mask.to(parameters[name].device, torch.bool)
            with torch.no_grad():
                parameters[name].mul_(self.masks[name])

    def mask_gradients(self) -> None:
        """No gradient where a mask holds a weight at 0: then neither momentum nor decay moves it, and it stays 0."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, mask in self.masks.items():
            if (gradient := parameters[name].grad) is not None:
                gradient.mul_(mask)

    def merge(self) -> nn.Module:
        """End it: the model with what was learned in its own weights, and no weight frozen."""
        self.model.requires_grad_(True)
        return self.model


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def causal(model: nn.Module, kind: str) -> None:
    """Raises ConfigError for what is no causal language model."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None or not hasattr(model, "base_model"):
        raise ConfigError(f"recover: {kind}: needs a causal language model of transformers, not {type(model).__name__}")
