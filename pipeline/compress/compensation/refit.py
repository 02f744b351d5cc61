"""Refit: the columns that stay are solved for anew, so that the consumer's output changes the least.

Source: Li et al. 2025, Týr-the-Pruner, arXiv 2503.09657; the exact solution of OBS. With H the mean of x x^T, damped:
W_K' = (W H)_:,K H_KK^-1 = W_K + W_P H_PK H_KK^-1, the minimum of the squared output error over calibration tokens with
the damping pulling towards the old weights. Every earlier update by OBS, in whatever rounds, ends at this solution.
Only o_proj and down_proj change. Damping 0.01 of the mean diagonal is the authors'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress._weights import consumers, factor, hessian, losses, matrix
from pipeline.compress.calibration import InputMoments
from pipeline.compress.compensation.base import Compensation

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Removal, Units


class Refit(Compensation):
    """Least squares for the columns that stay."""

    kind: Literal["refit"] = "refit"
    damping: float = Field(0.01, ge=0, description="share of the mean diagonal that is added to the diagonal")
    source: ClassVar[str] = "Li et al. 2025, arXiv 2503.09657; Hassibi & Stork 1993"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        return [InputMoments(consumers(self.kind, groups), gram=True)]

    def apply(self, body: Anatomy, groups: Sequence[Units], removal: Removal, calibration: Calibration) -> None:
        import torch

        sums = calibration.measure(*self.probes(body, groups))
        for units, goes, stays in losses(groups, removal):
            weight, h = matrix(body, units.consumer), hessian(sums, units.consumer, self.damping)
            if not len(stays) or not float(h.diagonal().sum()):
                continue  # nothing could change, or nothing ever comes in
            into = h[goes][:, stays].T
            solved = torch.cholesky_solve(into, factor(h[stays][:, stays], self.kind, "damping"))
            weight[:, stays] += (weight[:, goes].double() @ solved.T).to(weight)
