"""Chance: the control that every criterion has to beat at the same counts per matrix.

Source: Liu et al. 2022, "The Unreasonable Effectiveness of Random Pruning", arXiv 2202.02643. They draw every weight by
itself; here exact counts are drawn, which takes one source of noise away. How much goes from which layer is the
allocation's business; ER, ERK and SNIP ratios are in `pipeline.compress.sparse._ratios`.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pipeline.compress.sparse.base import Criterion, Matrix

if TYPE_CHECKING:
    import torch


class Random(Criterion):
    """A number for every weight, drawn from the seed and the matrix's name."""

    kind: Literal["random"] = "random"
    scope: Literal["row", "matrix"] = "matrix"
    seed: int = 0
    source: ClassVar[str] = "Liu et al. 2022, arXiv 2202.02643"

    def scores(self, matrix: Matrix) -> torch.Tensor:
        import torch

        rng = np.random.default_rng([self.seed, zlib.crc32(matrix.name.encode())])
        return torch.from_numpy(rng.random(tuple(matrix.weight.shape))).to(matrix.weight.device)
