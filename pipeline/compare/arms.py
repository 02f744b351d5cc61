"""The arms of a matched comparison: from what each starts, on what it trains, and what that costs a token.

    A   dense, random data (continued training)      A'  dense, curated data
    B   cut, random data                             C   cut, curated data, which it is calibrated on as well
    D   as C, taught by the parent                   Cr  as C, calibrated on random data
    E   from scratch, random data                    F   from scratch, curated data
    R   cut at random, random data

All that are cut or start from scratch have one shape, and where single weights are masked, E has the masks of B and F
those of C. `parent` and `cut` are the references: the parent untouched, and what is cut before it is healed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.compare.flops import ModelShape, full, last_layers
from pipeline.compress.allocation.given import Given
from pipeline.compress.allocation.uniform import Uniform
from pipeline.compress.importance.random import Random
from pipeline.compress.recover.base import Cost
from pipeline.compress.schedule._stepped import Stepped
from pipeline.compress.schedule.base import Schedule
from pipeline.compress.sparse.random import Random as RandomWeights
from pipeline.compress.steps.base import Step
from pipeline.compress.steps.depth import Depth
from pipeline.compress.steps.experts import Experts
from pipeline.compress.steps.sparse import Sparse
from pipeline.compress.steps.stun import Stun
from pipeline.compress.steps.vocab import Vocab
from pipeline.compress.steps.width import Width

if TYPE_CHECKING:
    from torch import nn

Data = Literal["random", "curated"]


@dataclass(frozen=True)
class Design:
    """What makes an arm: its start, the data it trains on and is calibrated on, whether the parent teaches it."""

    name: str
    start: Literal["dense", "cut", "chance", "scratch"]
    data: Data
    calibration: Data | None = None
    taught: bool = False
    about: str = ""


DESIGNS = {
    d.name: d
    for d in (
        Design("A", "dense", "random", about="dense, random data"),
        Design("A'", "dense", "curated", about="dense, curated data"),
        Design("B", "cut", "random", "random", about="cut, random data"),
        Design("C", "cut", "curated", "curated", about="cut, curated data"),
        Design("Cr", "cut", "curated", "random", about="cut, curated data, calibrated on random data"),
        Design("D", "cut", "curated", "curated", taught=True, about="cut, curated data, taught by the parent"),
        Design("E", "scratch", "random", about="from scratch, random data"),
        Design("F", "scratch", "curated", about="from scratch, curated data"),
        Design("R", "chance", "random", about="cut at random, random data"),
    )
}
PARENT, CUT = "parent", "cut"
EFFECTS = {
    "data, cut": ("C", "B"),
    "data, from scratch": ("F", "E"),
    "data, dense": ("A'", "A"),
    "start: cut against scratch": ("B", "E"),
    "criterion against chance": ("B", "R"),
    "teacher": ("D", "C"),
    "calibration data": ("C", "Cr"),
    "cut against dense, curated": ("C", "A'"),
}
"""What a difference of two arms tells."""


DRAWN = Width | Depth | Sparse | Experts | Stun
"""Steps whose units can be drawn by chance."""
MASKING = ("gradual_magnitude", "soft_shrinkage")
"""Schedules of masks whose way is known before they start, as it is of all that are `Stepped`."""


def unmatched(designs: Sequence[Design], steps: Sequence[Step], schedules: Sequence[Schedule], recover: str) -> str:
    """Why arms or steps cannot be matched, all reasons at once; empty where they can."""
    wrong = [why for step in steps if (why := _shapeless(step))]
    kinds = [schedule.kind for schedule in schedules]
    wrong += [f"schedules: {why}" for s in schedules if (why := UNPLANNED.get(s.kind) or _unknown(s))]
    refused: dict[str, list[str]] = {}

    def refuse(names: str, why: str) -> None:
        there = [d.name for d in designs if d.name in names.split()]
        if there:
            refused.setdefault(why, []).extend(there)

    if recover != "full":
        refuse("E F", f"recover: {recover} trains a part of the weights, and theirs are all new")
    if any(kind in MASKING for kind in kinds):
        refuse("E F", "their mask would be that of B or C, which is known where their budget ends")
    if not all(isinstance(schedule, Stepped) for schedule in schedules):
        refuse("R", f"{kinds[0]} chooses by what it trains, never by chance")
    elif unknown := [step.kind for step in steps if not isinstance(step, DRAWN | Vocab)]:
        refuse("R", f"{unknown[0]} has no control by chance")
    elif not schedules and not any(isinstance(step, DRAWN) for step in steps):
        refuse("R", "a vocabulary that is drawn by chance could not write the texts")
    if all(isinstance(step, Vocab) for step in steps):
        told = f": {kinds[0]} measures on what it trains on" if schedules else ""
        refuse("Cr", f"no step measures on calibration data, which are what is other there{told}")
    wrong += [f"arms: {', '.join(names)}: {why}" for why, names in refused.items()]
    if gone := {name for names in refused.values() for name in names}:
        left = ", ".join(d.name for d in designs if d.name not in gone)
        wrong.append(f"leave them out: arms: [{left}]")
    return "; ".join(wrong)


UNPLANNED = {
    "continuous": "continuous cuts by the gradients of the training itself, so what it will spend is not known before "
    "and cannot be matched: take gradual or adapt_pruner",
    "dynamic_batches": "dynamic_batches mixes domains that the arms do not name: leave it out",
}


def _unknown(schedule: Schedule) -> str:
    known = (*MASKING, "lora_prune")
    if isinstance(schedule, Stepped) or schedule.kind in known:
        return ""
    return (
        f"what {schedule.kind} will spend is not known before: take gradual, adapt_pruner or one of {', '.join(known)}"
    )


def _shapeless(step: Step) -> str:
    """Why a step does not give all arms one shape; that of others is looked at when they are done."""
    if isinstance(step, Depth) and step.units == "branch":
        return (
            "steps: depth: which branches go is up to the calibration data, and attention costs other FLOPs than an "
            "MLP: take units: block"
        )
    return ""


def counts(step: Step, report: dict[str, Any]) -> Step:
    """A step with the counts that it once came to, so that whatever it is calibrated on, its shape is the same.

    As it is where counts do not depend on data. Weights that are ranked over all matrices keep their ranking: the model
    loses as many, and masks have no shape. So do those that a folded low-rank part fills up again: all are `kept`.
    """
    filled = isinstance(step, Sparse) and step.low_rank is not None and step.low_rank.fold
    given = isinstance(step, Width) or (isinstance(step, Sparse) and not isinstance(step.allocation, Uniform))
    if not given or filled:
        return step
    kept = {name: int(told.split()[0]) for name, told in report["kept"].items()}
    return step.model_copy(update={"allocation": Given(kept=kept)})


def by_chance(steps: Sequence[Step], seed: int) -> list[Step]:
    """The same counts, but what goes drawn at random: what a criterion has to beat. A vocabulary stays as it is."""
    return [_by_chance(step, seed + i) for i, step in enumerate(steps)]


def _by_chance(step: Step, seed: int) -> Step:
    if isinstance(step, Width):
        return step.model_copy(update={"importance": Random(seed=seed), "compensation": None})
    if isinstance(step, Sparse):
        return step.model_copy(update={"method": RandomWeights(seed=seed), "refit": False})
    if isinstance(step, Stun):
        update = {"criterion": "random", "method": RandomWeights(seed=seed), "seed": seed}
        return step.model_copy(update=update)
    if isinstance(step, Experts):
        return step.model_copy(update={"criterion": "random", "seed": seed})
    return step.model_copy(update={"method": "random", "seed": seed}) if isinstance(step, Depth) else step


def scheduled_by_chance(schedule: Stepped, seed: int) -> Stepped:
    """A schedule that cuts, by chance."""
    return schedule.model_copy(update={"step": _by_chance(schedule.step, seed)})


def from_scratch(student: nn.Module, seed: int) -> nn.Module:
    """A model of the same shape with new weights: matrices and stacks of them normal with the configuration's
    deviation, norms 1, biases and a router's correction of its scores (a buffer) 0."""
    import torch

    fresh = copy.deepcopy(student)
    deviation = float(getattr(student.config, "initializer_range", 0.02))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in fresh.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))
                else:
                    parameter.fill_(0.0 if name == "bias" else 1.0)
            if (correction := getattr(module, "e_score_correction_bias", None)) is not None:
                correction.zero_()
    return fresh


def per_token(cost: Cost, student: ModelShape, teacher: ModelShape, length: int, batch_tokens: int) -> float:
    """FLOPs of training on one token, as the recovery declares what it computes (evaluation.md, section 2)."""
    if cost.backward == "full":
        flops = full(student, length)
    elif cost.backward == "adapters":
        flops = 2 * student.forward(length) + 6 * cost.trained
    else:
        flops = last_layers(student, length, cost.layers)
    return flops + (teacher.forward(length) if cost.teacher else 0.0) + cost.extra + cost.step / batch_tokens
