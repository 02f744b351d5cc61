"""Minitron's activation scores: how much a unit has to say, for heads, neurons and channels of the residual stream.

Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", arXiv 2407.14679,
section 2.2. For each token: the L2 norm of what a head (or a group) puts out, the absolute activation of a neuron, the
absolute output of every norm over the stream. Over a sequence their mean, over sequences the L2 norm, which the paper
found best (loss 7.18 before retraining, 8.73 with L2 for both, `sequence: l2`); for channels the sum over all norms.

A neuron's activation is read where its consumer reads it, behind the activation function and the gate. Cutting
channels needs the norms corrected (conventions, section 4), which the paper does not mention and surgery does. One
forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipeline.compress.calibration import Stage, stage_add
from pipeline.compress.importance.base import Importance

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Units

Over = Literal["mean", "l2"]


@dataclass(frozen=True)
class Activity:
    """`NAME.activity`: sum over rows of the squared activity of each unit, (units,).

    `consumers`: modules and the width of the units in what they read; `norms`: modules whose output is watched.
    """

    consumers: tuple[tuple[str, int], ...]
    norms: tuple[str, ...]
    sequence: Over

    def hooks(self, model: nn.Module, stage: Stage) -> Iterable[Any]:
        found = dict(model.named_modules())

        def see(name: str, width: int, values: torch.Tensor) -> None:
            size = values.detach().float()
            if width > 1:
                size = size.unflatten(-1, (-1, width)).norm(dim=-1)
            stage_add(stage, f"{name}.activity", activity(size, stage.mask, self.sequence).square().sum(0))

        def read(name: str, width: int, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            see(name, width, inputs[0])

        def written(name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            see(name, 1, output)

        return [
            *(found[n].register_forward_pre_hook(partial(read, n, width)) for n, width in self.consumers),
            *(found[n].register_forward_hook(partial(written, n)) for n in self.norms),
        ]


def activity(values: torch.Tensor, mask: torch.Tensor | None, sequence: Over) -> torch.Tensor:
    """Of every row (rows, n), from values (rows, length, n): mean of absolutes over its tokens, or their L2 norm."""
    values = values.abs() if sequence == "mean" else values.square()
    if mask is None:
        return values.mean(1) if sequence == "mean" else values.sum(1).sqrt()
    total = (values * mask[..., None]).sum(1)
    return total / mask.sum(1, keepdim=True).clamp_min(1) if sequence == "mean" else total.sqrt()


class Minitron(Importance):
    """Mean absolute activation over each sequence, L2 norm over sequences."""

    kind: Literal["minitron"] = "minitron"
    sequence: Over = "mean"
    source: ClassVar[str] = "Muralidharan et al. 2024, arXiv 2407.14679"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        consumers = tuple((units.consumer, units.width) for units in groups if units.consumer)
        norms = body.norms if any(units.kind == "hidden" for units in groups) else ()
        return [Activity(consumers, norms, self.sequence)]

    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        sums = calibration.measure(*self.probes(body, groups))
        found: list[np.ndarray] = []
        for units in groups:
            watched = [units.consumer] if units.consumer else [n for n in body.norms if f"{n}.activity" in sums]
            parts = [sums[f"{name}.activity"].sqrt() for name in watched]
            found.append(sum(parts[1:], parts[0]).cpu().numpy())
        return found
