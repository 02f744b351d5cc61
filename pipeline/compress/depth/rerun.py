"""A model run over the same data again and again, each time a little different: branches left out, units at zero.

A change in block l leaves what comes before as it was, so a trial starts there, from the state kept of the run before
(half of the blocks on average, over changes in all of them). Embeddings, rotary angles, masks, final norm and head run
every time. One batch at a time: its states after every block and two sets of its logits are what is held in memory.

Branches are left out without touching the model: zeros come out instead of what they would compute, as they do once
`surgery.remove_branches` has taken them; a whole block hands on what it got. `Calibration.passes` is charged for the
share of the parameters that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.compress.calibration import run, tokens_of
from pipeline.compress.depth.distance import Distance, distance
from pipeline.errors import TamisError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Batch, Calibration

Branch = tuple[int, Literal["attention", "mlp", "block"]]
"""What can be left out: a layer's branch, or all of the layer."""


@dataclass(frozen=True)
class Trial:
    """A change to try: the lowest block that it touches, and how to make it; undone when the context ends."""

    start: int
    change: Callable[[], AbstractContextManager[Any]]


def distances(
    calibration: Calibration,
    body: Anatomy,
    trials: Sequence[Trial],
    kind: Distance,
    rows: int,
    base: Sequence[Branch] = (),
) -> np.ndarray:
    """How far each trial's output is from the dense model's, mean over the first `rows` rows; (trials,) float64.

    `base`: branches that are left out of every trial besides. Raises TamisError where outputs are not finite.
    """
    model = calibration.model.eval()
    share = _shares(model, body)
    totals, seen = np.zeros(len(trials)), 0
    for batch in first_rows(calibration, rows):
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        dense, states = _record(model, body, batch)
        spent = 1.0
        with left_out(model, body, base):
            if base:
                _, states = _record(model, body, batch)
                spent += 1
            for i, trial in enumerate(trials):
                with trial.change(), _resumed(model, body, trial.start, states):
                    other = output(model, batch)
                totals[i] += sum(
                    float(distance(kind, dense[r : r + 1], other[r : r + 1], None if mask is None else mask[r : r + 1]))
                    for r in range(len(dense))  # a row at a time: logits are the largest thing in memory
                )
                spent += share[trial.start]
        calibration.passes["forward"] += round(tokens_of(batch) * spent)
        seen += len(dense)
    if not np.isfinite(totals).all():
        raise TamisError("outputs are not finite on the calibration data: load the model in float32, look at the data")
    return totals / max(1, seen)


def first_rows(calibration: Calibration, rows: int) -> Iterator[Batch]:
    """The calibration's batches up to so many rows."""
    for batch in calibration.batches:
        if rows <= 0:
            return
        yield {name: value[:rows] for name, value in batch.items()}
        rows -= len(next(iter(batch.values())))


def output(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits, or the last hidden state of a model that makes none."""
    import torch

    with torch.no_grad():
        given = run(model, batch)
    found: torch.Tensor = given.logits if "logits" in given else given.last_hidden_state
    return found


@contextmanager
def left_out(model: nn.Module, body: Anatomy, branches: Sequence[Branch]) -> Iterator[None]:
    """Run a model without some branches while the context lasts. Raises ValueError for one that it does not have."""
    with ExitStack() as stack:
        for layer, what in branches:
            found = body.layers[layer]
            if what == "block":
                stack.enter_context(_forward(model.get_submodule(found.name), _hand_on))
                continue
            branch = found.branch(what)
            if branch is None:
                raise ValueError(f"layer {layer} has no {what} branch")
            for name in branch.removable:
                pair = what == "attention" and name == branch.name
                stack.enter_context(_forward(model.get_submodule(name), partial(_nothing, pair)))
        yield


def _hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _nothing(pair: bool, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Zeros; as a pair, with None for an attention's weights."""
    zeros = hidden_states.new_zeros(hidden_states.shape)
    return (zeros, None) if pair else zeros


@contextmanager
def _forward(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module; the one before, which may be such a one, comes back."""
    before = module.__dict__.get("forward")
    module.forward = instead
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _record(model: nn.Module, body: Anatomy, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, and the state after each block."""
    states: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, given: states.append(given))
        for block in model.get_submodule(body.blocks)
    ]
    try:
        return output(model, batch), states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _resumed(model: nn.Module, body: Anatomy, start: int, states: Sequence[torch.Tensor]) -> Iterator[None]:
    """The blocks before `start` do not run: the last of them gives the state that was kept."""
    with ExitStack() as stack:
        for block in list(model.get_submodule(body.blocks))[:start]:
            stack.enter_context(_forward(block, lambda *args, **kwargs: states[start - 1]))
        yield


def _shares(model: nn.Module, body: Anatomy) -> np.ndarray:
    """Share of the work, by parameters, of a run that starts at each block."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.get_submodule(body.blocks)]
    head = sum(p.numel() for p in model.get_submodule(body.head).parameters()) if body.head else 0
    share: np.ndarray = (np.cumsum(blocks[::-1])[::-1] + head) / (sum(blocks) + head)
    return share
