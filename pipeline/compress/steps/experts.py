"""Experts: whole experts of a mixture go, the same number from every layer.

Criteria:

- `reap`: mean over the tokens routed to an expert of g_j(x) ||f_j(x)||_2. Lasby et al. 2025, "REAP the Experts: Why
  Pruning Prevails for One-Shot MoE Compression", arXiv 2510.13999. Merging experts would lose their independent
  routing, so they are dropped. Ranked by activation are only experts that were routed at least `least` tokens; the
  others stay, and where too few can be ranked the step refuses.
- `frequency`: how many tokens are routed to an expert.
- `stun`: experts whose router rows are alike are clustered, and the one closest to its cluster's mean stays, with its
  own router row. Lee et al. 2024, "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", arXiv
  2409.06211. Needs no data; the step `stun` lets single weights follow. They choose one threshold for all layers and
  average small clusters; here every layer keeps as many, and no expert is averaged, for neurons are not aligned.
- `random`: chance.

Memory gets less and FLOPs a token do not: the router still chooses as many. Shared experts stay. After healing at scale
different criteria come out much alike (SlimQwen, arXiv 2605.08738, abstract only).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.architecture import anatomy
from pipeline.compress.steps._experts import Routing, agglomerate, representative
from pipeline.compress.steps.base import Outcome, Step
from pipeline.compress.surgery import cut
from pipeline.compress.units import lowest
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.architecture import Experts as Mixture
    from pipeline.compress.calibration import Calibration, Sums

log = logging.getLogger(__name__)


class Experts(Step):
    """Remove a share of the experts of every layer."""

    kind: Literal["experts"] = "experts"
    ratio: float = Field(ge=0, lt=1, description="share of the experts of a layer that goes, rounded to whole ones")
    criterion: Literal["reap", "frequency", "stun", "random"] = "reap"
    least: int = Field(32, ge=1, description="reap: tokens that an expert must be routed to be ranked")
    seed: int = Field(0, description="of `random`")

    def apply(self, model: nn.Module, calibration: Calibration) -> Outcome:
        body = anatomy(model)
        mixtures = {i: layer.experts for i, layer in enumerate(body.layers) if layer.experts}
        if not mixtures:
            raise ConfigError("experts: the model has no mixture of experts: use a width step")
        goes = {i: self._number(body, i, mixture) for i, mixture in mixtures.items()}
        sums: Sums = {}
        if self.criterion in ("reap", "frequency") and any(goes.values()):
            sums = calibration.measure(Routing(tuple(m.stack for m in mixtures.values())))
        rng = np.random.default_rng(self.seed)
        removal: dict[str, np.ndarray] = {}
        for i, mixture in mixtures.items():
            scores = self._scores(body, i, mixture, goes[i], sums, rng)
            if goes[i]:
                removal[f"{i}.expert"] = lowest(scores, mixture.count - goes[i], mixture.groups)
        parameters = sum(p.numel() for p in model.parameters())
        cut(model, body.units("expert"), removal)
        if removal:
            calibration.forget()
        report = {
            "removed_parameters": parameters - sum(p.numel() for p in model.parameters()),
            "kept": {f"{i}.expert": f"{m.count - goes[i]} of {m.count}" for i, m in mixtures.items()},
            "removed": {name: index.tolist() for name, index in removal.items()},
        }
        if sums:
            report["routed"] = {f"{i}.expert": sums[f"{m.stack}.routed"].int().tolist() for i, m in mixtures.items()}
        return Outcome(model, removal, report=report)

    def _number(self, body: Anatomy, layer: int, mixture: Mixture) -> int:
        """Experts of a layer that go: the same number of each group. Raises ConfigError where too few would stay."""
        goes = round(self.ratio * mixture.count / mixture.groups) * mixture.groups
        within = (mixture.count - goes) // mixture.groups
        # a router that chooses among groups first sees those of the groups it chose, and ranks a group by its best two
        open_groups = getattr(body.modules[mixture.router], "topk_group", 1) if mixture.groups > 1 else 1
        if within * open_groups < mixture.chosen or (mixture.groups > 1 and within < 2):
            left = f"{mixture.count - goes} of {mixture.count} experts in layer {layer}"
            raise ConfigError(
                f"experts: ratio {self.ratio:g} leaves {left}, and its router chooses {mixture.chosen} for each token: "
                "lower the ratio"
            )
        return goes

    def _scores(
        self, body: Anatomy, layer: int, mixture: Mixture, goes: int, sums: Sums, rng: np.random.Generator
    ) -> np.ndarray:
        """Of every expert of a layer, (count,) float64, greater is more important."""
        if not goes or self.criterion == "random":
            return rng.random(mixture.count)
        if self.criterion == "stun":
            rows = body.modules[mixture.router].weight.detach().double().cpu().numpy()
            return np.asarray(stays(rows, mixture.count - goes, mixture.groups), np.float64)
        routed: np.ndarray = sums[f"{mixture.stack}.routed"].numpy()
        if self.criterion == "frequency":
            return routed
        ranked = routed >= self.least
        if not ranked.all():
            log.warning(
                "experts: layer %d: %d of %d experts were routed fewer than %d tokens and stay unranked",
                layer, (~ranked).sum(), mixture.count, self.least,
            )  # fmt: skip
        if (ranked.reshape(mixture.groups, -1).sum(1) < goes // mixture.groups).any():
            raise ConfigError(
                f"experts: of layer {layer} only {ranked.sum()} of {mixture.count} experts were routed {self.least} "
                f"tokens or more, and {goes} are to go: calibrate on more rows, or use criterion: stun"
            )
        means = reap(sums[f"{mixture.stack}.saliency"].numpy(), routed)
        scores: np.ndarray = np.where(ranked, means, means.max() + 1)
        return scores


def reap(saliency: np.ndarray, routed: np.ndarray) -> np.ndarray:
    """Mean of g ||f|| over the tokens routed to each expert, 0 where there are none."""
    means: np.ndarray = saliency / np.maximum(routed, 1)
    return means


def stays(rows: np.ndarray, keep: int, groups: int = 1) -> np.ndarray:
    """Which experts (n,) bool stand for the clusters of their router rows (n, d), as many of each group."""
    chosen = np.zeros(len(rows), bool)
    for part in np.split(np.arange(len(rows)), groups):
        for cluster in agglomerate(rows[part], keep // groups):
            chosen[part[representative(rows[part], cluster)]] = True
    return chosen
