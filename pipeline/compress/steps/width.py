"""Width: units go from layers, by any importance, any allocation and any compensation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, SerializeAsAny

from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.allocation.uniform import Uniform
from pipeline.compress.architecture import anatomy
from pipeline.compress.compensation.base import Compensation
from pipeline.compress.importance.base import Importance
from pipeline.compress.steps.base import Outcome, Step
from pipeline.compress.surgery import cut
from pipeline.compress.units import Kind, Units, lowest
from pipeline.config import recipe_in

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.calibration import Calibration


class Width(Step):
    """Score units, share the target out over layers, make up for what goes, cut.

    `ratio` is the share of the parameters in units of these kinds (of the layers that are not left out) that goes.
    """

    kind: Literal["width"] = "width"
    ratio: float = Field(ge=0, lt=1)
    units: tuple[Kind, ...] = ("kv_group", "neuron")
    importance: SerializeAsAny[Annotated[Importance, recipe_in("pipeline.compress.importance", Importance)]]
    allocation: SerializeAsAny[Annotated[Allocation, recipe_in("pipeline.compress.allocation", Allocation)]] = Uniform()
    compensation: (
        SerializeAsAny[Annotated[Compensation, recipe_in("pipeline.compress.compensation", Compensation)]] | None
    ) = None
    cap: float = Field(0.9, gt=0, le=1, description="most that a layer may lose of a kind")
    floor: int = Field(1, ge=0, description="units of a kind that a layer keeps at the least")
    multiple: int = Field(1, ge=1, description="neurons are kept in multiples of this; 64 or 128 suits GPUs")
    layers: tuple[int, int | None] = Field((0, None), description="first layer to prune, and one behind the last")

    def apply(self, model: nn.Module, calibration: Calibration) -> Outcome:
        body = anatomy(model)
        groups = body.units(*self.units)
        target = Target(self.ratio, self.cap, self.floor, self.multiple, self.layers)
        asked = [*self.importance.probes(body, groups), *self.allocation.probes(body, groups)]
        asked += self.compensation.probes(body, groups) if self.compensation else []
        if asked:
            calibration.measure(*asked)
        scores = self.importance.scores(body, groups, calibration)
        keep = self.allocation.keep(groups, target, Evidence(body, calibration, scores))
        removal = {
            units.name: lowest(s, int(k), units.groups)
            for units, s, k in zip(groups, scores, keep, strict=True)
            if k < units.count
        }
        if self.compensation and removal:
            self.compensation.apply(body, groups, removal, calibration)
        cut(model, groups, removal)
        calibration.forget()
        return Outcome(model, removed=removal, report=_report(groups, keep.tolist()))


def _report(groups: list[Units], keep: list[int]) -> dict[str, object]:
    removed = sum((u.count - k) * u.cost for u, k in zip(groups, keep, strict=True))
    return {
        "removed_parameters": int(removed),
        "of_prunable": removed / max(1.0, sum(u.parameters for u in groups)),
        "kept": {u.name: f"{k} of {u.count}" for u, k in zip(groups, keep, strict=True)},
    }
