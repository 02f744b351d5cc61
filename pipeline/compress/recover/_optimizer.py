"""AdamW whose state goes by the names of parameters: to be saved without pickle, and cut with the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from pipeline.compress.recover.base import Recovery

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(recovery: Recovery, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Decoupled weight decay on matrices, none on norms and biases."""
    import torch

    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": recovery.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recovery.lr, betas=recovery.betas)


def state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """`NAME/exp_avg`, `NAME/exp_avg_sq` and `NAME/step` of every parameter that was updated."""
    return {f"{name}/{key}": t for name, p in parameters.items() for key, t in optimizer.state.get(p, {}).items()}


def restore(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, torch.Tensor]
) -> None:
    """Put a state back; parameters that it does not name begin anew."""
    for name, parameter in parameters.items():
        if f"{name}/step" in saved:
            moments = {m: saved[f"{name}/{m}"].to(parameter.device) for m in MOMENTS}
            optimizer.state[parameter] = {"step": saved[f"{name}/step"].float(), **moments}


def cut(saved: Mapping[str, torch.Tensor], lost: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The state of parameters that lost entries along some axes: their moments lose the same."""
    import numpy as np
    import torch

    found: dict[str, torch.Tensor] = {}
    for key, tensor in saved.items():
        for axis, gone in lost.get(key.rpartition("/")[0], {}).items() if tensor.ndim else ():
            stays = np.setdiff1d(np.arange(tensor.shape[axis]), gone)
            tensor = tensor.index_select(axis, torch.from_numpy(stays).to(tensor.device))
        found[key] = tensor
    return found


def mask(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]
) -> None:
    """No momentum where a mask holds a weight at 0."""
    for name, kept in masks.items():
        for moment in MOMENTS:
            if moment in (state := optimizer.state.get(parameters[name], {})):
                state[moment].mul_(kept)
