"""Schedules that take a step of kind `width` in parts while the model trains: all but when the parts go is theirs."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, SerializeAsAny

from pipeline.compress.schedule.base import Schedule
from pipeline.compress.steps.base import Step
from pipeline.config import recipe_in

if TYPE_CHECKING:
    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup
    from pipeline.compress.schedule.base import Callback


class Stepped(Schedule):
    """A step that is taken in parts."""

    step: SerializeAsAny[Annotated[Step, recipe_in("pipeline.compress.steps", Step)]]
    rows: int = Field(128, ge=1, description="training blocks that each part is measured on")
    seed: int = Field(0, ge=0, description="which blocks these are")

    @abstractmethod
    def moments(self, ratio: float) -> list[tuple[float, float]]:
        """Share of the budget at which each part goes, and the share of the units that is gone after it."""

    def start(self, setup: Setup, session: Session) -> Callback:
        from pipeline.compress.schedule._cutting import Cutter, check_whole, check_width

        check_whole(self.kind, session)
        step = check_width(self.kind, self.step)
        return Cutter(step, self.moments(step.ratio), setup, self.rows, self.seed)
