"""Týr-the-Pruner's search: which layer loses how much is tried out on the whole model, from coarse to fine.

Li et al. 2025, "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization" (arXiv
2503.09657, NeurIPS 2025; AMD-AGI/Tyr-the-Pruner). In every round each part is pruned to 2 `reach` + 1 levels around
what it loses now, `step` of its units apart, and the step is halved for the next. All levels of all parts lie ready
(`_supernet`), each refit to its inputs, which are measured behind the mean of the variants of the blocks before. An
evolutionary search takes the mix that stays closest to the dense model: KL over its `top` largest logits. Offspring
differ from a parent by 1 to `swaps` swaps of a level between two parts of a type, so the total stays the target's; of
`offspring` the best 16 of 2,048 tokens go on, 4 of 16,384, and 2 of 131,072, with the parents, are the next parents
(`halving`).

Units go in the order of their scores (`importance: obs` is theirs), and the step refits what stays with
`compensation: {kind: refit, inputs: pruned}`; for a step without compensation set `refit: false`. They prune query
heads and neurons; here the units are any that one module reads. Parts that cost alike are of a type, of whose units a
level is at least one: a layer of 3 key/value groups moves in thirds.

All defaults are theirs, and meant for GPUs: the first stage alone is 13 M tokens a round. Every pass counts in
`Calibration.passes`, those of the supernet (two a round) and of the dense model (one a batch and stage) included; a
subnet runs, and is charged, at full width. On CPUs take fewer offspring, generations and tokens (halving: [[512, 4],
[2048, 2]]). A stage never runs on more tokens than there are; what was measured on so many is not measured again.

Memory: 2 `reach` + 2 times the o_proj and down_proj of all layers in the model's type, less what is pruned (they report
39.6 GB for 7B; SmolLM2-135M in float32: at most 1.5 GB), the Gram matrix of one at a time, and two sets of a batch's
logits. The model is put back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from pipeline.compress._weights import consumers
from pipeline.compress.allocation._evolution import evolve
from pipeline.compress.allocation._fill import Limits, limits, spread
from pipeline.compress.allocation._rank import pieces
from pipeline.compress.allocation._supernet import Supernet
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.calibration import tokens_of
from pipeline.compress.units import Units
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.units import Part


class Tyr(Allocation):
    """Counts by evolutionary search over pruned variants of every part, from coarse levels to fine."""

    kind: Literal["tyr"] = "tyr"
    rounds: int = Field(4, ge=1)
    step: float = Field(0.125, gt=0, lt=1, description="share of a part between levels in the first round")
    reach: int = Field(4, ge=1, description="levels on either side of what a part loses now")
    offspring: int = Field(128, ge=1)
    generations: int = Field(50, ge=1)
    swaps: int = Field(4, ge=1, description="swaps of levels in a mutation, at most")
    halving: tuple[tuple[int, int], ...] = Field(
        ((2048, 16), (16384, 4), (131072, 2)), min_length=1, description="of each stage: tokens, and how many survive"
    )
    top: int = Field(8192, ge=2, description="largest logits of the dense model that are compared")
    refit: bool = Field(True, description="variants are refit, as `compensation: refit` does")
    damping: float = Field(0.01, ge=0, description="refit: share of the mean diagonal that is added to the diagonal")
    seed: int = 0
    data: ClassVar[str] = "forward"
    source: ClassVar[str] = "Li et al. 2025, arXiv 2503.09657"

    @field_validator("halving")
    @classmethod
    def _halves(cls, stages: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if any(min(stage) < 1 for stage in stages):
            raise ValueError("every stage takes a token and lets one survive, at least")
        return stages

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        groups = [part for part in parts if isinstance(part, Units)]
        calibration, body, bounds = evidence.calibration, evidence.body, limits(parts, target)
        if len(groups) < len(parts):
            raise ConfigError("allocation tyr: is for units of layers, not for single weights")
        consumers("allocation tyr", groups)
        if calibration is None:
            raise ConfigError("allocation tyr: measures outputs and needs calibration data")
        count = np.array([part.count for part in parts], np.int64)
        removed = count - spread(parts, target, np.full(len(parts), target.share))
        if not removed.any():
            return count
        there = sum(tokens_of(batch) for batch in calibration.batches)
        halving = [(min(tokens, there), stay) for tokens, stay in self.halving]
        supernet = Supernet(calibration, body, groups, pieces(evidence.scores, parts, self.kind))
        types = types_of(groups, bounds)
        for i in range(self.rounds):
            step = level_steps(types, bounds, count, self.step / 2**i)
            levels = [self._levels(bounds, p, int(removed[p]), int(step[p])) for p in range(len(parts))]
            try:
                supernet.build(levels, self.damping if self.refit else None)
                best = evolve(
                    tuple(own.index(now) for own, now in zip(levels, removed.tolist(), strict=True)),
                    [len(own) for own in levels],
                    types,
                    lambda choices, tokens: supernet.divergences(choices, tokens, self.top),
                    halving,
                    self.offspring,
                    self.generations,
                    self.swaps,
                    np.random.default_rng([self.seed, i]),
                )
            finally:
                supernet.restore()
            removed = np.array([own[level] for own, level in zip(levels, best, strict=True)], np.int64)
        return np.asarray(count - removed)

    def _levels(self, bounds: Limits, part: int, now: int, step: int) -> list[int]:
        """Numbers that a part may lose in a round, ascending, `now` among them."""
        asked = np.arange(now - self.reach * step, now + self.reach * step + 1, step)
        one = bounds.only(np.arange(len(bounds.most)) == part)
        return [int(k) for k in asked if k >= 0 and int(one.down(np.array([float(k)]))[0]) == k]


def types_of(groups: Sequence[Units], bounds: Limits) -> list[list[int]]:
    """Parts whose levels cost the same: of one kind, with units of one size that go in the same steps."""
    found: dict[tuple[str, float, int], list[int]] = {}
    for i, units in enumerate(groups):
        found.setdefault((units.kind, units.cost, int(bounds.step[i])), []).append(i)
    return list(found.values())


def level_steps(types: Sequence[Sequence[int]], bounds: Limits, count: np.ndarray, share: float) -> np.ndarray:
    """Units between the levels of every part: that share of the largest of its type, in whole steps, at least one."""
    steps = np.array(bounds.step)
    for own in types:
        one = int(bounds.step[own[0]])
        steps[list(own)] = one * max(1, int(share * count[list(own)].max()) // one)
    return steps
