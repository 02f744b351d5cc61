"""A small Llama, trained on the tokens of the kept rows; its loss is measured on texts that no arm has trained on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.compare.learners import _tokens as tokens
from pipeline.compare.learners.base import Arrays, Learner, Result, Teacher
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.models.files import check_installed
from pipeline.models.training import Shape, lm_loss, new_lm, train_lm
from pipeline.recipe import Column, State
from pipeline.run import Run
from pipeline.scores._seeds import locate, read_seeds

BLOCKS = "blocks"


class Language(Learner):
    """A language model on texts."""

    content: ClassVar[Literal["text", "image"]] = "text"
    measure: ClassVar[str] = "loss"

    target: str | list[str] | None = Field(None, description="texts to be good at: .parquet, .jsonl or .txt files")
    target_text: str = Field("text", description="column of the target that holds the text")
    shape: Shape = Shape(hidden=192, layers=6, heads=6, kv_heads=3, mlp=512, vocab=4096, context=256)
    eval_tokens: int = Field(65_536, ge=64, description="tokens to measure on, at the most, of the target and the mix")

    @property
    def targets(self) -> tuple[str, ...]:
        files = [self.target] if isinstance(self.target, str) else self.target
        return tuple(locate(files, "target")) if files else ()

    @property
    def consumed(self) -> int:
        return self.steps * self.batch * self.shape.context

    def check(self, config: Config) -> None:
        try:
            check_installed("tamis compare --proxy", "models", "torch", "transformers", "tokenizers")
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def columns(self, run: Run) -> list[Column]:
        return [tokens.tokens_column(tokens.tokenizer(run, self.shape.vocab))]

    def kept(self, run: Run, flag: str, value: float, most: int | None, seed: int) -> tokens.Kept:
        return tokens.Kept(flag, value, self.eval_tokens if most is None else most, seed)

    def examples(self, state: State) -> tuple[Arrays, int]:
        most = len(state["ids"]) + len(state["length"])
        return {BLOCKS: tokens.blocks(tokens.lists(state), self.shape.context, most)}, len(state["ids"])

    def measured(self, state: State, run: Run) -> Mapping[str, Arrays]:
        cut = partial(tokens.blocks, context=self.shape.context, most=self.eval_tokens)
        found = {"mix": {BLOCKS: cut(tokens.lists(state))}}
        if self.target:
            encode = tokens.encoder(tokens.tokenizer(run, self.shape.vocab))
            found["target"] = {BLOCKS: cut(encode(read_seeds(self.targets, self.target_text, "target")))}
        return found

    def train(
        self, data: Arrays, held: Mapping[str, Arrays], steps: int, seed: int, directory: Path, teacher: Teacher | None
    ) -> Result:
        import torch

        model: Any = new_lm(self.shape, seed)
        if torch.cuda.is_available():
            model.cuda()
        started = time.monotonic()
        losses = train_lm(model, data[BLOCKS], steps, self.batch, self.lr, seed)
        seconds = time.monotonic() - started
        result: Result = {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
        result |= {metric: lm_loss(model, found[BLOCKS]) for metric, found in held.items()}
        return result | {"train": float(np.mean(losses[-max(1, len(losses) // 20) :]))}

    def describe(self, parameters: float) -> str:
        shape, files = self.shape, [self.target] if isinstance(self.target, str) else self.target
        target = f"Target {', '.join(files)}" if files else "No target"
        return (
            f"{target}. Llama of {parameters / 1e6:.2f} M parameters "
            f"({shape.layers} layers, width {shape.hidden}, {shape.vocab:,} pieces, context {shape.context}), "
            f"{self.steps:,} steps of {self.batch} blocks: {self.consumed:,} tokens for every arm"
        )
