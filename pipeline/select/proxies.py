"""Proxy trainings that the law of a budget of compute is fitted to: `tamis fit qqt`, or the first `tamis curate`.

As in Goyal et al. 2024: the corpus is ranked by the configuration's scores and cut into buckets of equal tokens, best
first; a small model is trained on each bucket alone for several epochs, and its error read after some of them. Here
the corpus is a random sample, the model a small Llama trained from scratch, the error its loss (nats a token) on target
texts, and the law's amplitude the loss of the untrained model. All buckets are cut to the same number of blocks and use
one tokenizer, one seed and one schedule, so they differ in their texts alone. 6 x parameters x buckets x epochs x
tokens of a bucket FLOPs.

Trades: one training a bucket, no repeats over seeds, a cosine schedule that ends at the last epoch, and a law that is
taken from buckets of some 100,000 tokens to whatever the corpus has. `measured.json` beside the law holds the errors.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.engine import threads
from pipeline.errors import ConfigError
from pipeline.models.files import check_installed
from pipeline.models.training import Shape, lm_loss, new_lm, pack, train_lm, train_tokenizer
from pipeline.recipe import State, fingerprint
from pipeline.sample import Sample, draw, needs_fit, texts
from pipeline.scores._seeds import identify, locate, read_seeds
from pipeline.select.compute import Law, Measured, fit_law

if TYPE_CHECKING:
    from pipeline.run import Artifact, Run

QQT = "qqt"
"""Name of the artifact."""
LAW, MEASURED = "law.json", "measured.json"
VERSION = 1


class Proxies(BaseModel):
    """What is trained, on how much, for how long, and what its error is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str | list[str] = Field(description="texts whose loss is the error: Parquet, .jsonl or .txt files")
    target_text: str = Field("text", description="column of the target files that holds the text")
    buckets: int = Field(4, ge=1, description="how many, best first")
    share: float = Field(0.1, gt=0, description="share of all tokens in each")
    epochs: tuple[int, ...] = Field(
        (1, 2, 4, 8), description="after which the error is read; the last ends the training"
    )
    half_life: float | None = Field(None, gt=0, description="fix it where the errors cannot tell it")
    floor: float = Field(0.1, ge=0, description="error that no data undercuts")
    rows: int = Field(10_000, ge=1, description="rows of the corpus to sample")
    shape: Shape = Shape()
    batch: int = Field(8, ge=1, description="blocks a step")
    lr: float = Field(3e-3, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_installed("select.budget.proxies", "models", "torch", "transformers", "tokenizers", "safetensors")
        if self.buckets * self.share > 1 + 1e-9:
            raise ValueError(f"{self.buckets} buckets of {self.share:g} are more than there is: lower one of them")
        if list(self.epochs) != sorted(set(self.epochs)) or min(self.epochs, default=0) < 1:
            raise ValueError("epochs must be whole numbers from 1 on, ascending")
        if self.half_life is None and len(self.epochs) < 3:
            raise ValueError("epochs: utility and half-life need three errors a bucket; give more, or a `half_life`")
        return self


def fitted_law(run: Run, proxies: Proxies, ranked_by: tuple[str, ...], seed: int) -> Law:
    """The law, from trainings that run once and are found again in `artifacts/qqt`.

    `ranked_by`: references of the stored columns that rank, the first decides. Raises ConfigError where the sample is
    too small for the buckets, or its errors follow no law.
    """
    target = locate([proxies.target] if isinstance(proxies.target, str) else proxies.target, "proxies.target")
    read = ("text", *ranked_by)
    identity = fingerprint(QQT, VERSION, proxies.model_dump(mode="json"), identify(target), seed, run.identity(*read))
    state: State = {}
    if needs_fit(run, QQT, identity):
        state = draw(run, Sample(read, proxies.rows, run.rows, int(fingerprint(QQT, seed)[:15], 16)))
    artifact = run.artifact(QQT, identity, partial(_fit, proxies, target, ranked_by, state, seed))
    return stored_law(artifact)


def stored_law(artifact: Artifact) -> Law:
    return Law.model_validate_json((artifact.local() / LAW).read_bytes())


def _fit(
    proxies: Proxies, target: list[str], ranked_by: tuple[str, ...], state: State, seed: int, directory: Path
) -> None:
    import torch

    torch.set_num_threads(threads.cpus())
    rows = texts(state) if state else []
    if not rows:
        raise ConfigError("proxies: the corpus has no text to sample")
    ranked = [rows[i] for i in np.lexsort([-state[name].astype(np.float64) for name in reversed(ranked_by)])]
    aim = read_seeds(target, proxies.target_text, "proxies.target").to_pylist()
    tokenizer = train_tokenizer(ranked, proxies.shape.vocab)
    context = proxies.shape.context
    lists = [e.ids for e in tokenizer.encode_batch_fast(ranked)]
    ends = np.cumsum([len(tokens) for tokens in lists])
    edges = np.searchsorted(ends, ends[-1] * proxies.share * np.arange(proxies.buckets + 1))
    sizes = np.diff(edges)
    if sizes.min() < 1:
        raise ConfigError(f"proxies: a bucket of {proxies.share:g} of {len(ranked)} rows is empty: raise rows or share")
    buckets = [pack(lists[a:b], context, 0) for a, b in pairwise(edges)]
    blocks = min(map(len, buckets))
    if blocks < proxies.batch:
        raise ConfigError(
            f"proxies: a bucket holds {blocks} blocks of {context} tokens, less than a batch of {proxies.batch}: "
            "raise rows or share, or lower batch or shape.context"
        )
    held_out = pack([e.ids for e in tokenizer.encode_batch_fast(aim)], context, 0)
    measured = [_train(proxies, bucket[:blocks], held_out, seed) for bucket in buckets]
    size = blocks * context
    untrained = lm_loss(new_lm(proxies.shape, seed), held_out)
    described = {"tokens": size, "untrained": untrained, "epochs": proxies.epochs}
    described |= {"errors": [m.error.tolist() for m in measured]}
    (directory / MEASURED).write_text(json.dumps(described, indent=2))
    law = fit_law(measured, size, proxies.share, proxies.floor, proxies.half_life, untrained - proxies.floor)
    (directory / LAW).write_text(law.model_dump_json(indent=2))


def _train(proxies: Proxies, blocks: np.ndarray, held_out: np.ndarray, seed: int) -> Measured:
    """Errors on the target after the epochs that are asked for, of a model trained on one bucket."""
    model = new_lm(proxies.shape, seed)
    epoch = len(blocks) // proxies.batch
    wanted = [epoch * e for e in proxies.epochs]
    errors: list[float] = []

    def read(step: int) -> bool:
        if step in wanted:
            errors.append(lm_loss(model, held_out))
        return False

    train_lm(model, blocks, wanted[-1], proxies.batch, proxies.lr, seed, stop=read)
    return Measured(np.array(wanted, np.float64) * proxies.batch * blocks.shape[1], np.array(errors))
