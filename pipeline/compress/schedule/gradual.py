"""Gradual structured pruning: units go at a few moments of the training, many at first, few at the end.

The share that is gone after event i of n is s (1 - (1 - i / n)^3), the cubic of Zhu & Gupta (2017, arXiv 1710.01878),
spread over the first `until` of the budget: an MLP of 48 neurons on its way to 24 in four events has 48, 34, 27, 24 and
24. Scores and shares are measured anew each time, on the model as it is then; the optimizer's moments are cut with it.

Before the end a step costs more than with a model that was cut at once: at equal FLOPs it sees fewer tokens (`shapes`
of the metrics say when it measured what). Minitron found one cut no worse, SlimQwen (arXiv 2605.08738) found this
better: run both.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.compress.schedule._stepped import Stepped
from pipeline.compress.schedule.base import cubic


class Gradual(Stepped):
    """A step of kind `width`, taken in parts."""

    source: ClassVar[str] = "Zhu & Gupta 2017, arXiv 1710.01878, equation 1"
    kind: Literal["gradual"] = "gradual"
    events: int = Field(4, ge=1)
    until: float = Field(0.5, gt=0, le=1, description="share of the budget at which the last part goes")

    def moments(self, ratio: float) -> list[tuple[float, float]]:
        parts = range(1, self.events + 1)
        return [(self.until * i / self.events, cubic(0, ratio, i / self.events)) for i in parts]
