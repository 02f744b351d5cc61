"""OWL: blocks with more outliers keep more.

Yin et al. 2023, "Outlier Weighed Layerwise Sparsity" (arXiv 2310.05175, ICML 2024; luuyin/OWL): the share of a block's
Wanda scores |W_ij| ||X_j|| that exceed M times their mean, all its linears together, stretched linearly over densities
2 lambda apart whose mean over parameters is 1 - S. Every part of a block, matrix or units, is pruned to its block's
density. M = 5 and lambda = 0.08 are the paper's.

One forward pass over the dense model. Its gains are at 70 % and above for weights; on OPT-6.7B with SparseGPT it lost
(20.29 -> 22.48 perplexity), so look at `uniform` beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress._routed import matrix_moments
from pipeline.compress.allocation._blocks import by_block, matrices, outward
from pipeline.compress.allocation._fill import spread
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Probe
    from pipeline.compress.units import Part


class Owl(Allocation):
    """Densities per block in a band 2 `lam` wide, by its share of scores above `outlier` times their mean."""

    kind: Literal["owl"] = "owl"
    outlier: float = Field(5.0, gt=0)
    lam: float = Field(0.08, ge=0, lt=0.5)
    data: ClassVar[str] = "forward"
    source: ClassVar[str] = "Yin et al. 2023, arXiv 2310.05175"

    def probes(self, body: Anatomy, parts: Sequence[Part]) -> list[Probe]:
        return matrix_moments(body, [name for block in matrices(body) for name in block])

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        if evidence.calibration is None:
            raise ConfigError("allocation owl: looks at activations and needs calibration data")
        body = evidence.body
        moments = evidence.calibration.measure(*self.probes(body, parts))
        outliers = np.array(
            [
                outlier_share(
                    [outward(body, n).abs() * moments[f"{n}.square"].sqrt().float() for n in block], self.outlier
                )
                for block in matrices(body)
            ]
        )
        return spread(parts, target, by_block(parts, target, outliers, self._shares))

    def _shares(self, outliers: np.ndarray, weight: np.ndarray, share: float) -> np.ndarray:
        return 1 - densities(outliers, weight, share, self.lam)


def outlier_share(scores: Sequence[torch.Tensor], times: float) -> float:
    """Percentage of the entries of some matrices that exceed `times` their mean; 0 of none."""
    entries = int(sum(s.numel() for s in scores))
    limit = times * sum(float(s.double().sum()) for s in scores) / max(1, entries)
    return 100 * sum(int((s > limit).sum()) for s in scores) / max(1, entries)


def densities(outliers: np.ndarray, weight: np.ndarray, share: float, lam: float) -> np.ndarray:
    """Share that each block keeps, (blocks,) in [0, 1]; their mean by `weight` is 1 - share where none is clipped."""
    reach = float(np.ptp(outliers))
    raised = (outliers - outliers.min()) / reach * 2 * lam if reach else np.zeros(len(outliers))
    kept: np.ndarray = np.clip(raised - np.average(raised, weights=weight) + 1 - share, 0, 1)
    return kept
