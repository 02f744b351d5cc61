"""A model that is cut, or masked, while it trains: what it will go through is known before it starts.

To match arms, what each spends must be planned, so the shapes on the way cannot be left to the training. They are
rehearsed: the schedule runs through all its moments on a copy that nothing trains, on the first curated rows, and notes
what every kind of unit keeps at each. All arms then go through these shapes at these moments (`Retraced`), choosing for
themselves which units stay, by the schedule's importance on their own weights and data. So one shape comes out of all,
as the protocol wants (evaluation.md, section 3), and what the tokens at each shape cost is exact, before and after.

What it trades away: an allocation that looks at the data, such as Adapt-Pruner's, sees the parent's weights at every
round and not those trained so far. Each arm is charged what the rehearsal measured, as if it had allocated itself.

The rehearsed model, cut and not healed, is the reference beside the arms, and the shape of those from scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.allocation.given import Given
from pipeline.compress.architecture import anatomy
from pipeline.compress.recover._shapes import shapes
from pipeline.compress.recover.base import Recovery, Setup
from pipeline.compress.schedule._cutting import Cutter, in_layers
from pipeline.compress.schedule._stepped import Stepped
from pipeline.compress.schedule.base import Schedule
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compress.units import Part


class Moment(Recipe):
    """One cut: `at` which share of the budget, parameters in units that are `left`, and what each kind of unit in each
    layer `kept`."""

    at: float
    left: float
    kept: dict[str, int]


class Retraced(Allocation):
    """The counts of a rehearsal: those of the moment at which as many parameters were to stay as now."""

    kind: Literal["retraced"] = "retraced"
    moments: tuple[Moment, ...]

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        there = in_layers(parts, target.layers, len(evidence.body.layers))  # type: ignore[arg-type]  # parts are units
        left = (1 - target.share) * sum(part.parameters for part in there)
        now = min(self.moments, key=lambda moment: abs(moment.left - left))
        return Given(kept=now.kept).keep(parts, target, evidence)


@dataclass
class Rehearsal:
    """What a schedule did to a model that nothing trained: the model, masks of weights that are 0 in the end, the
    moments of its cuts, and of each the shapes behind it (`pipeline.compress.recover._shapes`) and the tokens that were
    run to choose."""

    model: nn.Module
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, int]] = field(default_factory=list)


def rehearse(schedule: Schedule, recovery: Recovery, setup: Setup) -> Rehearsal:
    """Run through a schedule without training; the setup's student is changed. Raises ConfigError as the training
    would."""
    import torch

    session = recovery.begin(setup)
    callback = schedule.start(setup, session)
    done = Rehearsal(setup.student, dict(setup.masks))
    if not isinstance(callback, Cutter):
        session.loss(torch.from_numpy(np.asarray(setup.blocks[: recovery.batch], np.int64))).backward()
        callback.gradients(session.model, 0.0)  # some choose by them
        change = callback.after_step(session.model, 1.0)
        done.masks |= (change.masks if change else None) or {}
        done.model = session.merge()
        done.model.zero_grad(set_to_none=True)
        callback.merged(done.model)
        return done
    for at, share in callback.moments:
        callback.passes.clear()
        callback.after_step(setup.student, at)
        units = anatomy(setup.student).units(*callback.step.units)
        kept = {u.name: u.count for u in units}
        done.moments.append(Moment(at=at, left=(1 - share) * callback.whole, kept=kept))
        done.shapes.append(shapes(setup.student))
        done.passes.append(dict(callback.passes))
    return done


def retraced(schedule: Schedule, moments: Sequence[Moment]) -> Schedule:
    """The schedule on the way that a rehearsal took; as it is where that cut nothing."""
    if not moments:
        return schedule
    assert isinstance(schedule, Stepped)  # nothing else cuts at moments
    step = schedule.step.model_copy(update={"allocation": Retraced(moments=tuple(moments))})
    return schedule.model_copy(update={"step": step})


def spans(
    tokens: int, changed: Sequence[tuple[int, Mapping[str, Any]]]
) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """How many of the tokens of a training (`Healed`) went through each shape; None is the one that it began with."""
    begins = [0, *(at for at, _ in changed)]
    ends = [*begins[1:], tokens]
    for begin, end, shape in zip(begins, ends, [None, *(shape for _, shape in changed)], strict=True):
        if end > begin:
            yield end - begin, shape
