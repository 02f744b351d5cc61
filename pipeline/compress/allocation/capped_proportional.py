"""ECoFLaP's allocator: what a part keeps is in proportion to its score, between a floor of its own and all of it.

Sung et al. 2023 (arXiv 2310.02998, ICLR 2024; ylsung/ECoFLaP): every part keeps at least 1 - p_max; the rest of what is
to be kept goes out in proportion to the scores, never above a part's size, until nothing is left. (The released code
adds where it should take away once too much is kept; here the remainder is exact.)

Scores of parts:

- `given`: the sum of the pieces' scores, so it needs an importance that is not negative.
- `zeroth_order`: |L(W + eps z) - L(W - eps z)| / (2 eps) with z ~ N(0, I) over all matrices that hold the part, mean
  over rows of calibration data and draws. Two forward passes a part and draw, no gradients: works on what cannot be
  differentiated. Differences of the loss vanish in bfloat16, so the model must be float32.

eps = 1e-3 and one draw are the paper's; it took p_max 0.6 to 0.7 for targets of 0.5 to 0.6, hence 0.1 above the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.allocation._blocks import parameters_of
from pipeline.compress.allocation._fill import free, limits, spread, water
from pipeline.compress.allocation._rank import pieces
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.calibration import tokens_of
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pipeline.compress.units import Part


class CappedProportional(Allocation):
    """Keeps in proportion to parts' scores; no part loses more than `p_max` (default: the target's share + 0.1)."""

    kind: Literal["capped_proportional"] = "capped_proportional"
    scores: Literal["given", "zeroth_order"] = "given"
    p_max: float | None = Field(None, gt=0, le=1)
    eps: float = Field(1e-3, gt=0)
    draws: int = Field(1, ge=1)
    seed: int = 0
    data: ClassVar[str] = "forward"
    source: ClassVar[str] = "Sung et al. 2023, arXiv 2310.02998"

    def keep(self, parts: Sequence[Part], target: Target, evidence: Evidence) -> np.ndarray:
        limits(parts, target)
        p_max = min(1.0, target.share + 0.1) if self.p_max is None else self.p_max
        if p_max < target.share:
            raise ConfigError(f"allocation capped_proportional: p_max {p_max:g} is below ratio {target.share:g}")
        if self.scores == "given":
            score = np.array([s.sum() for s in pieces(evidence.scores, parts, self.kind)])
            if (score < 0).any():
                raise ConfigError(
                    "allocation capped_proportional: shares out by scores, which must not be negative; use an "
                    "importance that has none, or global_rank with normalise: zscore"
                )
        else:
            score = self._zeroth_order(parts, evidence)
        count = np.array([part.count for part in parts], np.int64)
        cost = np.array([part.cost for part in parts], np.float64)
        open_ = free(parts, target)
        kept = np.where(open_, keep_amounts(count, cost, np.where(open_, score, 0), open_, target.share, p_max), count)
        return spread(parts, target, 1 - kept / np.maximum(count, 1))

    def _zeroth_order(self, parts: Sequence[Part], evidence: Evidence) -> np.ndarray:
        import torch

        calibration, body = evidence.calibration, evidence.body
        if calibration is None:
            raise ConfigError("allocation capped_proportional: zeroth_order needs calibration data")
        generator = torch.Generator().manual_seed(self.seed)

        def losses() -> torch.Tensor:
            found = []
            for batch in calibration.batches:
                with torch.no_grad():
                    found.append(calibration.loss(calibration.model.eval(), batch).double())
                calibration.passes["forward"] += tokens_of(batch)
            return torch.cat(found)

        scores = np.zeros(len(parts))
        for i, part in enumerate(parts):
            held = parameters_of(body, part)
            if any(p.dtype in (torch.float16, torch.bfloat16) for p in held):
                raise ConfigError("allocation capped_proportional: zeroth_order needs a model loaded in float32")
            for _ in range(self.draws):
                directions = [torch.randn(p.shape, generator=generator).to(p) for p in held]
                scores[i] += slope(losses, held, directions, self.eps) / self.draws
        return scores


def keep_amounts(
    count: np.ndarray, cost: np.ndarray, score: np.ndarray, open_: np.ndarray, share: float, p_max: float
) -> np.ndarray:
    """Pieces (not rounded) that parts keep, (parts,); those that are not open take no part and get 0."""
    start = np.where(open_, np.ceil(count * (1 - p_max) - 1e-9), 0)
    total = (1 - share) * float((count * cost)[open_].sum())
    room = np.where(open_, count - start, 0) * cost
    left = total - float(start @ cost)
    amounts: np.ndarray = start + water(score, room, max(left, 0.0)) / np.maximum(cost, 1e-300)
    return amounts


def slope(
    losses: Callable[[], torch.Tensor], held: Sequence[torch.Tensor], directions: Sequence[torch.Tensor], eps: float
) -> float:
    """Mean over rows of the central difference's absolute value along a direction; parameters are put back."""
    import torch

    before = [p.detach().clone() for p in held]
    try:
        with torch.no_grad():
            found = []
            for sign in (eps, -eps):
                for p, old, z in zip(held, before, directions, strict=True):
                    p.copy_(old + sign * z)
                found.append(losses())
    finally:
        with torch.no_grad():
            for p, old in zip(held, before, strict=True):
                p.copy_(old)
    return float((found[0] - found[1]).abs().mean() / (2 * eps))
