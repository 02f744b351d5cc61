"""The contract of a learner: what `tamis compare --proxy` trains on every selection, and on what it is measured.

Subclasses are settings and knowledge in one: which columns hold the examples, how those of the kept rows are gathered,
how a model learns from them. They know nothing of arms, budgets and artifacts (`pipeline.compare.proxy` does).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.config import Config
from pipeline.recipe import Column, State, Statistic

if TYPE_CHECKING:
    from pipeline.run import Run

Arrays = Mapping[str, np.ndarray]
"""Examples as they are stored for a training, by NumPy arrays of the learner's own."""
Result = dict[str, float]
"""Of a training: what was measured on the `mix`, on the `target` and in `train`ing (lower is better), `seconds`,
`parameters`."""


@dataclass(frozen=True)
class Teacher:
    """What a training left of the model that teaches this one, and the share of the corpus that this one has."""

    folder: Path
    share: float


class Learner(BaseModel, ABC):
    """What is trained on every selection, and on what it is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    content: ClassVar[Literal["text", "image"]]
    """What a row is known by: copies of it are held out together."""
    measure: ClassVar[str]
    """What is measured, as the table calls it; lower is better."""

    at: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.1, 0.25), min_length=1, description="budgets, as shares of the corpus's tokens"
    )
    seeds: int = Field(3, ge=2, description="trainings of every arm; intervals are taken over them")
    steps: int = Field(1000, ge=2)
    batch: int = Field(16, ge=1, description="examples a step")
    lr: float = Field(2e-3, gt=0)
    held_out: float = Field(0.02, gt=0, lt=0.5, description="share of the corpus to measure on")

    @field_validator("at")
    @classmethod
    def _once(cls, at: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(dict.fromkeys(at))

    @property
    def taught(self) -> tuple[bool, ...]:
        """Ways to train every arm: without a teacher, and with one."""
        return (False,)

    @property
    def targets(self) -> tuple[str, ...]:
        """Files with texts to be good at."""
        return ()

    @property
    @abstractmethod
    def consumed(self) -> int:
        """Examples, in the unit of the corpus's tokens, that a training sees."""

    def check(self, config: Config) -> None:
        """Raises ConfigError where the learner cannot learn from a corpus."""

    @abstractmethod
    def columns(self, run: Run) -> list[Column]:
        """Columns of the examples; fits what they need."""

    @abstractmethod
    def kept(self, run: Run, flag: str, value: float, most: int | None, seed: int) -> Statistic:
        """Statistic: examples of the rows where a column is a value, `most` of them (None: what is measured on).

        Its state has `rows` (1,): all rows where it is.
        """

    @abstractmethod
    def examples(self, state: State) -> tuple[Arrays, int]:
        """What is stored of a state to train on, and how many examples it holds in the unit of tokens."""

    @abstractmethod
    def measured(self, state: State, run: Run) -> Mapping[str, Arrays]:
        """What is measured on, by metric: `mix` of a state, and the `target` where there is one."""

    @abstractmethod
    def train(
        self, data: Arrays, held: Mapping[str, Arrays], steps: int, seed: int, directory: Path, teacher: Teacher | None
    ) -> Result:
        """Train a model and measure it. `directory` takes what it leaves."""

    @abstractmethod
    def describe(self, parameters: float) -> str:
        """What is trained, in a sentence."""
