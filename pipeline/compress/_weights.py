"""What criteria and compensations read of a model's weights, without knowing its architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compress.surgery import axes, entries
from pipeline.compress.units import Kind, Member, Removal, Units
from pipeline.errors import ConfigError, TamisError

if TYPE_CHECKING:
    import torch

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Sums

CONSUMED: tuple[Kind, ...] = ("kv_group", "query_head", "neuron")
"""Units whose output one module reads."""


def consumers(kind: str, groups: Sequence[Units], takes: Sequence[Kind] = CONSUMED) -> tuple[str, ...]:
    """The modules that read what the units put out. Raises ConfigError for units that a recipe cannot take."""
    if wrong := sorted({units.kind for units in groups} - set(takes)):
        raise ConfigError(f"{kind} is for {', '.join(takes)}, not for {', '.join(wrong)}: name others under `units`")
    return tuple(units.consumer for units in groups)


def module(body: Anatomy, name: str) -> Any:
    assert body.modules is not None
    return body.modules[name]


def place(body: Anatomy, name: str) -> tuple[str, int]:
    """The parameter that holds a matrix, by its full name, and the matrix's place in it; -1 where it is all of it.

    A matrix has the name of its module, one of a stack of experts that of the parameter and its place in it:
    `model.layers.0.mlp.experts.down_proj.3`.
    """
    if name in body.modules:
        return f"{name}.weight", -1
    parameter, _, expert = name.rpartition(".")
    return parameter, int(expert)


def oriented(body: Anatomy, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A matrix's part (out, in) of what is known by the names of parameters, as a view; Conv1D's turned round."""
    from transformers.pytorch_utils import Conv1D

    parameter, expert = place(body, name)
    if expert >= 0:
        return values[parameter][expert]
    return values[parameter].T if isinstance(body.modules[name], Conv1D) else values[parameter]


def matrix(body: Anatomy, name: str) -> torch.Tensor:
    """A matrix's weight (out, in), as a view that writes through."""
    parameter, _ = place(body, name)
    owner, _, own = parameter.rpartition(".")
    return oriented(body, name, {parameter: getattr(module(body, owner), own).detach()})


def losses(groups: Sequence[Units], removal: Removal) -> Iterator[tuple[Units, torch.Tensor, torch.Tensor]]:
    """Units that lose some, with the consumer's columns that go and those that stay: indices, ascending."""
    import torch

    for units in groups:
        if len(removed := removal.get(units.name, ())):
            goes = entries(Member(units.consumer, "in", units.width), removed)
            stays = np.setdiff1d(np.arange(units.count * units.width), goes)
            yield units, torch.from_numpy(goes), torch.from_numpy(stays)


def unit_means(values: torch.Tensor, units: Units) -> np.ndarray:
    """Scores (count,) float64 from a value for every entry that the consumer reads: the mean over a unit's entries."""
    scores: np.ndarray = values.double().view(units.count, units.width).mean(1).cpu().numpy()
    return scores


def unit_sums(body: Anatomy, units: Units, of: Callable[[torch.nn.Parameter], torch.Tensor]) -> np.ndarray:
    """Sum over all weights of each unit, biases with them, (count,) float64, of what `of` gives for a parameter."""
    import torch

    total = torch.zeros(units.count, dtype=torch.float64)
    for member in units.members:
        for parameter, axis in axes(module(body, member.module), member.side):
            values = of(parameter).movedim(axis, 0).flatten(1) if parameter.ndim > 1 else of(parameter)[:, None]
            sums = values.sum(1, dtype=torch.float64)[member.offset : member.offset + units.count * member.size]
            total += sums.view(units.count, member.size).sum(1).cpu()
    scores: np.ndarray = total.numpy()
    return scores


def hessian(sums: Sums, name: str, damping: float) -> torch.Tensor:
    """X^T X / n of a module's inputs, float64, with `damping` times its mean diagonal added to the diagonal."""
    gram = sums[f"{name}.gram"] / sums[f"{name}.count"]
    return dampened(gram, damping)


def dampened(gram: torch.Tensor, damping: float) -> torch.Tensor:
    import torch

    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def factor(positive: torch.Tensor, kind: str, option: str) -> torch.Tensor:
    """Lower Cholesky factor. Raises TamisError where the matrix is singular, with the option that mends it."""
    import torch

    found, info = torch.linalg.cholesky_ex(positive)
    if int(info):
        raise TamisError(f"{kind}: the inputs of a module are linearly dependent: set {option} above 0, e.g. 0.01")
    return found
