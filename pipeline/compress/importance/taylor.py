"""Taylor: how much the loss changes when a unit's weights become zero, by gradients. LLM-Pruner's criterion.

Source: Ma et al. 2023, "LLM-Pruner", arXiv 2305.11627. With a weight w, its gradient g of the mean loss, and the mean
f of squared gradients of single sequences (the Fisher estimate of curvature): `first` |w g|; `second` |w f w|; `mixed`
|w g - w f w / 2|, each summed over all weights of the unit; `vector` |sum over the unit of w g|. `second` and `mixed`
need a backward pass a sequence, for a batch's gradient cannot be squared apart; the others one a batch. Scores are in
units of the objective and so compare over layers and kinds.

The objective need not be a loss. `max_logit` (NIRVANA, arXiv 2509.14230): the mean over the vocabulary of each token's
largest logit over positions. `disturbed` (SlimSAM, arXiv 2312.05284), for models that make embeddings and have no
labels: the squared distance to the model's own output plus noise; without noise the gradient is exactly zero. SlimSAM
then divides by the layer's mean, which is the allocation's business.

LLM-Pruner scores on 10 sequences of 64 tokens, and seeds show; take a hundred. The authors' table at 20 % of LLaMA-7B:
perplexity 19.1 first, 19.8 second, 22.3 vector, 582 magnitude, 27.5 random.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress._weights import unit_sums
from pipeline.compress.calibration import Batch, RowLoss, run
from pipeline.compress.importance.base import Importance
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compress.architecture import Anatomy
    from pipeline.compress.calibration import Calibration
    from pipeline.compress.units import Units

Order = Literal["first", "second", "mixed", "vector"]


class Taylor(Importance):
    """First or second order estimate of what removing a unit does to the loss."""

    kind: Literal["taylor"] = "taylor"
    order: Order = "first"
    objective: Literal["loss", "max_logit", "disturbed"] = "loss"
    noise: float = Field(0.01, gt=0, description="disturbed: standard deviation of what is added to the output")
    seed: int = Field(0, description="disturbed: seed of the noise")
    data: ClassVar[str] = "backward"
    source: ClassVar[str] = "Ma et al. 2023, arXiv 2305.11627"

    def scores(self, body: Anatomy, groups: Sequence[Units], calibration: Calibration) -> list[np.ndarray]:
        import torch

        objective = self._objective()
        # The squares first: their pass brings the gradients along.
        squares = calibration.squared_gradients(objective) if self.order in ("second", "mixed") else {}
        gradients = calibration.gradients(objective) if self.order != "second" else {}
        names = {id(p): name for name, p in calibration.model.named_parameters()}

        def of(parameter: torch.nn.Parameter) -> torch.Tensor:
            name = names[id(parameter)]
            zero = torch.zeros((), device=parameter.device)  # for what the objective does not depend on
            return salience(self.order, parameter.detach().float(), gradients.get(name, zero), squares.get(name, zero))

        scores = [unit_sums(body, units, of) for units in groups]
        return [np.abs(s) for s in scores] if self.order == "vector" else scores

    def _objective(self) -> RowLoss | None:
        if self.objective == "loss":
            return None
        return max_logit if self.objective == "max_logit" else Disturbed(self.noise, self.seed)


def salience(order: Order, w: torch.Tensor, g: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Of every weight, from its gradient and mean squared gradient; of `vector` what is summed before the absolute."""
    if order == "first":
        return (w * g).abs()
    if order == "second":
        return (w * f * w).abs()
    if order == "mixed":
        return (w * g - w * f * w / 2).abs()
    return w * g


def max_logit(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean over the vocabulary of the largest logit over positions; (rows,)."""
    output = run(model, batch)
    if "logits" not in output:
        raise ConfigError(
            "taylor: objective: max_logit needs a model that makes logits; use `disturbed` for embeddings"
        )
    logits: torch.Tensor = output.logits.float()
    if logits.ndim == 3:
        if "attention_mask" in batch:
            logits = logits.masked_fill(batch["attention_mask"][..., None] == 0, -float("inf"))
        logits = logits.amax(1)
    return logits.mean(-1)


@dataclass(frozen=True)
class Disturbed:
    """Mean squared distance of a row's output to itself plus noise that the row's content and the seed determine."""

    noise: float
    seed: int

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of every row, (rows,): over its last hidden states, or its logits where these are all it has."""
        import torch

        output: Any = run(model, batch)
        states = output.last_hidden_state if "last_hidden_state" in output else output.logits
        rows = zip(*(value.cpu().numpy() for value in batch.values()), strict=True)
        noise = np.stack([self._of(row, tuple(states.shape[1:])) for row in rows])
        return distance(states.float(), torch.from_numpy(noise).to(states.device), batch.get("attention_mask"))

    def _of(self, row: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
        content = zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in row))
        rng = np.random.default_rng((self.seed, content))
        return rng.standard_normal(shape, np.float32) * np.float32(self.noise)


def distance(states: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean square of what lies between the states (rows, ...) and themselves, as constants, plus noise; (rows,)."""
    square = (states - (states.detach() + noise)).square()
    if mask is None or square.ndim < 3:
        return square.flatten(1).mean(1)
    return (square.mean(-1) * mask).sum(1) / mask.sum(1).clamp_min(1)
