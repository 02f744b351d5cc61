"""What can be removed from a model, told without its architecture: units, and where in the matrices they sit.

A unit is the least that can go: a neuron of an MLP, a key/value group of an attention, an expert, a channel of the
residual stream. `Units` are those of one kind in one layer. `Member`s say which rows and columns of which modules
a unit holds, so that scoring, zeroing and cutting need to know nothing of Llama or GPT-2:
`pipeline.compress.architecture` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["neuron", "kv_group", "query_head", "expert", "hidden"]
Side = Literal["out", "in", "expert"]


@dataclass(frozen=True)
class Part:
    """Something of which a share can be removed: `count` pieces of `cost` parameters each, in a layer (-1: in all)."""

    name: str
    layer: int
    count: int
    cost: float

    @property
    def parameters(self) -> float:
        return self.count * self.cost


@dataclass(frozen=True)
class Member:
    """The entries of one module that belong to units: `size` consecutive ones a unit, from `offset` on.

    `out`: among what the module puts out (rows of a weight as nn.Linear stores it, entries of its bias; the entries of
    a norm; the columns of an embedding). `in`: among what it reads (columns of the weight). GPT-2's Conv1D, which
    stores its weight the other way round, is told in the same terms. A parameter that no module wraps is `out` and
    counts along its last axis. `expert`: along the experts that a module stacks.
    """

    module: str
    side: Side
    size: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Units(Part):
    """The units of one kind in one layer.

    `groups`: the units lie in so many equal runs, each of which must lose the same number (query heads under GQA,
    experts under a router that chooses group by group).
    `consumer`: the module whose input is what the units put out, entry by entry: o_proj, down_proj. Its columns of unit
    j are j * width to (j + 1) * width. Empty for channels of the residual stream, which many modules read.
    """

    kind: Kind
    members: tuple[Member, ...]
    consumer: str = ""
    width: int = 1
    groups: int = 1


Removal = Mapping[str, np.ndarray]
"""What goes: by the name of `Units`, the indices of the removed ones (int64, ascending, without repeats)."""


def lowest(scores: np.ndarray, keep: int, groups: int = 1) -> np.ndarray:
    """Indices of the units to remove so that `keep` stay: the lowest, the same number from each of the groups.

    Exactly so many, ties from the lowest index on, never by a threshold (conventions, section 7). Raises ValueError
    where a score is not finite, `keep` is out of range, or the number cannot be the same in every group.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite")
    remove = len(scores) - keep
    if not 0 <= remove <= len(scores):
        raise ValueError(f"{keep} of {len(scores)} units cannot be kept")
    if remove % groups or len(scores) % groups:
        raise ValueError(f"{remove} of {len(scores)} units cannot be removed evenly from {groups} groups")
    order = np.argsort(scores.reshape(groups, -1), axis=1, kind="stable")[:, : remove // groups]
    return np.sort((order + np.arange(groups)[:, None] * (len(scores) // groups)).ravel())
