"""Single weights go to zero: any method of `pipeline.compress.sparse`, any allocation over matrices, or N:M.

Only the matrices of attention and MLP are pruned, those of a mixture's experts one by one: embeddings, head, norms,
biases and routers stay. Methods that look at data go block after block, each measured behind pruned ones
(`pipeline.compress.sparse._sequential`): two forward passes; one with `propagate: dense`. Counts are exact.
`Outcome.masks` says what must stay zero: as the method chose it, so a weight that happens to be 0 may still be trained.

An expert is measured on the tokens that are routed to it. Where these are fewer than `least`, what they say of its
inputs is not believed: all of them count the same, so that Wanda, for one, goes by magnitude. The report says which.

A `low_rank` part stays in the model, in modules of its own (`sparse._modules`), which the folder keeps and
`pipeline.compress.folder.load` restores; transformers alone refuses that folder. With `fold: true` it is added to the
weights, which any loader reads, and nothing is 0 any more.

Zeros make nothing faster on dense kernels. The report says how many bytes they would save, and not how many FLOPs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from pipeline.compress._weights import matrix as weight_of
from pipeline.compress._weights import oriented
from pipeline.compress.allocation._blocks import matrices
from pipeline.compress.allocation._fill import free
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.allocation.global_rank import GlobalRank
from pipeline.compress.allocation.uniform import Uniform
from pipeline.compress.architecture import anatomy
from pipeline.compress.sparse._low_rank import LowRank
from pipeline.compress.sparse._storage import bitmask_bytes, csr_bytes, pattern_bytes
from pipeline.compress.sparse.armor import Armor
from pipeline.compress.sparse.base import Criterion, Matrix, Pattern, Pruned, Pruner, Quota
from pipeline.compress.steps.base import Outcome, Step
from pipeline.compress.units import Part
from pipeline.config import recipe_in
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Sums

log = logging.getLogger(__name__)


class Sparse(Step):
    """Prune to a `ratio` (the share of the matrices' weights that goes) or to a `pattern`."""

    kind: Literal["sparse"] = "sparse"
    ratio: float | None = Field(None, ge=0, lt=1)
    pattern: Pattern | None = Field(None, description="{keep: 2, of: 4}: of every 4 weights of a row 2 stay")
    method: SerializeAsAny[Annotated[Pruner, recipe_in("pipeline.compress.sparse", Pruner)]]
    allocation: SerializeAsAny[Annotated[Allocation, recipe_in("pipeline.compress.allocation", Allocation)]] = Uniform()
    cap: float = Field(0.9, gt=0, le=1, description="most that a matrix may lose")
    layers: tuple[int, int | None] = Field((0, None), description="first layer to prune, and one behind the last")
    propagate: Literal["pruned", "dense"] = Field("pruned", description="what the next block is measured behind")
    refit: bool = Field(False, description="least-squares weights under the final mask; O(out in^3) a matrix")
    low_rank: LowRank | None = Field(None, description="SLiM: fit L R to what the mask took, and keep it beside")
    least: int = Field(32, ge=1, description="tokens that an expert must be routed for what it reads to count")
    indivisible: Literal["refuse", "skip"] = Field(
        "refuse", description="what to do with a matrix whose sides the pattern or the method does not fit"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.ratio is None) == (self.pattern is None):
            raise ValueError("set either ratio or pattern")
        ranked = isinstance(self.method, Criterion) and self.method.scope == "global"
        if (self.pattern or ranked) and not isinstance(self.allocation, Uniform):
            what = "a pattern" if self.pattern else "scope: global"
            raise ValueError(f"{what} says itself how much goes from where: remove allocation {self.allocation.kind!r}")
        if isinstance(self.method, Armor):
            if self.pattern is None:
                raise ValueError("armor prunes to a pattern: set pattern, e.g. {keep: 2, of: 4}, instead of ratio")
            if self.refit or self.low_rank:
                raise ValueError("armor makes up for its mask itself: remove refit and low_rank")
        return self

    def apply(self, model: nn.Module, calibration: Calibration) -> Outcome:
        import torch

        body, parameters = anatomy(model), _parameters(model)
        parts = self._parts(body)
        quotas = self._quotas(body, parts, calibration)
        gradients = calibration.squared_gradients() if self.method.needs == "gradients" and quotas else {}
        outcome = Outcome(model)
        kept = {part.name: part.count for part in parts}
        notes: dict[str, str] = {}
        routed: dict[str, dict[str, int]] = {}
        with torch.no_grad():
            for names, sums in self._visits(body, quotas, calibration):
                for name in names:
                    matrix = _matrix(body, name, sums, gradients, calibration.rows)
                    if f"{name}.tokens" in sums:
                        stack, _, expert = name.rsplit(".", 2)
                        routed.setdefault(stack, {})[expert] = int(matrix.tokens)
                        if matrix.tokens < self.least:
                            matrix, notes[name] = _unseen(matrix), f"{matrix.tokens:.0f} tokens: inputs count alike"
                    pruned = self.method.prune(matrix, quotas[name])
                    if pruned.note:
                        log.warning("%s: %s", name, pruned.note)
                        notes[name] = pruned.note
                    kept[name] = self._store(model, body, matrix, pruned, outcome.masks)
        if quotas:
            calibration.forget()
        outcome.report = self._report(body, parts, kept, parameters) | {"notes": notes}
        if routed:
            outcome.report["routed"] = routed
        if self.low_rank and not self.low_rank.fold:
            added = _parameters(model) - parameters
            outcome.report["low_rank"] = {"parameters": added, "flops_per_token": 2 * added}
        return outcome

    def _store(
        self, model: nn.Module, body: Anatomy, matrix: Matrix, pruned: Pruned, masks: dict[str, torch.Tensor]
    ) -> int:
        """Put what stays of a matrix into the model, and what makes up for the rest; returns how many weights stay."""
        import torch

        from pipeline.compress.sparse._modules import put, store, with_low_rank
        from pipeline.compress.sparse._refit import refit

        if self.refit:
            pruned.weight = refit(matrix, pruned.mask)
        if self.low_rank:
            left, right = self.low_rank.fit(matrix, pruned)
            if not self.low_rank.fold:
                store(model, body, matrix.name, pruned, masks)
                put(model, matrix.name, with_low_rank(body.modules[matrix.name], left, right))
                return int(pruned.mask.sum())
            pruned = Pruned(torch.ones_like(pruned.mask), pruned.weight + left @ right)
        store(model, body, matrix.name, pruned, masks)
        return int(pruned.mask.sum())

    def _parts(self, body: Anatomy) -> list[Part]:
        """The matrices that can be pruned. Raises ConfigError where one cannot and must not be skipped."""
        parts = []
        factored = bool(self.low_rank and not self.low_rank.fold)
        if any(layer.experts for layer in body.layers) and (factored or not getattr(self.method, "fold", True)):
            raise ConfigError("sparse: stacked experts have no room for factors beside their weights: set fold: true")
        for layer, names in enumerate(matrices(body)):
            for name in names:
                if factored and hasattr(body.modules[name], "left"):
                    raise ConfigError(f"sparse: {name} has a low-rank part already: leave low_rank out of this step")
                shape = tuple(weight_of(body, name).shape)
                if why := self.method.fits((shape[0], shape[1]), self.pattern):
                    said = f"{name} cannot be pruned: {why}"
                    if self.indivisible == "refuse":
                        raise ConfigError(f"{said}; set indivisible: skip to leave such matrices as they are")
                    log.warning("%s; left as it is", said)
                    continue
                parts.append(Part(name, layer, shape[0] * shape[1], 1.0))
        if not parts:
            raise ConfigError("sparse: the model has no matrix that can be pruned")
        return parts

    def _quotas(self, body: Anatomy, parts: list[Part], calibration: Calibration) -> dict[str, Quota]:
        """For each matrix that loses something how much stays."""
        if self.pattern:
            there = free(parts, Target(0, layers=self.layers))
            share = Fraction(self.pattern.keep, self.pattern.of)
            return {p.name: Quota(int(p.count * share), self.pattern) for p, t in zip(parts, there, strict=True) if t}
        assert self.ratio is not None
        ranked = isinstance(self.method, Criterion) and self.method.scope == "global"
        allocation = GlobalRank() if ranked else self.allocation
        if asked := allocation.probes(body, parts):
            calibration.measure(*asked)
        evidence = Evidence(body, calibration, self._scores(body, parts, allocation))
        keep = allocation.keep(parts, Target(self.ratio, self.cap, 0, layers=self.layers), evidence)
        return {p.name: Quota(int(k)) for p, k in zip(parts, keep, strict=True) if k < p.count}

    def _scores(self, body: Anatomy, parts: list[Part], allocation: Allocation) -> list[np.ndarray] | None:
        """Every weight's score, 8 bytes each, for allocations that look at them; only of methods that need no data."""
        if not isinstance(self.method, Criterion) or self.method.needs != "none" or isinstance(allocation, Uniform):
            return None
        scores = (self.method.scores(Matrix(p.name, weight_of(body, p.name).float())) for p in parts)
        return [score.double().cpu().numpy().ravel() for score in scores]

    def _visits(
        self, body: Anatomy, quotas: dict[str, Quota], calibration: Calibration
    ) -> Iterable[tuple[list[str], Sums]]:
        """Matrices to prune, and what was seen of them, in the order in which they are pruned."""
        inside = [[name for name in names if name in quotas] for names in matrices(body)]
        if not quotas or (self.method.needs == "none" and not self.refit and not self.low_rank):
            return [(names, {}) for names in inside]
        from pipeline.compress.sparse._sequential import walk

        needed = {"gram"} if self.refit or self.method.needs == "gram" else set()
        needed |= {"abs"} if self.low_rank and self.low_rank.saliency == "mean" else set()
        return walk(calibration, body.blocks, inside, needed, self.propagate)

    def _report(self, body: Anatomy, parts: list[Part], kept: dict[str, int], parameters: int) -> dict[str, Any]:
        total, stay = sum(p.count for p in parts), sum(kept.values())
        weights = {p.name: weight_of(body, p.name) for p in parts}
        sizes = {name: weight.element_size() for name, weight in weights.items()}
        stored = {
            "dense": sum(p.count * sizes[p.name] for p in parts),
            "bitmask": sum(bitmask_bytes(p.count, kept[p.name], sizes[p.name]) for p in parts),
            "csr": sum(csr_bytes(tuple(weights[p.name].shape), kept[p.name], sizes[p.name]) for p in parts),
        }
        if self.pattern:
            stored["pattern"] = sum(
                pattern_bytes(p.count, self.pattern, sizes[p.name])
                if kept[p.name] < p.count
                else p.count * sizes[p.name]
                for p in parts
            )
        return {
            "removed_weights": total - stay,
            "of_prunable": (total - stay) / total,
            "of_parameters": (total - stay) / parameters,
            "kept": {p.name: f"{kept[p.name]} of {p.count}" for p in parts},
            "bytes": stored,
        }


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _unseen(matrix: Matrix) -> Matrix:
    """A matrix of which is said that all its inputs are the same and independent."""
    import torch

    one = torch.ones(matrix.weight.shape[1], dtype=torch.float64, device=matrix.weight.device)
    return replace(matrix, tokens=1.0, seen={**matrix.seen, "square": one, "abs": one, "gram": one.diag()})


def _matrix(body: Anatomy, name: str, sums: Sums, gradients: Sums, rows: int) -> Matrix:
    """A matrix with what was seen of it: `gradients` are mean squares over the rows by parameter name, or empty."""
    seen = {key.rpartition(".")[2]: value for key, value in sums.items() if key.startswith(f"{name}.")}
    tokens = float(seen.pop("tokens", sums.get("tokens", 0)))
    if gradients:
        seen["gradient"] = (oriented(body, name, gradients) * rows).sqrt()
    return Matrix(name, weight_of(body, name).float().clone(), tokens, seen)
