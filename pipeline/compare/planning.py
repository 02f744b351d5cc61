"""What the arms of a comparison can afford: what each spends before it trains, and on every token at every shape.

`fixed` is importance, the dearest of its draws, and scoring the pool; a token costs what the recovery declares, at the
shape that the model has then. Where a schedule cuts while it trains, its rehearsal says when, to what, and what
choosing takes (`pipeline.compare.trajectory`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.compare.arms import Design, per_token
from pipeline.compare.config import Matched
from pipeline.compare.flops import ModelShape, gradients, hessian, hessian_solve, layerwise, statistics
from pipeline.compare.ledger import Arm, Plan, plan
from pipeline.compare.material import Blocks, Students
from pipeline.compare.scoring import Scored
from pipeline.compress import folder
from pipeline.compress.schedule._stepped import Stepped
from pipeline.compress.steps.experts import Experts
from pipeline.compress.steps.sparse import Sparse
from pipeline.compress.steps.stun import Stun
from pipeline.compress.steps.width import Width

if TYPE_CHECKING:
    from torch import nn

GRAM = {"obs", "refit", "scalar"}
"""Parts of a width step that take Gram matrices."""

Models = Mapping[str, "tuple[nn.Module, ModelShape]"]
"""The parent (`dense`), and a student as it begins (`start`) and as it ends (`end`), with their shapes."""


def load_models(parent: nn.Module, students: Students) -> Models:
    found = {"dense": parent}
    for name, place in (("start", next(iter(students.starts.values())).folder), ("end", students.ends[0].folder)):
        found[name] = folder.load(Path(place))[0]
    return {name: (model, ModelShape.of(model)) for name, model in found.items()}


def spending(config: Matched, design: Design, models: Models, students: Students) -> Arm:
    """What it takes to train an arm on a token, at every shape; not yet what comes before."""
    model, shape = models[{"dense": "dense", "scratch": "end"}.get(design.start, "start")]
    parent, dense = models["dense"]
    recovery = config.distill if design.taught else config.recover
    cost, batch_tokens = recovery.cost(model, parent), recovery.batch * config.length

    def rate(of: ModelShape) -> float:
        return per_token(cost, of, dense, config.length, batch_tokens)

    cuts = zip(students.moments, students.shapes, strict=True) if students.scheduled(design, 0) else ()
    stages = tuple((moment.at, rate(shape.resized(told))) for moment, told in cuts)
    masked = design.start != "dense" and (Path(students.ends[0].folder) / folder.MASKS).exists()
    return Arm(
        design.name,
        rate(shape),
        student="" if design.start == "dense" else models["end"][1].digest,
        parent=design.start != "scratch" or design.taught or masked,
        stages=stages,
        step=batch_tokens,
        note="masks save no FLOPs: charged as dense" if masked else "",
    )


def make_plan(
    config: Matched, budget: float, models: Models, students: Students, blocks: Blocks, scored: Scored
) -> Plan:
    """What every arm can afford: the dearest of the calibrations is charged, so that all seeds train alike."""
    shape, length = models["start"][1], config.calibration.length or config.length
    dense = models["dense"][1]

    def charged(*ways: str) -> float:
        passes = [s.passes for (way, _), s in students.starts.items() if way in ways]
        return max(importance_cost(config.steps, p, dense, length) for p in passes) if any(passes) else 0.0

    importance = charged("curated", "random")
    on_the_way, taken = 0.0, [s.step for s in config.schedules if isinstance(s, Stepped)]
    for passes, told in zip(students.passes, students.shapes, strict=True):
        on_the_way += importance_cost(taken, passes, shape, config.length)
        shape = shape.resized(told)
    arms = []
    for design in config.designs:
        arm = spending(config, design, models, students)
        recovery = config.distill if design.taught else config.recover
        fixed: dict[Any, float] = {}
        masked_from_scratch = design.start == "scratch" and arm.parent  # by the masks that others were calibrated for
        if design.calibration or masked_from_scratch:
            fixed["importance"] = importance + (0.0 if masked_from_scratch else on_the_way)
        elif design.start == "chance":  # what makes up for it may look at data all the same
            fixed["importance"] = charged("chance")
        if "curated" in (design.data, design.calibration):
            fixed["scoring"] = scored.total
        model, own = models["dense" if design.start == "dense" else "start"]
        if measured := recovery.cost(model, models["dense"][0]).measured:  # blocks that go forward before the training
            before = measured * config.length * own.forward(config.length)
            fixed["importance"] = fixed.get("importance", 0.0) + before
        rows = min(
            n for (of, data, _), (_, n) in blocks.items() if (of, data) == (design.start == "dense", design.data)
        )
        arms.append(replace(arm, fixed={kind: flops for kind, flops in fixed.items() if flops}, data=rows))
    return plan(budget, arms, config.length, scored.pool_tokens)  # a recovery ends with a step of fewer blocks


def importance_cost(steps: Sequence[Any], passes: Mapping[str, int], dense: ModelShape, length: int) -> float:
    """FLOPs of measuring and cutting, from the tokens that went through the model, at the dense model's rate.

    Where Gram matrices are taken, so are their sums, factors and sweeps (evaluation.md, section 2); where experts are
    measured, those of a token run twice.
    """
    forward, backward = passes.get("forward", 0), passes.get("backward", 0)
    twice = any(isinstance(step, Experts) for step in steps)
    flops = forward * (layerwise if twice else statistics)(dense, length) + backward * gradients(dense, length)
    if any(takes_gram(step) for step in steps):
        flops += forward * (hessian(dense, length) - layerwise(dense, length)) + hessian_solve(dense)
    return flops


def takes_gram(step: Any) -> bool:
    if isinstance(step, Sparse | Stun):
        return step.method.needs == "gram" or (isinstance(step, Sparse) and step.refit)
    return isinstance(step, Width) and any(part.kind in GRAM for part in (step.importance, step.compensation) if part)
