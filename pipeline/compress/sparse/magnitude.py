"""Magnitude: the smallest weights go. Needs no data.

Source: Zhu & Gupta 2017, "To prune, or not to prune", arXiv 1710.01878 (the score; their schedule is
`pipeline.compress.schedule._sparsity.Gradual`). A weak floor for language models: published LLaMA-7B at 50 % has a
perplexity of 17.3 against 5.7 dense (from memory, unverified). `scope: global` ranks the weights of all matrices as
one and so makes its own allocation; no matrix loses more than the step's `cap`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.compress.sparse.base import Criterion, Matrix, Scope

if TYPE_CHECKING:
    import torch


class Magnitude(Criterion):
    """|W|, ranked within a row, a matrix, or over all matrices."""

    kind: Literal["magnitude"] = "magnitude"
    scope: Scope = "matrix"
    source: ClassVar[str] = "Zhu & Gupta 2017, arXiv 1710.01878"

    def scores(self, matrix: Matrix) -> torch.Tensor:
        return matrix.weight.abs()
