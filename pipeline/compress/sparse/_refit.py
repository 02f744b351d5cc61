"""The exact least-squares refit of a masked matrix."""

from __future__ import annotations

import torch

from pipeline.compress.sparse.base import Matrix

ROWS = 1 << 26
"""Numbers of the stacked systems that are solved at a time."""


def refit(matrix: Matrix, mask: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """The weights (out, in) that come nearest to the dense outputs under a mask: W_K = G_K H_KK^-1 row by row, G = W H.

    H = X^T X plus `damping` times its mean diagonal, in float64. As expensive as it is exact: a system of in unknowns
    for every row, O(out in^3).
    """
    gram = matrix.seen["gram"].double()
    gram = gram + torch.eye(len(gram)).to(gram) * (damping * gram.diagonal().mean()).clamp_min(1e-30)
    wanted = matrix.weight.double() @ gram
    rows = max(1, ROWS // gram.numel())
    return torch.cat([
        _solve(gram, keep.double(), target) for keep, target in zip(mask.split(rows), wanted.split(rows), strict=True)
    ]).to(matrix.weight.dtype)  # fmt: skip


def _solve(gram: torch.Tensor, keep: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Rows (r, in): with ones on the diagonal of what is masked, one system of full width serves any mask."""
    system = gram * keep[:, :, None] * keep[:, None, :] + torch.diag_embed(1 - keep)
    solved: torch.Tensor = torch.linalg.solve(system, (target * keep)[:, :, None])[:, :, 0]
    return solved * keep
