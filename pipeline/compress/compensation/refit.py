"""Refit: the columns that stay are solved for anew, so that the consumer's output changes the least.

Source: Li et al. 2025, Týr-the-Pruner, arXiv 2503.09657; the exact solution of OBS. With H the mean of x x^T, damped:
W_K' = (W H)_:,K H_KK^-1 = W_K + W_P H_PK H_KK^-1, the minimum of the squared output error over calibration tokens with
the damping pulling towards the old weights. Every earlier update by OBS, in whatever rounds, ends at this solution.
Only o_proj and down_proj change. Damping 0.01 of the mean diagonal is the authors'.

`inputs: dense` solves all layers on what the dense model feeds them. `pruned` goes block after block, each on what
those before it, pruned and refit, put out: two more passes, and no layer is fitted to inputs that it will never see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress._weights import consumers, dampened, factor, hessian, losses, matrix
from pipeline.compress.calibration import InputMoments
from pipeline.compress.compensation.base import Compensation

if TYPE_CHECKING:
    import torch

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Removal, Units


class Refit(Compensation):
    """Least squares for the columns that stay."""

    kind: Literal["refit"] = "refit"
    damping: float = Field(0.01, ge=0, description="share of the mean diagonal that is added to the diagonal")
    inputs: Literal["dense", "pruned"] = Field("dense", description="what a layer is refit behind")
    source: ClassVar[str] = "Li et al. 2025, arXiv 2503.09657; Hassibi & Stork 1993"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        read = consumers(self.kind, groups)
        return [InputMoments(read, gram=True)] if self.inputs == "dense" else []

    def apply(self, body: Anatomy, groups: Sequence[Units], removal: Removal, calibration: Calibration) -> None:
        import torch

        from pipeline.compress.sparse._sequential import walk

        lost = {units.consumer: (goes, stays) for units, goes, stays in losses(groups, removal)}
        if self.inputs == "dense":
            sums = calibration.measure(*self.probes(body, groups))
            for name, (goes, stays) in lost.items():
                weight = matrix(body, name)
                weight[:, stays] += solved(weight, hessian(sums, name, self.damping), goes, stays, self.kind)
            return
        inside = [[u.consumer for u in groups if u.layer == i and u.consumer in lost] for i in range(len(body.layers))]
        with torch.no_grad():
            for names, sums in walk(calibration, body.blocks, inside, {"gram"}, "pruned"):
                for name in names:
                    weight, (goes, stays) = matrix(body, name), lost[name]
                    h = dampened(sums[f"{name}.gram"] / sums["tokens"], self.damping)
                    weight[:, stays] += solved(weight, h, goes, stays, self.kind)
                    weight[:, goes] = 0


def solved(weight: torch.Tensor, h: torch.Tensor, goes: torch.Tensor, stays: torch.Tensor, kind: str) -> torch.Tensor:
    """What the columns of W (out, n) that stay gain, (out, stays), from H (n, n) float64: W_P H_PK H_KK^-1.

    0 where nothing could change, or nothing ever comes in. Raises TamisError for an H that is singular, for `kind`.
    """
    import torch

    if not len(stays) or not float(h.diagonal().sum()):
        return weight.new_zeros((len(weight), len(stays)))
    into = torch.cholesky_solve(h[goes][:, stays].T, factor(h[stays][:, stays], kind, "damping"))
    return (weight[:, goes].double() @ into.T).to(weight)
