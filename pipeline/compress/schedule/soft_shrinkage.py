"""Soft shrinkage: the smallest weights are made smaller step by step before they are set to zero for good.

ISS-P (Wang et al. 2023, arXiv 2303.09650): after every step the lowest `ratio` of each matrix, chosen anew, is
multiplied by `rate`, so that weights may recover; at `harden` of the budget those of the moment become 0 and stay so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress.schedule.base import Schedule

if TYPE_CHECKING:
    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup
    from pipeline.compress.schedule.base import Callback


class SoftShrinkage(Schedule):
    """Shrink, and harden at last."""

    source: ClassVar[str] = "Wang et al. 2023, arXiv 2303.09650"
    kind: Literal["soft_shrinkage"] = "soft_shrinkage"
    ratio: float = Field(ge=0, lt=1)
    rate: float = Field(0.95, ge=0, le=1, description="what a small weight is multiplied by, a step")
    harden: float = Field(0.75, gt=0, le=1, description="share of the budget at which small weights become 0")

    def start(self, setup: Setup, session: Session) -> Callback:
        from pipeline.compress.schedule._masking import Masking, matrices
        from pipeline.compress.schedule._sparsity import SoftShrinkage as Inner

        names = matrices(self.kind, setup, session)
        return Masking(Inner(names, self.ratio, None, self.rate, self.harden), self.harden)
