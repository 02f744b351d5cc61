"""OBS: what removing a unit costs its layer once the units that stay have made up for it. One forward pass with Grams.

Source: Li et al. 2025, "Týr-the-Pruner", arXiv 2503.09657 (local pruning), after the Optimal Brain Surgeon. With H the
mean of x x^T over the inputs of o_proj or down_proj (`damping` times its mean diagonal added) and W its weights, unit
g costs half the squared output error that is left after the best update of the other columns, exactly: s_g = tr(W_g
[H^-1]_gg^-1 W_g^T) / 2. The lowest are removed in rounds, and after each the weights take the update and H^-1 is
downdated, so later scores know what is gone already. A unit's score is that of the round it went in, raised where it
would fall below an earlier one: the order of the scores is the order of removal, and scores are squared errors that
compare over layers. Follow it with `compensation: refit`, which the scores assume.

The authors' code adds W_g . (W H)_g, which is no gradient (that is zero here) and changes the order: `compat: true`.
Defaults are theirs: 16 rounds for neurons, 1 for attention, damping 0.01. They remove query heads; here it may be
either.

Memory: the Gram matrix, n^2 float64 a module (SmolLM2-135M's down_proj: 19 MB); time n^3 a layer, on top of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress._weights import consumers, factor, hessian, matrix
from pipeline.compress.calibration import InputMoments
from pipeline.compress.importance.base import Importance

if TYPE_CHECKING:
    import torch

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe, Sums
    from pipeline.compress.units import Units


class Obs(Importance):
    """Squared output error of a layer that removing a unit leaves after the best update of the rest."""

    kind: Literal["obs"] = "obs"
    neuron_rounds: int = Field(16, ge=1, description="rounds in which the neurons of a layer are removed")
    head_rounds: int = Field(1, ge=1, description="rounds in which its heads are removed")
    damping: float = Field(0.01, ge=0, description="share of the mean diagonal that is added to the diagonal")
    compat: bool = Field(False, description="add the weights' product with W H, as the authors' code does")
    source: ClassVar[str] = "Li et al. 2025, arXiv 2503.09657; Hassibi & Stork 1993"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        return [InputMoments(consumers(self.kind, groups), gram=True)]

    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        sums = calibration.measure(*self.probes(body, groups))
        return [self._of(body, units, sums) for units in groups]

    def _of(self, body: Anatomy, units: Units, sums: Sums) -> np.ndarray:
        alive = sums[f"{units.consumer}.square"] > 0  # inputs that are always 0 cost nothing
        weight = matrix(body, units.consumer).double() * alive
        h = hessian(sums, units.consumer, self.damping)
        rounds = self.neuron_rounds if units.kind == "neuron" else self.head_rounds
        return removal_scores(weight, h, units.width, rounds, self.compat)


def unit_scores(
    weight: torch.Tensor, inverse: torch.Tensor, width: int = 1, linear: torch.Tensor | None = None
) -> torch.Tensor:
    """Half the squared error that removing each unit leaves, (units,), from W (out, n) and H^-1 (n, n).

    `linear` (out, n) is W H where its product with W is to be added.
    """
    import torch

    columns = weight.unflatten(1, (-1, width)).movedim(1, 0)  # (units, out, width)
    each = torch.arange(len(columns), device=weight.device)
    blocks = inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width))[each, :, each]
    scores = (columns * torch.linalg.solve(blocks, columns.mT).mT).sum((1, 2)) / 2
    return scores if linear is None else scores + (weight * linear).sum(0).view(-1, width).sum(1)


def removal_scores(
    weight: torch.Tensor, hessian: torch.Tensor, width: int = 1, rounds: int = 16, compat: bool = False
) -> np.ndarray:
    """Scores (units,) float64 in whose order the units of W (out, n) go, from H (n, n), float64."""
    import torch

    count = weight.shape[1] // width
    scores, last = np.zeros(count), -np.inf
    if not float(hessian.diagonal().sum()):
        return scores  # nothing ever comes in
    inverse = torch.cholesky_inverse(factor(hessian, "obs", "damping"))
    linear = weight @ hessian if compat else None
    left = np.arange(count)
    while len(left):
        now = unit_scores(weight, inverse, width, linear).cpu().numpy()
        order = np.argsort(now, kind="stable")[: -(-count // rounds)]
        for i in order:  # strictly ascending, for ties would go by index
            scores[left[i]] = last = max(float(now[i]), float(np.nextafter(last, np.inf)))
        goes = torch.from_numpy((order[:, None] * width + np.arange(width)).ravel()).to(weight.device)
        stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        stays[goes] = False
        update = torch.linalg.solve(inverse[goes][:, goes], inverse[goes][:, stays])
        weight = weight[:, stays] - weight[:, goes] @ update
        inverse = inverse[stays][:, stays] - inverse[stays][:, goes] @ update
        linear = None if linear is None else linear[:, stays]
        left = np.delete(left, order)
    return scores
