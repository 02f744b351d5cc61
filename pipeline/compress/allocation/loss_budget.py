"""PAGCP's budget: part after part gives as much as its share of an allowed rise of the loss pays for.

Ye et al. 2023, "Performance-aware Approximation of Global Channel Pruning for Multitask CNNs" (arXiv 2303.11923;
HankYe/PAGCP): parts, the largest first, are pruned a step further (0.05 to 0.95) as long as no task's loss is above 1 +
r_i times what it was before this part, r_i = r_0 lambda^i, with the lambda that makes the product of all 1 + r_i equal
1 + `budget`. What earlier parts gave stays away. Tasks are runs of calibration rows of equal length (`tasks`): with
rows in the order of their domains, no domain pays for the others.

The paper's ratio is what the budget pays for, of which it keeps the parts with the smallest rise per FLOP; here the
ratio is given, and the shares found are scaled together to meet it. Pieces go by their scores, weights without scores
by magnitude; losses are the calibration's. Up to 19 forward passes over `rows` rows a part; the weights are put back,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.allocation._fill import limits, spread
from pipeline.compress.allocation._trial import scores_of, without
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.calibration import tokens_of
from pipeline.compress.depth.rerun import first_rows
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.calibration import Calibration
    from pipeline.compress.units import Part


class LossBudget(Allocation):
    """Shares by what a relative rise of the loss by `budget` pays for; `first`: r_0, the largest part's own."""

    kind: Literal["loss_budget"] = "loss_budget"
    budget: float = Field(0.1, gt=0)
    first: float = Field(0.05, gt=0)
    step: float = Field(0.05, gt=0, lt=1)
    tasks: int = Field(1, ge=1)
    rows: int = Field(16, ge=1)
    data: ClassVar[str] = "forward"
    source: ClassVar[str] = "Ye et al. 2023, arXiv 2303.11923"

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        calibration, body = evidence.calibration, evidence.body
        if calibration is None:
            raise ConfigError("allocation loss_budget: measures losses and needs calibration data")
        bounds = limits(parts, target)
        order = [i for i in np.argsort([-part.parameters for part in parts], kind="stable").tolist() if bounds.most[i]]
        found = np.zeros(len(parts))
        if not target.share:
            return spread(parts, target, found)
        with ExitStack() as taken:
            base = self._losses(calibration)
            for i, rise in zip(order, budgets(len(order), self.first, self.budget), strict=True):
                part, scores = parts[i], scores_of(evidence, parts[i], i)
                one = bounds.only(np.arange(len(parts)) == i)
                after = base
                for share in np.arange(self.step, 1, self.step):
                    removed = int(one.down(np.array([share * part.count]))[0])
                    if removed <= found[i] * part.count:
                        continue
                    with without(calibration.model, body, part, scores, removed):
                        losses = self._losses(calibration)
                    if (losses > base * (1 + rise)).any():
                        break
                    found[i], after = removed / part.count, losses
                if found[i]:
                    taken.enter_context(without(calibration.model, body, part, scores, round(found[i] * part.count)))
                base = np.maximum(base, after)
        return spread(parts, target, found)

    def _losses(self, calibration: Calibration) -> np.ndarray:
        """Mean loss of each task, (tasks,)."""
        import torch

        losses: list[float] = []
        for batch in first_rows(calibration, self.rows):
            with torch.no_grad():
                losses += calibration.loss(calibration.model.eval(), batch).tolist()
            calibration.passes["forward"] += tokens_of(batch)
        if len(losses) < self.tasks:
            raise ConfigError(f"allocation loss_budget: {len(losses)} calibration rows cannot be {self.tasks} tasks")
        return np.array([np.mean(task) for task in np.array_split(losses, self.tasks)])


def budgets(count: int, first: float, budget: float) -> np.ndarray:
    """Rises r_i = first lambda^i, (count,), that multiply to 1 + budget; all the same where `first` is too small."""
    from scipy.optimize import brentq

    even = (1 + budget) ** (1 / max(1, count)) - 1
    if first <= even:
        return np.full(count, even)
    if first >= budget:
        return np.where(np.arange(count) == 0, budget, 0.0)
    power = np.arange(count)
    decay = brentq(lambda x: np.log1p(first * x**power).sum() - np.log1p(budget), 0.0, 1.0, xtol=1e-12)
    return np.asarray(first * decay**power)
