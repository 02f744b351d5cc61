"""The configuration of `tamis compress` and what it shares with `tamis compare`: the model, the data, the steps."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from pipeline.compress.recover.base import Recovery
from pipeline.compress.schedule.base import Schedule
from pipeline.compress.steps.base import Step
from pipeline.config import EngineConfig, Model, recipe_in
from pipeline.corpus.content import Content
from pipeline.models.files import check_installed, existing, is_hub
from pipeline.models.training import Shape

METHODS = "pipeline.compress.methods"


class Small(Model):
    """A model to train here, for who has none: Llama-shaped, with a tokenizer of its own."""

    train_on: str | list[str] = Field(description="Parquet files, directories or globs to train it on")
    text: str = Field("text", description="their column")
    shape: Shape = Shape()
    steps: int = Field(500, ge=2)
    batch: int = Field(16, ge=1, description="blocks a step")
    lr: float = Field(2e-3, gt=0)
    seed: int = 0


def _there(model: str | Small) -> str | Small:
    if isinstance(model, str) and not is_hub(model):
        existing(model, "config.json", "*.safetensors")
    return model


ParentOf = Annotated[str | Small, AfterValidator(_there)]
"""A folder that is there, the name of a model of the hub, or a small model to train."""


class CalibrationData(Model):
    """What importance is measured on."""

    rows: int = Field(128, ge=1, description="blocks")
    length: int | None = Field(None, ge=2, description="tokens a block (default: that of the recovery)")
    batch: int = Field(8, ge=1, description="blocks that run together")
    by: str | list[str] = Field(
        "random",
        description="how the rows are chosen: `random`, or the name of a score of the curated run, highest first; of a "
        "list each is tried, and the choice whose cut model stays closest to the dense one is taken (NIRVANA)",
    )
    draws: int = Field(1, ge=1, description="random draws to try, where the closest is taken")
    seed: int = 0

    @property
    def choices(self) -> list[tuple[str, int]]:
        """Every way to choose that is tried: what it is called, and its seed."""
        ways = [self.by] if isinstance(self.by, str) else self.by
        return [(way, self.seed + i) for way in ways for i in range(self.draws if way == "random" else 1)]


def methods() -> list[str]:
    """Names of the published combinations that ship with Tamis."""
    return sorted(f.name.removesuffix(".yaml") for f in files(METHODS).iterdir() if f.name.endswith(".yaml"))


def _named(value: Any) -> Any:
    """Turns `{method: flap, ratio: 0.2}` into the step that the file `methods/flap.yaml` describes, with that ratio."""
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict) or "kind" in value or "method" not in value:
        return value
    name = value["method"]
    if name not in methods():
        raise ValueError(f"unknown method {name!r}; there are {', '.join(methods())}; or write a step with its `kind`")
    described = yaml.safe_load(files(METHODS).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return described | {k: v for k, v in value.items() if k != "method"}


StepOf = SerializeAsAny[Annotated[Step, recipe_in("pipeline.compress.steps", Step), BeforeValidator(_named)]]
RecoveryOf = SerializeAsAny[Annotated[Recovery, recipe_in("pipeline.compress.recover", Recovery)]]
ScheduleOf = SerializeAsAny[Annotated[Schedule, recipe_in("pipeline.compress.schedule", Schedule)]]


class Compress(Content):
    """A model, what to cut from it, and what to heal it on."""

    model: ParentOf = Field(description="folder, hf://org/name, or a small model to train here")
    data: str | list[str] = Field(
        description="directory of a curated run, which knows what its rows are; or Parquet files, whose columns are "
        "`text`, or `prompt` and `response`, or `messages`"
    )
    calibration: CalibrationData = CalibrationData()
    steps: list[StepOf] = Field([], description="what makes the model smaller, in this order")
    recover: RecoveryOf | None = Field(None, description="how it is healed; without it, it is not")
    schedules: list[ScheduleOf] = Field([], description="what cuts, or moves the mix of data, while it is healed")
    tokens: int = Field(1_000_000, ge=1, description="tokens to heal on")
    length: int = Field(512, ge=8, description="tokens a block")
    held_out: float = Field(0.02, gt=0, lt=0.5, description="share of the texts that is measured on, by hash")
    engine: EngineConfig = EngineConfig(address="inline")
    run: str
    seed: int = 0

    @model_validator(mode="after")
    def _whole(self) -> Compress:
        check_installed("tamis compress", "models", "torch", "transformers", "safetensors")
        if not self.steps and not self.schedules:
            raise ValueError(
                "nothing makes the model smaller: name `steps`, or `schedules` that cut while it is healed"
            )
        if self.schedules and self.recover is None:
            raise ValueError("schedules act while the model is healed: name how, such as recover: {kind: full}")
        return self
