"""WIFV: how much a unit's output varies, times the weight that reads it. One forward pass, two sums an entry.

Source: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning" (FLAP), arXiv 2312.11983. On the inputs x of
o_proj and down_proj: WIFV_j = Var(x_j) ||W_:,j||^2, with n - 1 and over all tokens. An entry that hardly varies can
go, however large it is, for the consumer's bias takes its mean (`compensation: bias`); without that compensation use
another criterion. A head's score is the mean over its entries.

`ifv`: the variance alone. `wifn`: the mean over a column of |W_ij| ||x_j||, which is Wanda's metric as a score of
units (Wanda-sp), the usual baseline of structured pruning.

FLAP standardises the scores in each layer and kind before it ranks them together: that is its allocation's business.
The authors' code takes the mean twice into the variance and drops that of the first sample; here sums are merged
(conventions, section 6). It also squares the attention's metric: `compat: true` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress._weights import consumers, matrix, unit_means
from pipeline.compress.calibration import InputMoments, Sums, variance
from pipeline.compress.importance.base import Importance

if TYPE_CHECKING:
    import numpy as np

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Units


class Wifv(Importance):
    """Variance of what a unit puts out, times the squared norm of the column that reads it."""

    kind: Literal["wifv"] = "wifv"
    metric: Literal["wifv", "ifv", "wifn"] = "wifv"
    compat: bool = Field(False, description="square the metric of attention units, as the authors' code does")
    source: ClassVar[str] = "An et al. 2024, arXiv 2312.11983"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        return [InputMoments(consumers(self.kind, groups))]

    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        sums = calibration.measure(*self.probes(body, groups))
        return [self._of(body, units, sums) for units in groups]

    def _of(self, body: Anatomy, units: Units, sums: Sums) -> np.ndarray:
        weight = matrix(body, units.consumer).float()
        if self.metric == "wifn":
            metric = weight.abs().mean(0) * sums[f"{units.consumer}.square"].sqrt()
        else:
            metric = variance(sums, units.consumer)
            if self.metric == "wifv":
                metric = metric * weight.square().sum(0)
        return unit_means(metric.square() if self.compat and units.kind != "neuron" else metric, units)
