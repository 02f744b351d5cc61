"""Wanda, the pruner that calibration sets are tried on: a weight counts |W_ij| * ||x_j||, compared within its output.

Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. In one
shot: norms are those of the dense model's activations, where the paper prunes layer by layer. Embeddings and the head
stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH = 8


def wanda(model: PreTrainedModel, ids: np.ndarray, sparsity: float) -> None:
    """Zero the share `sparsity` of every output's weights, in place; `ids` (n, tokens) are what it is calibrated on."""
    import torch

    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    squares = {layer: torch.zeros(layer.in_features, device=layer.weight.device) for layer in layers}

    def note(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        squares[layer] += inputs[0].flatten(0, -2).float().square().sum(0)

    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.inference_mode():
        for block in torch.from_numpy(ids.astype(np.int64)).to(model.device).split(BATCH):
            model(input_ids=block, use_cache=False)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for layer in layers:
            weight = layer.weight
            matters = weight.float().abs() * squares[layer].sqrt()
            least = matters.argsort(dim=1, stable=True)[:, : int(sparsity * weight.shape[1])]
            weight.scatter_(1, least, 0.0)
