"""Scalar: every column that stays is stretched by a number of its own, so that the consumer's output changes the least.

Source: after the mask tuning of Xu et al. 2025, COMP, arXiv 2501.15255, whose formula is not published: a
reconstruction. With C = (W^T W) * (X^T X) entry by entry, the error ||W X - W_K diag(m) X_K||^2 is quadratic in m, and
m = 1 + (C_KK + r I)^-1 C_KP 1, where r (`ridge` times the mean diagonal of C_KK) pulls towards 1; then clipped to [0,
2]. A healer of n numbers a layer, where `refit` solves for n d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress._weights import consumers, dampened, factor, hessian, losses, matrix
from pipeline.compress.calibration import InputMoments
from pipeline.compress.compensation.base import Compensation

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Removal, Units


class Scalar(Compensation):
    """A factor for each column that stays, by ridge regression."""

    kind: Literal["scalar"] = "scalar"
    ridge: float = Field(0.01, ge=0, description="pull towards 1, as a share of the mean diagonal")
    limit: float = Field(2.0, ge=1, description="largest factor; the smallest is 0")
    source: ClassVar[str] = "after Xu et al. 2025, arXiv 2501.15255 (a reconstruction)"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        return [InputMoments(consumers(self.kind, groups), gram=True)]

    def apply(self, body: Anatomy, groups: Sequence[Units], removal: Removal, calibration: Calibration) -> None:
        import torch

        sums = calibration.measure(*self.probes(body, groups))
        for units, goes, stays in losses(groups, removal):
            weight = matrix(body, units.consumer)
            c = weight.double().T @ weight.double() * hessian(sums, units.consumer, 0)
            kept = dampened(c[stays][:, stays], self.ridge)
            if not len(stays) or not float(kept.diagonal().sum()):
                continue  # nothing could change, or nothing ever comes in
            lost = c[stays][:, goes].sum(1, keepdim=True)
            factors = 1 + torch.cholesky_solve(lost, factor(kept, self.kind, "ridge"))[:, 0]
            weight[:, stays] *= factors.clamp(0, self.limit).to(weight)
