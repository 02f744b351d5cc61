"""The arms of a matched comparison: from what each starts, on what it trains, and what that costs a token.

    A   dense, random data (continued training)      A'  dense, curated data
    B   cut, random data                             C   cut, curated data, which it is calibrated on as well
    D   as C, taught by the parent                   Cr  as C, calibrated on random data
    E   from scratch, random data                    F   from scratch, curated data
    R   cut at random, random data

All that are cut or start from scratch have one shape. `parent` and `cut` are the references: the parent untouched, and
what is cut before it is healed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.compare.flops import ModelShape, full, last_layers
from pipeline.compress.allocation.given import Given
from pipeline.compress.importance.random import Random
from pipeline.compress.recover.base import Cost
from pipeline.compress.steps.base import Step
from pipeline.compress.steps.depth import Depth
from pipeline.compress.steps.width import Width
from pipeline.errors import ConfigError

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


def counts(step: Step, report: dict[str, Any]) -> Step:
    """A step with the counts that it once came to, so that whatever it is calibrated on, its shape is the same.

    Raises ConfigError for a step that does not shape a model by counts.
    """
    if isinstance(step, Width):
        kept = {name: int(told.split()[0]) for name, told in report["kept"].items()}
        return step.model_copy(update={"allocation": Given(kept=kept)})
    if isinstance(step, Depth) and step.units == "block":
        return step
    raise ConfigError(
        f"steps: {step.kind}: arms are matched by the FLOPs of one shape, which width and depth (whole blocks) give; "
        "masks save none, and a trimmed vocabulary is another measure"
    )


def by_chance(steps: Sequence[Step], seed: int) -> list[Step]:
    """The same counts, but the units drawn at random: what a criterion has to beat."""
    changed: list[Step] = []
    for i, step in enumerate(steps):
        if isinstance(step, Width):
            changed.append(step.model_copy(update={"importance": Random(seed=seed + i), "compensation": None}))
        else:
            changed.append(step.model_copy(update={"method": "random", "seed": seed + i}))
    return changed


def from_scratch(student: nn.Module, seed: int) -> nn.Module:
    """A model of the same shape with new weights: matrices normal with the configuration's deviation, norms 1."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    fresh = copy.deepcopy(student)
    deviation = float(getattr(student.config, "initializer_range", 0.02))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in fresh.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and name == "weight":
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))
                else:
                    parameter.fill_(0.0 if name == "bias" else 1.0)
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
