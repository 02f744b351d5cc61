"""The configuration of `tamis compare`: a parent, what is cut from it, the data, and the budget that all arms share."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from pipeline.compare.arms import DESIGNS, Design, unmatched
from pipeline.compare.measures.suite import Latency, Suite
from pipeline.compress.config import CalibrationData, ParentOf, RecoveryOf, ScheduleOf, StepOf
from pipeline.compress.recover.distill import Distill
from pipeline.compress.recover.full import Full
from pipeline.config import EngineConfig, Model
from pipeline.models.files import check_installed


class Matched(Model):
    """A parent, what is cut from it, the data, and the budget that all arms share."""

    model: ParentOf = Field(description="the parent: folder, hf://org/name, or a small model to train here")
    curated: str = Field(description="directory of a curated run; its corpus is the pool that random rows come from")
    steps: list[StepOf] = Field([], description="what makes the student, before it trains")
    schedules: list[ScheduleOf] = Field([], max_length=1, description="or what makes it while it trains")
    recover: RecoveryOf = Full()
    distill: RecoveryOf = Distill()
    scratch_lr: float | None = Field(None, gt=0, description="learning rate from scratch (default: that of `recover`)")
    flops: float | None = Field(None, gt=0, description="budget of every arm")
    tokens: int | None = Field(None, ge=1, description="or: the budget is what training the student on so many takes")
    length: int = Field(512, ge=8, description="tokens a block")
    calibration: CalibrationData = CalibrationData()
    seeds: int = Field(3, ge=2, description="trainings of every arm; an interval takes two, a claim three or more")
    arms: tuple[str, ...] = Field(tuple(DESIGNS), min_length=2)
    parent_tokens: float | None = Field(
        None, ge=0, description="tokens that the parent was trained on, for the full reading (default: of a small one)"
    )
    reuse: int = Field(1, ge=1, description="runs that share the scores, for the amortised reading")
    held_out: float = Field(0.02, gt=0, lt=0.5, description="share of the texts that is measured on, by hash")
    keep: tuple[str, ...] = Field((), description="arms whose models are kept, below arms/<arm>-<seed>/model")
    evaluate: Suite = Suite()
    latency: Latency | None = Field(Latency(repeats=10), description="how speed is measured; null: not at all")
    engine: EngineConfig = EngineConfig()
    run: str
    seed: int = 0

    @field_validator("arms", "keep")
    @classmethod
    def _known(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [a for a in arms if a not in DESIGNS]:
            raise ValueError(f"no arm is called {unknown[0]!r}; there are {', '.join(DESIGNS)}")
        return tuple(name for name in DESIGNS if name in arms)

    @model_validator(mode="after")
    def _whole(self) -> Matched:
        check_installed("tamis compare", "models", "torch", "transformers", "safetensors")
        if (self.flops is None) == (self.tokens is None):
            raise ValueError("name the budget once: `flops`, or `tokens` that the student is trained on")
        if not self.steps and not self.schedules:
            raise ValueError("nothing makes the student smaller: name `steps`, or `schedules` that cut while it trains")
        if self.recover.needs_teacher:
            raise ValueError(
                f"recover: {self.recover.kind} learns from a teacher, which is what arm D is: name `distill`"
            )
        if why := unmatched(self.designs, self.steps, self.schedules, self.recover.kind):
            raise ValueError(why)
        if self.calibration.by != "random" or self.calibration.draws > 1:
            raise ValueError("calibration: every seed of an arm draws rows at random: leave out `by` and `draws`")
        if "D" in self.arms and not self.distill.needs_teacher:
            raise ValueError(f"distill: {self.distill.kind} learns from no teacher: leave out arm D or name `distill`")
        return self

    @property
    def designs(self) -> list[Design]:
        """The arms to run."""
        return [DESIGNS[name] for name in self.arms]
