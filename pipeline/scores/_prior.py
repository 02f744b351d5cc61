"""A small language model of the corpus itself, for criteria that need one where the user has none."""

from __future__ import annotations

import json
import logging
from abc import ABC
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.engine import threads
from pipeline.errors import ConfigError
from pipeline.models.causal import check_model
from pipeline.models.files import check_installed
from pipeline.models.training import Shape, new_lm, pack, save_lm, train_lm, train_tokenizer
from pipeline.recipe import Resources, State, fingerprint
from pipeline.sample import Sample, draw, needs_fit, texts
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 14
"""What of a row is trained on: a sample of ten thousand rows stays within 160 MB."""


class Training(BaseModel):
    """A model trained from scratch on a sample of the corpus. Its size and length are ours, for CPUs: CoLoR-Filter's
    prior has 150 M parameters and 24,000 steps of 256 x 512 tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: Shape = Shape()
    steps: int = Field(1000, ge=1, description="batches to train on")
    batch: int = Field(16, ge=1, description="blocks of `shape.context` tokens a batch")
    lr: float = Field(3e-3, gt=0, description="highest learning rate")
    sample: int = Field(10_000, ge=1, description="distinct rows to draw, of each the first 16 KB")
    seed: int | None = Field(None, description="seed of the draw, the weights and the batches (default: the run's)")


class ByModel(Score, ABC):
    """Base of the scores that one causal language model gives: the one that is named, or one trained here."""

    model: str | None = Field(
        None, description="folder of a causal model, or hf://org/name[@revision] (default: one is trained here)"
    )
    train: Training = Field(Training(), description="how the model is trained where none is given")
    max_tokens: int = Field(1024, ge=2, description="tokens of a row that count; no more than the model's context")

    @model_validator(mode="after")
    def _there(self) -> Self:
        check_installed(f"scores.{self.kind}", "models", "torch", "transformers", "safetensors")
        if self.model is not None:
            check_model(self.kind, self.model)
            if "train" in self.model_fields_set:
                raise ValueError("`model` is trained already: remove `train`, or `model` to train one")
        return self

    def fit(self, run: Run) -> None:
        self._model(run)

    def _model(self, run: Run) -> str | Artifact:
        return self.model or prior(run, f"{self.column_name}-prior", self.train)


def prior(run: Run, name: str, training: Training) -> Artifact:
    """The artifact of a name with the model's files, and in `training.json` what it saw; trained once."""
    seed = seed_of(run, training)
    identity = fingerprint("prior", 1, training.model_dump(mode="json"), seed, run.identity("text"))
    sample = Sample(("text",), training.sample, run.rows, seed, key="text", max_bytes=MAX_BYTES)
    state = draw(run, sample) if needs_fit(run, name, identity) else {}
    gpu = run.config.engine.gpus > 0
    return run.artifact(name, identity, partial(_train, training, seed, state, gpu), neural(run))


def seed_of(run: Run, training: Training) -> int:
    return run.seed if training.seed is None else training.seed


def neural(run: Run) -> Resources:
    """What a neural model gets of a machine."""
    return Resources(cpus=run.config.engine.cpus, gpus=run.config.engine.gpus)


def _train(training: Training, seed: int, state: State, gpu: bool, directory: Path) -> None:
    import torch

    if not state:
        raise ConfigError("the corpus has no text to train a model on")
    torch.set_num_threads(threads.cpus())
    rows, shape = texts(state), training.shape
    tokenizer = train_tokenizer(rows, shape.vocab)
    blocks = pack([e.ids for e in tokenizer.encode_batch_fast(rows)], shape.context, 0)
    model = new_lm(shape, seed).to("cuda" if gpu else "cpu")
    losses = train_lm(model, blocks, training.steps, training.batch, training.lr, seed)
    save_lm(model, tokenizer, directory)
    facts = {
        "parameters": model.num_parameters(),
        "rows": len(rows),
        "tokens": blocks.size,
        "epochs": training.steps * training.batch / len(blocks),
        "losses": [round(float(x), 4) for x in losses],
    }
    log.info(
        "%s: %.1f M parameters, loss %.3f after %d steps",
        directory.name,
        facts["parameters"] / 1e6,
        losses[-1],
        training.steps,
    )
    (directory / "training.json").write_text(json.dumps(facts))
