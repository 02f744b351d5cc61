"""Block after block: what each reads once those before it are pruned.

Source: the drivers of SparseGPT and Wanda. The embedding runs once; the arguments that the model gives to each block
(attention mask, position embeddings) are taken from the real call, in which the blocks pass their input through. Then
per block: forward with hooks, prune, forward again with the pruned weights. `propagate: dense` passes on what the dense
block put out, in the one forward pass that measures. Memory: a block's sums and the hidden states of all calibration
tokens.

A batch that gives a value which is not finite is run again row by row; rows at fault are dropped for good and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from pipeline.compress._routed import expert_inputs
from pipeline.compress.calibration import DROPPED, Batch, Calibration, Stage, Sums, out_of_memory, run, stage_add
from pipeline.errors import TamisError


@dataclass
class Stream:
    """A batch on its way: hidden states (rows, ...) and, for every block, what else the model gave to it."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    counted: torch.Tensor | None
    """Mask (rows, length) of the tokens that are not padding."""

    @property
    def tokens(self) -> int:
        return int(self.counted.sum()) if self.counted is not None else self.hidden[..., 0].numel()

    def forward(self, block: nn.Module, i: int) -> torch.Tensor:
        args, kwargs = self.arguments[i]
        try:
            given = block(self.hidden, *args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            rows = len(self.hidden)
            raise TamisError(
                f"calibration: block {i} does not fit in memory with {rows} rows at a time: set a smaller batch"
            ) from error
        return given[0] if isinstance(given, tuple) else given

    def row(self, i: int) -> Stream:
        of = partial(_row, i=i, rows=len(self.hidden))
        return Stream(self.hidden[i : i + 1], [of(a) for a in self.arguments], of(self.counted))


def walk(
    calibration: Calibration,
    blocks: str,
    inside: list[list[str]],
    needed: Set[str],
    propagate: Literal["pruned", "dense"],
) -> Iterator[tuple[list[str], Sums]]:
    """For each block with modules to prune their full names and sums (`NAME.square`, ..., and `tokens`).

    `inside[i]`: those of block i; matrices of stacked experts by their names too, with the tokens that were routed to
    them as `NAME.tokens`. `needed` besides squares: `abs`, `gram`. The caller prunes them before it asks for the next.
    Counts what ran in `calibration.passes`, a block as its share of the model. Raises TamisError where too many rows
    are dropped.
    """
    model = calibration.model.eval()
    layers = model.get_submodule(blocks)
    streams = [capture(model, layers, batch) for batch in calibration.batches]
    rows = sum(len(s.hidden) for s in streams)
    tokens, last = sum(s.tokens for s in streams), max(i for i, names in enumerate(inside) if names)
    ran = dropped = 0
    for i, block in enumerate(layers[: last + 1]):
        if inside[i]:
            hook, sums = partial(_hook, model, inside[i], needed), Sums()
            streams = [part for s in streams for part in _measure(s, block, i, hook, sums, propagate)]
            dropped = rows - sum(len(s.hidden) for s in streams)
            if dropped > DROPPED * rows:
                raise TamisError(
                    f"{dropped} of {rows} calibration rows give values that are not finite in block {i}: look at the "
                    "model (float16 overflows; load it in float32) and at the data"
                )
            ran += 1
            yield inside[i], sums
        if i < last and (propagate == "pruned" or not inside[i]):
            for stream in streams:
                stream.hidden = stream.forward(block, i)
            ran += 1
    calibration.dropped += dropped
    calibration.passes["forward"] += round(tokens * ran / len(layers))


class _Captured(Exception):
    """The last block was reached: nothing behind it has to run."""


def capture(model: nn.Module, layers: nn.ModuleList, batch: Batch) -> Stream:
    """What a batch looks like before the first block, and the arguments of every block."""
    first: list[torch.Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def passes(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first.append(hidden_states)
        arguments.append((args, kwargs))
        if len(arguments) == len(layers):
            raise _Captured
        return hidden_states

    try:
        for layer in layers:
            layer.forward = passes
        run(model, batch)
    except _Captured:
        pass
    finally:
        for layer in layers:
            del layer.forward
    mask = batch.get("attention_mask")
    return Stream(first[0], arguments, mask.bool() if mask is not None and not bool(mask.all()) else None)


def _measure(
    stream: Stream,
    block: nn.Module,
    i: int,
    hook: Callable[[Stage], list[Any]],
    sums: Sums,
    propagate: Literal["pruned", "dense"],
) -> list[Stream]:
    """Add what a stream gives to the sums; returns the stream, or what is left of it, one row each."""
    stage = Stage(stream.counted)
    handles = hook(stage)
    try:
        out = stream.forward(block, i)
    finally:
        for handle in handles:
            handle.remove()
    if out.isfinite().all() and all(bool(v.isfinite().all()) for v in stage.values()):
        stage_add(stage, "tokens", torch.tensor(float(stream.tokens)))
        for name, value in stage.items():
            stage_add(sums, name, value)
        if propagate == "dense":
            stream.hidden = out
        return [stream]
    if len(stream.hidden) == 1:
        return []
    one_by_one = (stream.row(r) for r in range(len(stream.hidden)))
    return [part for row in one_by_one for part in _measure(row, block, i, hook, sums, propagate)]


def _hook(model: nn.Module, names: list[str], needed: Set[str], stage: Stage) -> list[Any]:
    """Hang hooks into a model that stage what matrices of these names read; returns their handles."""
    see, modules = _sums(stage, needed), dict(model.named_modules())

    def read(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        see(name, args[0])

    def routed(stack: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        for own, x in expert_inputs(module, args, stage.mask):
            if (name := f"{stack}.{own}") in wanted:
                see(name, x)
                stage_add(stage, f"{name}.tokens", torch.tensor(float(len(x))))

    linears = [name for name in names if name in modules]
    wanted = set(names).difference(linears)
    stacks = dict.fromkeys(name.rsplit(".", 2)[0] for name in names if name in wanted)
    handles = [modules[name].register_forward_pre_hook(partial(read, name)) for name in linears]
    return handles + [modules[name].register_forward_pre_hook(partial(routed, name)) for name in stacks]


def _sums(stage: Stage, needed: Set[str]) -> Callable[[str, torch.Tensor], None]:
    """Stages what a module reads; modules that read the same tensor (q, k, v) share the work."""
    seen: tuple[torch.Tensor | None, dict[str, torch.Tensor]] = (None, {})

    def see(name: str, given: torch.Tensor) -> None:
        nonlocal seen
        if given is not seen[0]:
            x = stage.tokens(given)
            found = {"square": x.square().sum(0)}
            if "abs" in needed:
                found["abs"] = x.abs().sum(0)
            if "gram" in needed:
                found["gram"] = x.T @ x
            seen = given, found
        for kind, value in seen[1].items():
            stage_add(stage, f"{name}.{kind}", value)

    return see


def _row(value: Any, i: int, rows: int) -> Any:
    """What belongs to one row in the arguments of a call: tensors whose first axis is the rows, in any nesting."""
    if isinstance(value, torch.Tensor):
        return value[i : i + 1] if value.ndim > 1 and len(value) == rows else value
    if isinstance(value, tuple | list):
        return type(value)(_row(v, i, rows) for v in value)
    if isinstance(value, dict):
        return {k: _row(v, i, rows) for k, v in value.items()}
    return value
