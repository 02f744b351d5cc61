"""Depth: whole blocks go, or single attention and MLP branches; the residual stream goes on without them.

Methods (`method`):

- `bi` and `angular` (blocks): those that turn the residual stream least, by 1 - mean cos(h_in, h_out) (block influence,
  ShortGPT, Men et al. 2024, arXiv 2403.03853) or mean arccos / pi. One forward pass; with `iterative` one a removal.
- `contiguous` (blocks): the n neighbours between whose ends the angle is smallest (Gromov et al. 2024, arXiv
  2403.17887, who look at the last token only; here all tokens). One forward pass.
- `finercut` (both): greedily, what moves the output least from the dense model's, given what is gone (Zhang et al.
  2024, arXiv 2405.18218; YaNgZhAnG-V5/llm_dissect). The first 40 % of the layers may go only after 40 % of the
  parameters (`spare`). About n^2 / 2 reruns of a few rows, each from the lowest changed block on; `iterative: false`
  tries each candidate once.
- `additive` (both): harms delta = E ||f - f_without||^2 on the output, one rerun a candidate, and a knapsack over them
  (LAPTOP-Diff, Zhang et al. 2024, arXiv 2404.11098). It assumes that harms add up: where the chosen set's harm is off
  the sum by more than `tolerance`, the choice is made greedily instead, and the report says so.
- `random` (both): the control that the others have to beat.

The first token of a row does not count in angles (a sink that dominates them), padding nowhere. States are those before
the final norm. FinerCut's 0.4 and its 10 to 20 sequences are the paper's.

Measured on SmolLM2-135M-Instruct, 6 of 30 blocks, 4 to 6 rows of 64 tokens, no recovery; loss of held-out text in nats,
CPU seconds of the choice on one core: dense 3.01, random blocks 12.2 (4.7 to 18.4, six draws), `bi` 3.90 (1 s),
`contiguous` 3.66 (1 s), `additive` 3.57 (19 s; harms off their sum by 0.10), `finercut` with `jsd` 3.58 (67 s).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.compress.allocation._fill import free
from pipeline.compress.allocation.base import Target
from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import Turns, stage_add
from pipeline.compress.depth.choose import greedy, least_sum, one_shot
from pipeline.compress.depth.rerun import Branch, Trial, distances, left_out
from pipeline.compress.steps.base import Outcome, Step
from pipeline.compress.surgery import remove_branches
from pipeline.compress.units import Part
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration, Stage
    from pipeline.compress.depth.distance import Distance


class Depth(Step):
    """Remove blocks or branches with `ratio` of the parameters of the blocks that are not left out (`layers`)."""

    kind: Literal["depth"] = "depth"
    ratio: float = Field(ge=0, lt=1)
    units: Literal["block", "branch"] = "block"
    method: Literal["bi", "angular", "contiguous", "finercut", "additive", "random"] = "bi"
    iterative: bool | None = Field(None, description="look again after each removal; only finercut does by default")
    distance: Literal["fro", "angle", "jsd"] = Field("fro", description="finercut: between outputs")
    spare: float = Field(0.4, ge=0, le=1, description="finercut: share of first layers that go last")
    tolerance: float = Field(0.5, ge=0, description="additive: how far off the sum of the harms the set's may be")
    rows: int = Field(16, ge=1, description="finercut and additive: rows of calibration data that are rerun")
    seed: int = Field(0, description="random: of the draw")
    layers: tuple[int, int | None] = Field((0, None), description="first layer that may go, and one behind the last")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.units == "branch" and self.method in ("bi", "angular", "contiguous"):
            raise ValueError(f"{self.method} looks at whole blocks: set units: block, or method: finercut or additive")
        if self.iterative and self.method in ("contiguous", "additive", "random"):
            raise ValueError(f"{self.method} chooses all at once: remove iterative, or set method: finercut")
        return self

    def apply(self, model: nn.Module, calibration: Calibration) -> Outcome:
        body = anatomy(model)
        parts, branches = self._candidates(body)
        open_ = free(parts, Target(self.ratio, layers=self.layers))
        branches = [b for b, there in zip(branches, open_, strict=True) if there]
        if not branches:
            raise ConfigError(f"depth: layers {self.layers} leaves no {self.units} that may go")
        cost = np.array([p.cost for p, there in zip(parts, open_, strict=True) if there])
        target = self.ratio * float(cost.sum())
        chosen, said = self._choose(calibration, body, branches, cost, target) if self.ratio else ([], {})
        if chosen and len(chosen) == len(parts):
            raise ConfigError(f"depth: ratio {self.ratio:g} would remove all {len(parts)} {self.units}s: lower it")
        removed = float(cost[chosen].sum())
        if target - removed > float(cost.max()):
            raise ConfigError(
                f"depth: ratio {self.ratio:g} cannot be met: {removed / float(cost.sum()):.4g} can go, since an "
                "attention must stay: lower it"
            )
        gone = [branches[i] for i in chosen]
        if gone:
            remove_branches(model, gone)
            calibration.forget()
        names = [f"{layer}.{what}" for layer, what in gone]
        return Outcome(
            model,
            report={
                "removed": names,
                "removed_parameters": int(removed),
                "of_prunable": removed / float(cost.sum()),
                **said,
            },
        )

    def _candidates(self, body: Anatomy) -> tuple[list[Part], list[Branch]]:
        """What could go; attention before MLPs, so that ties go to it."""
        found: list[tuple[Branch, int]] = []
        if self.units == "block":
            found = [((i, "block"), _size(body, [layer.name])) for i, layer in enumerate(body.layers)]
        else:
            for i, layer in enumerate(body.layers):
                for kind in ("attention", "mlp"):
                    if branch := layer.branch(kind):
                        found.append(((i, kind), _size(body, [*branch.removable, branch.norm])))
            found.sort(key=lambda pair: pair[0][1])
        return [Part(f"{i}.{what}", i, 1, float(size)) for (i, what), size in found], [branch for branch, _ in found]

    def _choose(
        self, calibration: Calibration, body: Anatomy, branches: Sequence[Branch], cost: np.ndarray, target: float
    ) -> tuple[list[int], dict[str, Any]]:
        """Indices of what goes, in the order in which it was chosen, and what to say of it."""
        if self.method in ("bi", "angular"):
            return self._turning(calibration, body, branches, cost, target)
        if self.method == "contiguous":
            return self._contiguous(calibration, body, branches)
        harm = partial(self._harm, calibration, body, branches)
        needed = np.array([what == "attention" for _, what in branches])
        if needed.sum() < sum(layer.attention is not None for layer in body.layers):
            needed[:] = False  # one stays anyway
        if self.method == "random":
            return one_shot(cost, np.random.default_rng(self.seed).random(len(branches)), target, needed), {}
        if self.method == "finercut":
            if self.iterative is False:
                alone = harm(self.distance, (), range(len(branches)))
                return one_shot(cost, alone, target, needed), {"harm": alone.tolist()}
            late = np.array([layer < self.spare * len(body.layers) for layer, _ in branches])
            chosen = greedy(cost, target, partial(harm, self.distance), late, self.spare * float(cost.sum()), needed)
            return chosen, {"distance": float(harm(self.distance, chosen[:-1], chosen[-1:])[0])} if chosen else {}
        alone = harm("mse", (), range(len(branches)))
        found = least_sum(cost, alone, target - float(cost.min()) / 2, needed) or []
        if not found:
            return [], {}
        together, summed = float(harm("mse", found[:-1], found[-1:])[0]), float(alone[found].sum())
        off = abs(together - summed) / summed if summed else 0.0
        said = {"harm": alone.tolist(), "predicted": summed, "measured": together, "off": off}
        if off <= self.tolerance:
            return found, said | {"additive": True}
        return greedy(cost, target, partial(harm, "mse"), needed=needed), said | {"additive": False}

    def _harm(
        self,
        calibration: Calibration,
        body: Anatomy,
        branches: Sequence[Branch],
        distance: Distance,
        gone: Sequence[int],
        candidates: Iterable[int],
    ) -> np.ndarray:
        """Distance from the dense output without what is gone and each of the candidates."""
        trials = [Trial(branches[i][0], partial(left_out, calibration.model, body, [branches[i]])) for i in candidates]
        return distances(calibration, body, trials, distance, self.rows, [branches[i] for i in gone])

    def _turning(
        self, calibration: Calibration, body: Anatomy, branches: Sequence[Branch], cost: np.ndarray, target: float
    ) -> tuple[list[int], dict[str, Any]]:
        def turns(gone: Sequence[int], candidates: Iterable[int]) -> np.ndarray:
            with left_out(calibration.model, body, [branches[i] for i in gone]):
                if gone:
                    calibration.forget()
                sums = calibration.measure(Turns(body.blocks))
            tokens = sums["turn.tokens"].clamp_min(1)
            each = 1 - sums["turn.cosine"] / tokens if self.method == "bi" else sums["turn.angle"] / tokens
            found: np.ndarray = each.numpy()[[branches[i][0] for i in candidates]]
            return found

        alone = turns((), range(len(branches)))
        chosen = greedy(cost, target, turns) if self.iterative else one_shot(cost, alone, target)
        return chosen, {"influence": alone.tolist()}

    def _contiguous(
        self, calibration: Calibration, body: Anatomy, branches: Sequence[Branch]
    ) -> tuple[list[int], dict[str, Any]]:
        length = round(self.ratio * len(branches))
        if length == 0:
            return [], {}
        sums = calibration.measure(Spans(body.blocks, length))
        first = branches[0][0]
        angles = (sums["span.angle"] / sums["span.tokens"].clamp_min(1)).numpy()[
            first : first + len(branches) - length + 1
        ]
        start = int(np.argmin(angles))
        return list(range(start, start + length)), {"angle": angles.tolist()}


@dataclass(frozen=True)
class Spans:
    """How far `length` blocks together turn the residual stream: `span.angle` (arccos / pi), (layers - length + 1,),
    sums over tokens but the first of each row, and `span.tokens`."""

    blocks: str
    length: int

    def hooks(self, model: nn.Module, stage: Stage) -> Iterable[Any]:
        import torch

        layers = model.get_submodule(self.blocks)
        mask = None if stage.mask is None else (stage.mask & (stage.mask.cumsum(1) > 1))[:, 1:]
        before: dict[int, torch.Tensor] = {}

        def enter(i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before[i] = (args[0] if args else kwargs["hidden_states"])[:, 1:].float()

        def leave(i: int, module: nn.Module, args: tuple[Any, ...], after: torch.Tensor) -> None:
            if i + 1 < self.length:
                return
            x, y = before.pop(i + 1 - self.length), after[:, 1:].float()
            norms = x.norm(dim=-1) * y.norm(dim=-1)
            counts = norms > 0 if mask is None else (norms > 0) & mask
            cosine = ((x * y).sum(-1) / norms).clamp(-1, 1)[counts].double()
            each = torch.zeros(len(layers) - self.length + 1, dtype=torch.float64)
            each[i + 1 - self.length] = 1
            stage_add(stage, "span.angle", each * float((cosine.arccos() / torch.pi).sum()))
            stage_add(stage, "span.tokens", each * cosine.numel())

        handles = [b.register_forward_pre_hook(partial(enter, i), with_kwargs=True) for i, b in enumerate(layers)]
        return handles + [b.register_forward_hook(partial(leave, i)) for i, b in enumerate(layers)]


def _size(body: Anatomy, names: Iterable[str]) -> int:
    """Parameters of some modules; an empty name is none."""
    return sum(p.numel() for name in names if name for p in body.modules[name].parameters())
