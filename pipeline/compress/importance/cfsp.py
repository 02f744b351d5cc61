"""CFSP's fine score: a neuron's share of the weights of its layer, times the norm of its activation. One forward pass.

Source: Wang et al. 2024, "CFSP: Structured Pruning of LLMs with Coarse-to-Fine Activation Information", arXiv
2409.13199. For neuron j, with the matrices gate, up and down of its layer as (d, neurons): s_j = mean_i [ |Wd_ij|^b /
sum_k |Wd_ik|^b + |Wu_ij| / sum_k |Wu_ik| + |Wg_ij| / sum_k |Wg_ik| ] ||x_j||^c.

The released code divides by the sum within the neuron instead of over neurons, and the weights cancel: `actnorm` is
that score. Here they are compared over neurons. Defaults b = c = 1 are the paper's. The paper's other half, how much
each layer keeps by the angle between what it reads and writes, is an allocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.compress._weights import consumers, matrix, unit_means
from pipeline.compress.calibration import InputMoments
from pipeline.compress.importance.base import Importance

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Probe
    from pipeline.compress.units import Units


class Cfsp(Importance):
    """Mean share of a neuron in the absolute weights of its layer, times the norm of its activation."""

    kind: Literal["cfsp"] = "cfsp"
    weight_power: float = Field(1.0, gt=0, description="b, the exponent of the down matrix's weights")
    power: float = Field(1.0, gt=0, description="c, the exponent of the activation's norm")
    source: ClassVar[str] = "Wang et al. 2024, arXiv 2409.13199, fine-grained importance, normalised over neurons"

    def probes(self, body: Anatomy, groups: Sequence[Units]) -> list[Probe]:
        return [InputMoments(consumers(self.kind, groups, ("neuron",)))]

    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        sums = calibration.measure(*self.probes(body, groups))
        found = []
        for units in groups:
            down = matrix(body, units.consumer)
            into = [matrix(body, m.module).T for m in units.members if m.side == "out"]
            norm = sums[f"{units.consumer}.square"].sqrt()
            found.append(unit_means(self.of(norm, down, *into), units))
        return found

    def of(self, norm: torch.Tensor, down: torch.Tensor, *into: torch.Tensor) -> torch.Tensor:
        """Scores (neurons,) from the norms of activations and the matrices, each (d, neurons)."""
        terms = [down.float().abs() ** self.weight_power, *(w.float().abs() for w in into)]
        shares = [(w / w.sum(1, keepdim=True).clamp_min(1e-30)).mean(0) for w in terms]
        return sum(shares[1:], shares[0]) * norm**self.power
