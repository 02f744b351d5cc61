"""SparseGPT: columns are pruned from left to right, and those to the right make up for the error.

Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv
2301.00774, algorithm 1. H = (2/N) X^T X, damped by `damping` times its mean diagonal; U with H^-1 = U^T U upper
triangular. Per block of columns the score is w^2 / U_ii^2 over all rows together (N:M: per group and row, when the
sweep gets there, so that earlier updates count); then column i gives its error e = (w_i - q_i) / U_ii to the columns on
its right, W -= e U_i. Inputs that were never active: their weights go to 0 and are no longer counted for.

Columns that were passed are frozen, so the result is not the least-squares optimum of its mask; `refit` of the step
is. A Hessian that does not factor is damped ten times as much, up to three times; then the matrix falls back to Wanda,
and the report says so. in^2 numbers of memory and O(in^3 + out in^2) operations a matrix; the factor in float64.
Defaults (block 128, damping 0.01) are the authors'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress.sparse.base import Matrix, Needs, Pattern, Pruned, Pruner, Quota
from pipeline.compress.sparse.wanda import Wanda

if TYPE_CHECKING:
    import torch

RETRIES = 3


class Sparsegpt(Pruner):
    """Optimal brain surgery, column by column, with a mask that adapts."""

    kind: Literal["sparsegpt"] = "sparsegpt"
    block: int = Field(128, ge=1, description="columns whose mask is chosen together")
    damping: float = Field(0.01, ge=0, description="share of the mean diagonal that is added to it")
    needs: ClassVar[Needs] = "gram"
    source: ClassVar[str] = "Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1"

    def fits(self, shape: tuple[int, int], pattern: Pattern | None) -> str:
        if pattern and self.block % pattern.of:
            return f"its block of {self.block} columns is no multiple of {pattern.of}"
        return super().fits(shape, pattern)

    def prune(self, matrix: Matrix, quota: Quota) -> Pruned:
        hessian = matrix.seen["gram"].double() * (2 / max(1.0, matrix.tokens))
        dead = hessian.diagonal() == 0
        hessian = hessian + dead.double().diag()
        for retry in range(RETRIES + 1):
            factor = inverse_factor(hessian, self.damping * 10**retry)
            if factor is not None:
                weight = matrix.weight.masked_fill(dead, 0.0)
                mask, weight = sweep(weight, factor.to(weight.dtype), quota, self.block)
                return Pruned(mask, weight, f"damping times {10**retry}" if retry else "")
        fallen = Wanda().prune(matrix, quota)
        fallen.note = "the Hessian does not factor: Wanda"
        return fallen


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Upper triangular U with U^T U = (H + damping mean(diag H) I)^-1; None where there is none."""
    import torch

    damped = hessian + torch.eye(len(hessian)).to(hessian) * damping * hessian.diagonal().mean()
    lower, info = torch.linalg.cholesky_ex(damped)
    if info.item() or not lower.isfinite().all():
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper if not info.item() and bool(upper.isfinite().all()) else None


def sweep(weight: torch.Tensor, factor: torch.Tensor, quota: Quota, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and weights (out, in) of the sweep over columns; without a pattern every block loses its even share."""
    import torch

    from pipeline.compress.sparse._select import keep_highest

    weight = weight.clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    rows, columns = weight.shape
    remove = weight.numel() - quota.keep
    for start in range(0, columns, block):
        end = min(start + block, columns)
        u = factor[start:end, start:end]
        part, kept = weight[:, start:end], mask[:, start:end]
        errors = torch.zeros_like(part)
        if quota.pattern is None:
            gone = end * remove // columns - start * remove // columns
            score = (part / u.diagonal()).square()
            kept[:] = keep_highest(score.reshape(1, -1), gone).view(rows, -1)
        for i in range(end - start):
            if quota.pattern and i % quota.pattern.of == 0:
                group = slice(i, i + quota.pattern.of)
                score = (part[:, group] / u.diagonal()[group]).square()
                kept[:, group] = keep_highest(score, quota.pattern.of - quota.pattern.keep)
            pruned = part[:, i].where(kept[:, i], part.new_zeros(()))
            errors[:, i] = (part[:, i] - pruned) / u[i, i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
            part[:, i] = pruned
        weight[:, end:] -= errors @ factor[start:end, end:]
    return mask, weight
