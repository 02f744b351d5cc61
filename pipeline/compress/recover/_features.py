"""Distances between hidden features of teacher and student that no single layer dominates.

LAPTOP-Diff (Zhang et al. 2024, arXiv 2404.11098) divides each layer's feature loss by the teacher feature's norm: deep
layers have features ten times as long as the first ones, and would be all that is learned. The published text leaves
open whether the norm is squared; `squared` says so, and then a loss is 1 where the student's features are all zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def normalised_feature_loss(
    teacher: Sequence[torch.Tensor],
    student: Sequence[torch.Tensor],
    mask: torch.Tensor | None = None,
    squared: bool = False,
) -> torch.Tensor:
    """Sum over layers of ||F_t - F_s||^2 / ||F_t||, or / ||F_t||^2; over all of a layer's entries. Scalar, float32.

    `teacher`, `student`: per layer (rows, length, hidden), paired; `mask`: (rows, length), False where padded.
    """
    import torch

    total = torch.zeros((), device=student[0].device)
    for t, s in zip(teacher, student, strict=True):
        t, s = t.detach().float(), s.float()
        if mask is not None:
            t, s = t * mask[..., None], s * mask[..., None]
        norm = t.square().sum() if squared else t.norm()
        total = total + (t - s).square().sum() / norm.clamp_min(torch.finfo(torch.float32).tiny)
    return total
