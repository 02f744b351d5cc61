"""Continuous pruning: scores come from the training's own gradients, and every few steps the lowest units go.

The part of EfficientLLM (Xing et al. 2025, arXiv 2502.06663) that its text says enough about: saliency |w g| summed
over a unit's weights (Taylor), here averaged over steps (`decay`); the lowest are removed all over the model while it
trains, and its shape is what comes out. Their second-order update of what remains, and their constants, are not
published: `decay`, `every` and the cubic up to `until` are ours. No pass is spent on scoring; averages and the
optimizer's moments are cut with the units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from pipeline.compress.allocation.base import Allocation
from pipeline.compress.allocation.global_rank import GlobalRank
from pipeline.compress.schedule.base import Schedule
from pipeline.compress.units import Kind
from pipeline.config import recipe_in

if TYPE_CHECKING:
    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup
    from pipeline.compress.schedule.base import Callback


class Continuous(Schedule):
    """Remove `ratio` of the parameters in units, by running averages of |w g|."""

    source: ClassVar[str] = "Xing et al. 2025, arXiv 2502.06663 (in part)"
    kind: Literal["continuous"] = "continuous"
    ratio: float = Field(ge=0, lt=1)
    units: tuple[Kind, ...] = ("kv_group", "neuron")
    allocation: SerializeAsAny[Annotated[Allocation, recipe_in("pipeline.compress.allocation", Allocation)]] = (
        GlobalRank()
    )
    every: int = Field(10, ge=1, description="steps between removals")
    decay: float = Field(0.9, ge=0, lt=1, description="of the running averages, a step")
    until: float = Field(0.5, gt=0, le=1, description="share of the budget at which the whole ratio is gone")
    cap: float = Field(0.9, gt=0, le=1, description="most that a layer may lose of a kind, of what it has")
    floor: int = Field(1, ge=0, description="units of a kind that a layer keeps at the least")
    layers: tuple[int, int | None] = Field((0, None), description="first layer to prune, and one behind the last")

    def start(self, setup: Setup, session: Session) -> Callback:
        from pipeline.compress.schedule._continuous import ContinuousPruner
        from pipeline.compress.schedule._cutting import check_whole

        check_whole(self.kind, session)
        return ContinuousPruner(self, setup.student)
