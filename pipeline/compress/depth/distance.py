"""How far an output is from the dense model's: one function a distance, one number a row.

Outputs are logits (rows, length, vocabulary), or (rows, classes), or last hidden states where a model makes no logits.
Everything in float32 at the least; padded positions (mask False) do not count.

- `fro`: Frobenius norm of the difference, a row at a time (FinerCut's default).
- `angle`: arccos(clamp(cos, 0, 1)), mean over tokens.
- `jsd`, `kl`: Jensen-Shannon divergence and KL(dense || other) of the distributions, nats, mean over tokens.
- `mse`: squared Euclidean norm of the difference, mean over tokens (LAPTOP-Diff's delta).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Distance = Literal["fro", "angle", "jsd", "kl", "mse"]


def distance(
    kind: Distance, dense: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Of every row, (rows,) float64."""
    import torch

    dense, other = (x.float() if x.ndim > 2 else x.float()[:, None] for x in (dense, other))
    if kind in ("fro", "mse"):
        each = (dense - other).square().sum(-1)
    elif kind == "angle":
        each = torch.nn.functional.cosine_similarity(dense, other, dim=-1).clamp(0, 1).arccos()
    else:
        p, q = dense.log_softmax(-1), other.log_softmax(-1)
        if kind == "kl":
            each = _kl(p, q)
        else:
            middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
            each = (_kl(p, middle) + _kl(q, middle)) / 2
    counts = torch.ones_like(each) if mask is None or mask.shape != each.shape else mask.to(each.dtype)
    total = (each * counts).double().sum(1)
    return total.sqrt() if kind == "fro" else total / counts.sum(1).clamp_min(1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL divergence over the last axis of distributions given as logarithms."""
    return (p.exp() * (p - q)).sum(-1)
