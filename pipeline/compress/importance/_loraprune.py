"""LoRAPrune's estimate of |w dL/dw| while only LoRA's two matrices have gradients.

Source: Zhang et al. 2024, "LoRAPrune", arXiv 2305.18403. With W + s B A the weight in use,
dL/dW ~ dB A + B dA - dB dA, where learning rate and scale are left out. It is crude: in the test's example the true
saliencies rank the entries otherwise. At the start B = 0 and dA = 0, so scores mean nothing before some steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def estimated_gradient(a: torch.Tensor, b: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor) -> torch.Tensor:
    """dL/dW (out, in) from A (r, in), B (out, r) and their gradients."""
    return grad_b @ a + b @ grad_a - grad_b @ grad_a


def saliency(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    scale: float = 1.0,
) -> torch.Tensor:
    """|dL/dW (W + s B A)|, (out, in), with the estimated gradient."""
    return (estimated_gradient(a, b, grad_a, grad_b) * (weight + scale * b @ a)).abs()


def averaged(before: torch.Tensor | None, now: torch.Tensor) -> torch.Tensor | None:
    """Running unit scores (units,): 0.9 of before, 0.1 of these at L2 norm 1; not changed by one that is not finite."""
    norm = now.norm()
    if not bool(now.isfinite().all()) or not bool(norm > 0):
        return before
    now = now / norm
    return now if before is None else 0.9 * before + 0.1 * now
