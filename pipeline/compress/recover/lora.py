"""LoRA recovery: every matrix of the layers learns a correction of low rank, which is merged in at the end.

`W + (alpha / r) B A` on the linear layers of attention and MLP (Hu et al. 2021, arXiv 2106.09685), as LLM-Pruner heals
what it cut (Ma et al. 2023, arXiv 2305.11627): rank 8, alpha 16, dropout 0.05, rate 1e-4, no weight decay; PASER takes
3e-4. 2 f + 6 N_lora FLOPs a token: on SmolLM2-135M 2,442,240 parameters are trained and a token costs .683 of full
training (T = 512). Above 100 M tokens take `full`.

`ranks: importance` gives a layer that turns the residual stream more a larger rank, as CFSP says it does (Wang et al.
2024, arXiv 2409.13199, whose code is without it): r_l = round(r I_l / mean I), at least 1, I_l being the mean angle
between a block's input and output over the first `measured` training blocks; alpha / r is the same everywhere.

A warning from PASER (arXiv 2502.12594): LoRA on all of Alpaca took a pruned LLaMA2-7B from perplexity 20 to 736. Set
`patience`, so that it stops when held-out loss rises and returns the best.

It takes no masks: the merged correction would fill the zeros of a sparse model. `perp` keeps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.allocation._blocks import linears
from pipeline.compress.architecture import Anatomy, anatomy
from pipeline.compress.recover.base import Cost, Recovery, Setup
from pipeline.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compress.recover._session import Session


class Lora(Recovery):
    """Low-rank corrections of all linear layers, by PEFT."""

    source: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685; ranks: Wang et al. 2024, arXiv 2409.13199"
    kind: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    ranks: Literal["equal", "importance"] = "equal"
    measured: int = Field(32, ge=1, description="ranks: importance: blocks that a layer's importance is measured on")
    lr: float = Field(1e-4, gt=0)

    def begin(self, setup: Setup) -> Session:
        import torch

        from pipeline.compress.recover._lora import LoraSession

        if setup.masks:
            raise ConfigError("recover: lora would fill the zeros of a sparse model: use perp, or full")
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise MissingExtra("recover: lora", "models", "peft") from error
        from transformers.pytorch_utils import Conv1D

        body = anatomy(setup.student)
        ranks = self.layer_ranks(body, setup)
        by_name = {name: r for names, r in zip(linears(body), ranks, strict=True) for name in names}
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a float does
            lora_dropout=self.dropout,
            target_modules=list(by_name),
            rank_pattern={name: r for name, r in by_name.items() if r != self.rank},
            alpha_pattern={name: self.alpha * r / self.rank for name, r in by_name.items() if r != self.rank},
            fan_in_fan_out=any(isinstance(body.modules[name], Conv1D) for name in by_name),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return LoraSession(setup.student, config)

    def layer_ranks(self, body: Anatomy, setup: Setup) -> list[int]:
        """Rank of every layer."""
        if self.ranks == "equal":
            return [self.rank] * len(body.layers)
        from pipeline.compress.calibration import Calibration, Turns

        sums = Calibration.of_blocks(setup.student, setup.blocks[: self.measured]).measure(Turns(body.blocks))
        return shares(self.rank, (sums["turn.angle"] / sums["turn.tokens"].clamp_min(1)).numpy())

    def cost(self, student: nn.Module, teacher: nn.Module | None = None) -> Cost:
        body = anatomy(student)
        sizes = [self.rank * sum(body.modules[name].weight.shape) for names in linears(body) for name in names]
        measured = self.measured if self.ranks == "importance" else 0
        return Cost("adapters", trained=sum(sizes), measured=measured)  # shared out by importance: the same, rounded


def shares(rank: int, importance: np.ndarray) -> list[int]:
    """Ranks in proportion to importance, with the mean `rank`, at least 1."""
    return [max(1, round(r)) for r in (rank * importance / importance.mean()).tolist()]
