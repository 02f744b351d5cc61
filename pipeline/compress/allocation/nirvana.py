"""NIRVANA's split between attention and MLPs, then one ranking inside each.

2025 (arXiv 2509.14230; iDEA-iSAIL-Lab-UIUC/NIRVANA): of H heads' groups and h neurons in all, gamma times as large a
share of the neurons goes as of the groups: with a and 3 parameters per unit and channel, K groups and h neurons a
layer, n_attn = S (a K + 3 h) L / (a + 3 / rho), n_mlp = n_attn / rho, rho = K / (gamma h). Written with the parameters
C of all units of a type: the attention loses the share x = S (C_attn + C_mlp) / (C_attn + gamma C_mlp), the MLPs gamma
x.

Inside a type the units with the lowest score per parameter go, wherever they are. What a type cannot give the other one
does. gamma: 1 by default; the authors take 3.36 for Llama-3.1-8B, 3.0 for Llama-3.2-3B. Floors are kept by rank, not by
dropping the last index as the code does. Heads come in large pieces: what rounding them leaves, the neurons make up
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.allocation._fill import limits, water
from pipeline.compress.allocation._rank import pieces, take_lowest
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.units import Units
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.units import Part


class Nirvana(Allocation):
    """`gamma`: how many times larger a share of neurons goes than of heads."""

    kind: Literal["nirvana"] = "nirvana"
    gamma: float = Field(1.0, gt=0)
    source: ClassVar[str] = "arXiv 2509.14230, pruning ratio of attention and MLP"

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        bounds = limits(parts, target)
        mlp = np.array([_is_mlp(part) for part in parts], bool)
        count = np.array([part.count for part in parts], np.int64)
        scores = pieces(evidence.scores, parts, self.kind)
        room = bounds.most * bounds.cost
        prunable = np.array([room[~mlp].sum(), room[mlp].sum()])
        size = np.where(bounds.most > 0, count * bounds.cost, 0)
        heads, _ = water(np.array([size[~mlp].sum(), self.gamma * size[mlp].sum()]), prunable, bounds.budget)
        removed = np.zeros(len(parts), np.int64)
        for chosen, total in ((~mlp, heads), (mlp, None)):
            left = bounds.budget - float(removed @ bounds.cost) if total is None else total
            some = [i for i in range(len(parts)) if chosen[i]]
            values = [scores[i] / parts[i].cost for i in some]
            removed[chosen] = take_lowest([parts[i] for i in some], values, bounds.only(chosen), left)
        return count - removed


def _is_mlp(part: Part) -> bool:
    if not isinstance(part, Units) or part.kind not in ("kv_group", "query_head", "neuron"):
        raise ConfigError(f"allocation nirvana: splits between heads and neurons; {part.name} is neither")
    return part.kind == "neuron"
