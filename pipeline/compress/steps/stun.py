"""STUN: whole experts go first, then single weights of those that stay, to one sparsity over both.

Lee et al. 2024, "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning" (arXiv 2409.06211, ACL 2025;
thnkinbtfly/STUN): experts whose routers are alike are redundant, so taking some out costs little and leaves the
unstructured part less to do. Defaults: a fifth of the experts and 40 % in all, as for Arctic; the rest by Wanda, as in
the paper, with `allocation: {kind: owl}` if wished.

`ratio` is of the weights of all matrices, experts' and attention's, that the model had: the sparse part takes what the
experts that went leave of it. Experts are chosen by their router rows alone (`steps.experts`, criterion `stun`), where
it says what differs from the authors'; weights by what is routed to each expert (`steps.sparse`): one pass and two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, SerializeAsAny

from pipeline.compress._weights import matrix
from pipeline.compress.allocation._blocks import matrices
from pipeline.compress.allocation.base import Allocation
from pipeline.compress.allocation.uniform import Uniform
from pipeline.compress.architecture import anatomy
from pipeline.compress.sparse.base import Pruner
from pipeline.compress.sparse.wanda import Wanda
from pipeline.compress.steps.base import Outcome, Step
from pipeline.compress.steps.experts import Experts
from pipeline.compress.steps.sparse import Sparse
from pipeline.config import recipe_in
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.calibration import Calibration


class Stun(Step):
    """Remove a share of the experts, then single weights until `ratio` of all weights is gone."""

    kind: Literal["stun"] = "stun"
    ratio: float = Field(0.4, ge=0, lt=1, description="share of the matrices' weights that goes, experts included")
    experts: float = Field(0.2, ge=0, lt=1, description="share of the experts of a layer that goes first")
    criterion: Literal["stun", "random"] = Field("stun", description="how the experts are chosen")
    method: SerializeAsAny[Annotated[Pruner, recipe_in("pipeline.compress.sparse", Pruner)]] = Wanda()
    allocation: SerializeAsAny[Annotated[Allocation, recipe_in("pipeline.compress.allocation", Allocation)]] = Uniform()
    cap: float = Field(0.9, gt=0, le=1, description="most that a matrix may lose")
    least: int = Field(32, ge=1, description="tokens that an expert must be routed for what it reads to count")
    seed: int = Field(0, description="criterion random: of the draw")

    def apply(self, model: nn.Module, calibration: Calibration) -> Outcome:
        before = _weights(model)
        structured = Experts(ratio=self.experts, criterion=self.criterion, seed=self.seed).apply(model, calibration)
        left = _weights(model)
        if (gone := 1 - left / before) > self.ratio + 1e-9:
            raise ConfigError(
                f"stun: {self.experts:g} of the experts are {gone:.4g} of the weights, above ratio {self.ratio:g}: "
                "raise ratio, or lower experts"
            )
        rest = Sparse(
            ratio=max(0.0, 1 - (1 - self.ratio) * before / left),
            method=self.method,
            allocation=self.allocation,
            cap=self.cap,
            least=self.least,
        )
        sparse = rest.apply(model, calibration)
        removed = before - left + sparse.report["removed_weights"]
        report = {
            "removed_weights": removed,
            "of_prunable": removed / before,
            "experts": structured.report,
            "weights": sparse.report,
        }
        return Outcome(model, structured.removed, sparse.masks, report=report)


def _weights(model: nn.Module) -> int:
    """Of all matrices that the sparse part may prune."""
    body = anatomy(model)
    return sum(matrix(body, name).numel() for block in matrices(body) for name in block)
