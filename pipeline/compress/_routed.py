"""What the matrices of stacked experts read: each expert the tokens that the router sends to it, and no others.

A stack runs all its experts in one kernel, inside which nothing can be hooked. So what they read is computed beside it:
the rows of the tokens routed to an expert, and what its gate and up make of them, which down reads. The gate and up of
every routed expert run a second time. Tokens count once, whatever weight the router gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.compress._weights import place
from pipeline.compress.calibration import InputMoments, moments, stage_add

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Probe, Stage


def expert_inputs(
    stack: nn.Module, args: tuple[torch.Tensor, ...], mask: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What each matrix of a stack reads, (tokens, in): `gate_up_proj.0`, `down_proj.0`, `gate_up_proj.1`, ...

    `args`: what the stack is called with; `mask`: the tokens that are no padding, None where all are.
    """
    import torch

    x, chosen = args[:2]
    if mask is not None and mask.numel() == len(x):
        real = mask.flatten()
        x, chosen = x[real], chosen[real]
    for e in range(len(stack.down_proj)):
        rows = x[(chosen == e).any(1)]
        yield f"gate_up_proj.{e}", rows
        gate, up = torch.nn.functional.linear(rows, stack.gate_up_proj[e]).chunk(2, -1)
        yield f"down_proj.{e}", stack.act_fn(gate) * up


@dataclass(frozen=True)
class RoutedMoments:
    """Of what the experts of stacks read, matrix by matrix: what `InputMoments` gives for a module, under the names
    `STACK.gate_up_proj.0` and so on; `count` is the number of tokens routed to the expert."""

    stacks: tuple[str, ...]

    def hooks(self, model: nn.Module, stage: Stage) -> Iterable[Any]:
        def see(name: str, stack: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for own, x in expert_inputs(stack, args, stage.mask):
                for key, value in zip(("count", "sum", "square"), moments(x.float()), strict=True):
                    stage_add(stage, f"{name}.{own}.{key}", value)

        return [model.get_submodule(name).register_forward_pre_hook(partial(see, name)) for name in self.stacks]


def matrix_moments(body: Anatomy, names: Sequence[str]) -> list[Probe]:
    """Probes of what matrices read, whether modules or experts: `NAME.count`, `NAME.sum`, `NAME.square` of each."""
    stacks = dict.fromkeys(parameter.rpartition(".")[0] for parameter, e in (place(body, n) for n in names) if e >= 0)
    modules = tuple(name for name in names if place(body, name)[1] < 0)
    return [InputMoments(modules), *([RoutedMoments(tuple(stacks))] if stacks else [])]
