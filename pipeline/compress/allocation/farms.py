"""AlphaPruning with FARMS' windows: blocks whose spectra have light tails, the less trained ones, lose more. Data-free.

Hu et al. 2025, "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias" (arXiv 2506.06280, ICML 2025;
HUST-AI-HYZ/FARMS) on top of AlphaPruning (Lu et al. 2024, arXiv 2410.10912, number from memory, unverified): alpha is
the exponent of a power law in the eigenvalues of W^T W, mean over a block's matrices; shares are in proportion to alpha
stretched linearly to [1 - e, 1 + e].

A spectrum depends on the shape of its matrix, so square windows are cut out of it, `positions` along each side, and
their eigenvalues pooled (FARMS). Two fits: `hill` over the upper half of the eigenvalues, and `peak`, by maximum
likelihood above the x_min near the peak of the density (log10 histogram of 100 bins, 0.95 to 1.5 times the peak) that
has the smallest Kolmogorov-Smirnov distance.

The paper takes windows of 2000 and 10 to 15 positions a side: hours on a CPU. Here 256 and 3, which for hidden sizes up
to 1024 the spec found enough; e = 0.3 is theirs for Wanda at 70 % (0.2 for SparseGPT). The only allocation that needs
no data: a check on what calibration data do to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.allocation._blocks import by_block, matrices, outward
from pipeline.compress.allocation._fill import spread
from pipeline.compress.allocation.base import Allocation, Evidence, Target

if TYPE_CHECKING:
    import torch

    from pipeline.compress.units import Part


class Farms(Allocation):
    """Shares per block by the exponent of its spectra; `width`: half of the band of shares, relative to their mean."""

    kind: Literal["farms"] = "farms"
    width: float = Field(0.3, ge=0, lt=1)
    window: int = Field(256, ge=2)
    positions: int = Field(3, ge=1)
    fit: Literal["hill", "peak"] = "hill"
    source: ClassVar[str] = "Hu et al. 2025, arXiv 2506.06280"

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        fit = hill if self.fit == "hill" else peak
        alphas = [
            [fit(eigenvalues(outward(evidence.body, n), self.window, self.positions)) for n in names]
            for names in matrices(evidence.body)
        ]
        mean = np.array([np.mean(alpha) if alpha else 0.0 for alpha in alphas])
        return spread(parts, target, by_block(parts, target, mean, self._shares))

    def _shares(self, alpha: np.ndarray, weight: np.ndarray, share: float) -> np.ndarray:
        return band(alpha, weight, share, self.width)


def eigenvalues(weight: torch.Tensor, window: int, positions: int) -> np.ndarray:
    """Of W^T W of square windows of a matrix, pooled, descending; those below 1e-12 of the largest are dropped."""
    import torch

    side = min(window, *weight.shape)
    rows, columns = (np.unique(np.linspace(0, n - side, positions).round().astype(int)) for n in weight.shape)
    windows = torch.stack([weight[r : r + side, c : c + side] for r in rows for c in columns])
    found: np.ndarray = np.sort(torch.linalg.svdvals(windows).double().square().flatten().cpu().numpy())[::-1]
    return np.asarray(found[found > 1e-12 * found.max(initial=0)])


def hill(values: np.ndarray, k: int | None = None) -> float:
    """1 + k / sum of ln(lambda_i / lambda_(k+1)) over the k largest of descending eigenvalues; k: half of them.

    0 where there are too few to tell, or all are equal.
    """
    k = len(values) // 2 if k is None else k
    if not 0 < k < len(values):
        return 0.0
    logs = float(np.log(values[:k] / values[k]).sum())
    return 1 + k / logs if logs > 0 else 0.0


def peak(values: np.ndarray) -> float:
    """1 + n / (sum ln lambda - n ln x_min) above the best x_min near the peak of the density; 0 as `hill` says."""
    if len(values) < 4:
        return 0.0
    counts, edges = np.histogram(np.log10(values), 100)
    top = int(counts.argmax())
    at = 10 ** ((edges[top] + edges[top + 1]) / 2)
    ascending = values[::-1]
    fits: list[tuple[float, float]] = []
    for x_min in ascending[(ascending > 0.95 * at) & (ascending < 1.5 * at)]:
        tail = ascending[ascending >= x_min]
        logs = float(np.log(tail / x_min).sum())
        if len(tail) < 2 or logs <= 0:
            continue
        alpha = 1 + len(tail) / logs
        fitted = 1 - (tail / x_min) ** (1 - alpha)
        fits.append((float(np.abs(fitted - np.arange(len(tail)) / len(tail)).max()), alpha))
    return min(fits)[1] if fits else 0.0


def band(alpha: np.ndarray, weight: np.ndarray, share: float, width: float) -> np.ndarray:
    """Shares of removal, (blocks,), in proportion to alpha stretched to 1 +- width, with mean `share`."""
    reach = float(np.ptp(alpha))
    relative = 1 - width + 2 * width * (alpha - alpha.min()) / reach if reach else np.ones(len(alpha))
    return np.asarray(share * relative / np.average(relative, weights=weight))
