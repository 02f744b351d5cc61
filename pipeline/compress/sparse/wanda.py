"""Wanda: a weight matters as much as it is large and its input is active.

Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695:
S_ij = |W_ij| ||X_j||_2 over all calibration tokens, compared within each output row, no update of weights. Two forward
passes, one number per input. A row's scale cancels out, so nothing is lost between rows of different norm, and nothing
is gained: every row loses the same number.

`rows: cumulative` is the authors' variant: a row gives up its lowest weights up to a share alpha of its summed score,
the same alpha for all rows. They search alpha by bisection; the mask at the alpha that meets the target is the lowest
of all running shares, which is taken here, so the count is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.compress.sparse.base import Criterion, Matrix, Needs

if TYPE_CHECKING:
    import torch


class Wanda(Criterion):
    """|W_ij| ||X_j||_2, ranked within rows."""

    kind: Literal["wanda"] = "wanda"
    scope: Literal["row", "matrix"] = "row"
    rows: Literal["equal", "cumulative"] = "equal"
    needs: ClassVar[Needs] = "moments"
    source: ClassVar[str] = "Sun et al. 2023, arXiv 2306.11695, eq. 1"

    def scores(self, matrix: Matrix) -> torch.Tensor:
        score = matrix.weight.abs() * matrix.norms
        return score if self.rows == "equal" else running_shares(score)


def running_shares(score: torch.Tensor) -> torch.Tensor:
    """For each entry of a row (out, in) the share of the row's sum that it and all lower ones make up, float64."""
    ordered, order = score.double().sort(dim=1, stable=True)
    running = ordered.cumsum(1) / ordered.sum(1, keepdim=True).clamp_min(1e-300)
    return running.new_empty(running.shape).scatter_(1, order, running)
