"""Bias: what the removed units said on average stays, as the consumer's bias.

Source: An et al. 2024, FLAP, arXiv 2312.11983: b += W_:,P mean(x_P) on o_proj and down_proj. Exact for
entries that never vary, which is what `importance: wifv` looks for. A consumer without a bias is given one. Uses the
sums of the scoring pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.compress._weights import consumers, losses, matrix, module
from pipeline.compress.calibration import InputMoments
from pipeline.compress.compensation.base import Compensation

if TYPE_CHECKING:
    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Removal, Units


class Bias(Compensation):
    """Adds the removed columns' mean contribution to the bias."""

    kind: Literal["bias"] = "bias"
    source: ClassVar[str] = "An et al. 2024, arXiv 2312.11983"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        return [InputMoments(consumers(self.kind, groups))]

    def apply(self, body: Anatomy, groups: Sequence[Units], removal: Removal, calibration: Calibration) -> None:
        import torch

        sums = calibration.measure(*self.probes(body, groups))
        for units, goes, _ in losses(groups, removal):
            weight = matrix(body, units.consumer)
            mean = sums[f"{units.consumer}.sum"] / sums[f"{units.consumer}.count"]
            lost = weight[:, goes].double() @ mean[goes]
            owner = module(body, units.consumer)
            if owner.bias is None:
                owner.bias = torch.nn.Parameter(torch.zeros_like(weight[:, 0]))
            with torch.no_grad():
                owner.bias += lost.to(owner.bias)
