"""From scores to masks: the lowest go, exactly as many as are to go, of equal ones the lower index first."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.compress.sparse.base import Quota


def keep_highest(scores: torch.Tensor, remove: torch.Tensor | int) -> torch.Tensor:
    """Mask (rows, n), False for the `remove` lowest of each row ((rows,) int64, or the same number for all).

    Raises ValueError where a score is not finite.
    """
    if not scores.isfinite().all():
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite")
    order = scores.argsort(dim=1, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    stays = rank >= torch.as_tensor(remove, device=scores.device).reshape(-1, 1)
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, order, stays.expand_as(order))


def select(scores: torch.Tensor, quota: Quota, by_row: bool) -> torch.Tensor:
    """Mask of a matrix (out, in) that meets a quota: within groups of a pattern, within rows, or over the matrix."""
    if quota.pattern:
        groups = scores.reshape(-1, quota.pattern.of)
        return keep_highest(groups, quota.pattern.of - quota.pattern.keep).view(scores.shape)
    remove = scores.numel() - quota.keep
    if by_row:
        return keep_highest(scores, torch.from_numpy(shares(remove, len(scores))))
    return keep_highest(scores.reshape(1, -1), remove).view(scores.shape)


def shares(total: int, parts: int) -> np.ndarray:
    """A number in so many whole parts, (parts,) int64, none more than one greater than another, evenly mixed."""
    return np.diff(np.arange(parts + 1, dtype=np.int64) * total // parts)
