"""LoRAPrune: while LoRA trains, its own gradients say which units of the frozen model can go.

Zhang et al. 2024 (arXiv 2305.18403; aim-uofa/LoRAPrune). A weight's saliency is |(W + s B A) (dB A + B dA - dB dA)|
(`pipeline.compress.importance._loraprune`); of every matrix of a unit they are summed, brought to norm 1 over the
layer's units and averaged over steps, 0.9 of before. Masks on what units put out rise by the cubic between `warmup` and
`cooldown` and are chosen anew every `every` steps, in each layer by itself, so that a unit may come back; the first
tenth of the layers and the last one stay whole. At the end LoRA is merged and the masked units are cut.

Theirs: ratio 0.5, every 10 steps, rank 8, rate 1e-4, batch 128; `warmup` and `cooldown` are ours. Memory is LoRA's: no
gradient of a frozen matrix is held. The estimate is crude (in the test's example the true saliencies rank otherwise),
and noise until B has grown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.compress.schedule.base import Schedule
from pipeline.compress.units import Kind
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.compress.recover._session import Session
    from pipeline.compress.recover.base import Setup
    from pipeline.compress.schedule.base import Callback


class LoraPrune(Schedule):
    """Mask, train by LoRA, cut at the end."""

    source: ClassVar[str] = "Zhang et al. 2024, arXiv 2305.18403, equations 6 to 9"
    kind: Literal["lora_prune"] = "lora_prune"
    ratio: float = Field(0.5, ge=0, lt=1)
    units: tuple[Kind, ...] = ("kv_group", "neuron")
    every: int = Field(10, ge=1, description="steps between choices")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the budget before the first unit is masked")
    cooldown: float = Field(0.1, ge=0, lt=1, description="share of the budget behind the last choice")
    cap: float = Field(0.9, gt=0, le=1, description="most that a layer may lose of a kind")
    layers: tuple[int, int | None] | None = Field(
        None, description="first layer to prune, and one behind the last (default: without a first tenth and the last)"
    )

    @model_validator(mode="after")
    def _leaves_time(self) -> Self:
        if self.warmup + self.cooldown >= 1:
            raise ValueError("warmup and cooldown leave no time to prune: their sum must be below 1")
        return self

    def start(self, setup: Setup, session: Session) -> Callback:
        from pipeline.compress.recover._lora import LoraSession
        from pipeline.compress.schedule._lora_prune import LoraPruner

        if not isinstance(session, LoraSession):
            raise ConfigError("schedule: lora_prune reads LoRA's gradients: heal it by `lora`")
        return LoraPruner(self, setup.student)
