"""SLiM's low-rank part: what a mask took from a matrix and matters most to its outputs, as L R of a small rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.compress.sparse.base import Matrix, Pruned

if TYPE_CHECKING:
    import torch


class LowRank(BaseModel):
    """SLiM-LoRA: the part of the error that matters most to the outputs, as L R of a small rank.

    Source: Mozaffari et al. 2024, "SLiM: One-shot Quantization and Sparsity with Low-rank Approximation for LLM Weight
    Compression", arXiv 2410.09615: the SVD of E diag(x) = U s V^T with E = W - W_pruned and x the saliency of inputs
    gives L = U_r s_r, R = V_r^T diag(1 / x); what is left of the weighted error is exactly the tail of the spectrum.
    Works on any mask, of every matrix that a linear module holds. `saliency`: the paper's mean |x|, or the code's root
    mean square; where an input was never active the SVD is not weighted (the code shifts such inputs instead). Rank
    share 0.1 is the authors'.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: float = Field(0.1, gt=0, le=1, description="share of the smaller side of each matrix")
    saliency: Literal["mean", "rms"] = "mean"
    fold: bool = Field(
        False,
        description="add L R to the weight instead of keeping it beside: dense again, for loaders that know no factors",
    )

    def fit(self, matrix: Matrix, pruned: Pruned) -> tuple[torch.Tensor, torch.Tensor]:
        """L (out, r) and R (r, in), float32."""
        sums = matrix.seen["abs"] if self.saliency == "mean" else matrix.seen["square"]
        x = sums / max(1.0, matrix.tokens)
        rank = max(1, int(self.rank * min(matrix.weight.shape)))
        return low_rank(matrix.weight - pruned.weight, x if self.saliency == "mean" else x.sqrt(), rank)


def low_rank(error: torch.Tensor, saliency: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L (out, rank) and R (rank, in) with the least sum of squares of (error - L R) diag(saliency)."""
    import torch

    x = saliency.to(error.dtype)
    x = x if bool((x > 0).all()) else torch.ones_like(x)
    u, s, v = torch.linalg.svd(error * x, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank] / x
