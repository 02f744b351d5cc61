"""Gradual magnitude pruning: single weights go to zero while the model trains, many at first, few at the end.

Zhu & Gupta 2017 (arXiv 1710.01878, equation 1): between `begin` and `until` of the budget the share of zeros in every
matrix of the layers is s (1 - (1 - t)^3), and at each of `events` the smallest weights of that moment are masked. What
is masked stays 0, and gets no gradient; behind the last event the mask is final. `regrow`: between events all weights
train, so one may come back. Masks make nothing faster: FLOPs are those of the dense model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.compress.schedule.base import Schedule

if TYPE_CHECKING:
    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup
    from pipeline.compress.schedule.base import Callback


class GradualMagnitude(Schedule):
    """Masks by magnitude, along the cubic."""

    source: ClassVar[str] = "Zhu & Gupta 2017, arXiv 1710.01878"
    kind: Literal["gradual_magnitude"] = "gradual_magnitude"
    ratio: float = Field(ge=0, lt=1)
    begin: float = Field(0.0, ge=0, lt=1, description="share of the budget at which it begins")
    until: float = Field(0.6, gt=0, le=1, description="share of the budget at which the ratio is reached")
    events: int = Field(100, ge=1)
    regrow: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.begin >= self.until:
            raise ValueError("begin must lie before until")
        return self

    def start(self, setup: Setup, session: Session) -> Callback:
        from pipeline.compress.schedule._masking import Masking, matrices
        from pipeline.compress.schedule._sparsity import Gradual

        names = matrices(self.kind, setup, session)
        inner = Gradual(names, self.ratio, 0.0, self.begin, self.until, self.events, self.regrow)
        return Masking(inner, self.until if self.regrow else 0.0)
