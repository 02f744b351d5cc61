"""Gradients of single rows, many rows at a time.

The gradient of a linear layer's weight for row i is B_i^T A_i, with A_i (T x d_in) what went in and B_i (T x d_out) the
gradient of the loss by what came out. Both are there for a whole batch after one forward and one backward pass in which
no weight needs a gradient, so `backward` hands (A, B) to a function as soon as a layer's is known, and that function
makes of it what it needs: the gradient itself (`outer`), its norm (`squared_norms`), its product with a direction that
is fixed (`along`) or with another row's (`ghost`; Goodfellow 2015, arXiv 1510.01799). A batch costs 4N FLOPs a token
where the plain loop costs 6N and a Python round trip a row; only `outer` adds the 2N back.

The graph begins at the first layer that is asked for: for the last layer alone the pass is a forward pass and the
closed form (p - y) a^T.

What it trades away: nn.Linear alone is seen (weight and bias), not embeddings or norms. A head that shares its matrix
with the embedding counts as a head.

Curvature by Kronecker factors, EK-FAC (Grosse et al. 2023, arXiv 2308.03296), is not here. The package `kronfluence`
1.0.1 has it for nn.Linear and nn.Conv2d, and fits factors and scores pairs of a small network with torch 2.14.1. It
asks for `accelerate`, `einops`, `einconv`, `opt-einsum` and torchvision, a `Task` that gives the summed loss of a batch
and samples labels for the Fisher matrix, damping above 0, and passes over the corpus for covariances of d_in^2 and
d_out^2 numbers a layer. Its scores are rows x queries: it explains single examples, it does not rank a corpus.

Measured on one core (bench/gradients.py), against a loop of one row at a time with the gradients of all weights: on 64
rows of 32 tokens and 0.23 M weights 5.0 times as fast for the gradients themselves, 5.5 for norms, 11.9 for the head,
7.3 for adapters of rank 8, in CPU seconds. There the loop is mostly overhead; where matrix
products are the time, FLOPs decide: 1.5, 1.4, 4.4 and 1.9 on 32 rows of 128 tokens and 0.85 M weights. The losses of
all tokens are a tenth of a batch unless they are one contiguous matrix: 9.4 ms as (n, V, T), 3.4 as (n * T, V).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

Take = Callable[[str, "torch.Tensor", "torch.Tensor"], None]
"""Gets a layer's name, its inputs A (n, T - 1, d_in) and its output gradients B (n, T - 1, d_out), both float32; the
last token of a row is not among them, because it predicts nothing."""


def linear_layers(model: nn.Module, *names: str) -> dict[str, nn.Linear]:
    """The nn.Linear modules whose last name is one of `names`, or all of them; by their full names, in order.

    Raises ConfigError where there is none.
    """
    from torch import nn

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (not names or name.rpartition(".")[2] in names)
    }
    if not layers:
        raise ConfigError(f"the model {type(model).__name__} has no linear layer {' or '.join(names)}".rstrip())
    return layers


def head(model: Any) -> dict[str, nn.Linear]:
    """The last layer of a causal LM, from hidden states to logits."""
    last = model.get_output_embeddings()
    return {name: module for name, module in linear_layers(model).items() if module is last}


@contextmanager
def tapped(layers: Mapping[str, nn.Linear], take: Take) -> Iterator[None]:
    """Within, a backward pass calls `take` for each of the layers; A has a column of ones more where there is a bias.

    No weight may ask for a gradient: then the graph begins at the outputs of the first layers.
    """

    def tap(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        a = inputs[0].detach().float()

        def taken(gradient: torch.Tensor) -> None:
            take(name, a if layer.bias is None else _with_ones(a), gradient.detach().float())

        output.register_hook(taken)
        return output

    hooks = [layer.register_forward_hook(partial(tap, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_ones(a: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)


def token_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """-log p in nats of tokens 2 .. T of (n, T) ids; float32 (n, T - 1). Rows are padded at their ends, if at all.

    The model does not see the last token, which predicts nothing.
    """
    import torch

    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids[:, 1:].shape)


def backward(model: Any, layers: Mapping[str, nn.Linear], ids: torch.Tensor, weight: torch.Tensor, take: Take) -> None:
    """Hand out every row's gradients of `sum(weight * token_losses)`; ids (n, T), weight (n, T - 1).

    With weight 1 / (number of tokens that count) the loss of a row is their mean. Padding has weight 0.
    """
    with tapped(layers, take):
        (token_losses(model, ids) * weight).sum().backward()


def outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The gradients themselves, B_i^T A_i row by row; (n, d_out * d_in)."""
    return (b.transpose(1, 2) @ a).flatten(1)


def along(a: torch.Tensor, b: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Products of the gradients with one of shape (d_out, d_in), at the price of one forward pass; (n,)."""
    return ((a @ direction.T) * b).sum(dim=(1, 2))


def ghost(a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    """<B_1^T A_1, B_2^T A_2> = sum((A_1 A_2^T) * (B_1 B_2^T)) pair by pair, without a d_out x d_in matrix; (n,)."""
    return ((a1 @ a2.transpose(1, 2)) * (b1 @ b2.transpose(1, 2))).sum(dim=(1, 2))


def squared_norms(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared norms of the gradients, by the cheaper of the two ways; (n,)."""
    tokens, d_in, d_out = a.shape[1], a.shape[2], b.shape[2]
    if tokens * (d_in + d_out) < d_in * d_out:
        return ghost(a, b, a, b).clamp_min(0)  # a sum of signed products may round below 0
    return outer(a, b).square().sum(dim=1)
