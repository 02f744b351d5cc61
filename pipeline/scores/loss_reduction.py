"""Loss reduction: what a model that has seen the target finds easier than the same model before (CoLoR-Filter).

    score(x) = L_prior(x) - L_conditional(x),    L(x) = -1/T sum_t ln p(x_t | x_<t)

in nats a token, over the T tokens of a row from the second on (of instructions: of the responses). It is the
log-likelihood ratio of target against corpus a token; its mean is KL(target || corpus) over target text and
-KL(corpus || target) over the corpus. `prior` and `conditional` are two causal models with one tokenizer; or `target`
names texts, and the pair is trained here: a small model from scratch on a sample of the corpus, then fine-tuned on the
target until texts of it that were held out get no easier. The artifacts `<name>-prior` and `<name>-conditional` then
hold the pair, and `conditional.json` how it went.

RHO-LOSS (Mindermann et al. 2022, arXiv 2206.07137) is the same difference with the model that is being trained in the
place of the prior: give its checkpoint as `prior`, a model of held-out data as `conditional`, and score again as it
learns.

In a corpus of instructions the files of `target` hold conversations in the same columns; the prior learns to write all
of the rows, since it begins from nothing, the conditional is fine-tuned on the responses alone.

`mask: 0.6` adds the field `mask`: for every token of a row (the prior's tokens, `ids` of its `lm-` column) whether a
trainer should count its loss, the 60 % of the corpus's tokens that the conditional model finds easiest beside the prior
(Rho-1, Lin et al. 2024, arXiv 2404.07965; see `_token_mask`). It goes along in the curated files, as
`tamis.<name>_mask`.

What it trades away:
- Rows are scored whole, by their first `max_tokens` tokens; the paper scores packed sequences of 512.
- Short rows have scores of high variance. `shrink: T0` multiplies by T / (T + T0); the paper has no short rows. One
  token has no loss: such rows go to quarantine, as do those with a loss that is not finite.
- A tiny target set turns the score into overlap with its phrases. Rows that hold a target text get the highest scores
  of all: rows that equal one are warned of, by their ids. Remove evaluation data from the corpus first.
- It sees the difference that a small model makes of small data. Where the held-out loss never falls, the conditional
  model is the prior and every score is 0, which is the random criterion; a warning says so.

Defaults: optimizer as in the official code; sizes and steps are ours, see `Training`; the paper fine-tunes for one
epoch at 1e-3.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.engine import threads
from pipeline.errors import ConfigError, CorpusError
from pipeline.models.causal import (
    LONGEST,
    Encoder,
    as_mask,
    check_model,
    context,
    load_causal,
    losses_of,
    model_source,
    row_losses,
    token_column,
)
from pipeline.models.files import check_installed, folder_of
from pipeline.models.training import lm_loss, pack, save_lm, train_lm
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores._contamination import warn_contained
from pipeline.scores._prior import Training, neural, prior, seed_of
from pipeline.scores._seeds import identify, locate
from pipeline.scores._targets import listed, read_conversations, read_targets
from pipeline.scores._token_mask import Excess, excess, lowest_bin, masks
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

log = logging.getLogger(__name__)

FIELDS = pa.schema(
    [
        ("score", pa.float32()),
        ("loss_prior", pa.float32()),
        ("loss_conditional", pa.float32()),
        ("tokens", pa.int32()),
    ]
)
MASK = pa.field("mask", pa.list_(pa.bool_()))
FACTS, LINE = "conditional.json", "mask.json"
TUNING = ("train", "target_text", "holdout", "tune_steps", "tune_lr")
LOOKS, PATIENCE = 10, 4
"""The held-out loss is measured so many times over the tuning, which ends when so many looks brought nothing."""
HELD_OUT_BLOCKS = 64
"""The held-out texts count up to so many blocks, so that looking costs less than tuning."""


class LossReduction(Score):
    """Prior's minus conditional's loss, nats a token."""

    claim = "like the target: a model that has seen the target finds it easier than before"
    cost = "4 N FLOPs a token, two forward passes of N parameters"
    source = "Brandfonbrener et al. 2024 (CoLoR-Filter), arXiv 2406.10670"
    kind: Literal["loss_reduction"] = "loss_reduction"
    prior: str | None = Field(None, description="folder of a causal model of the corpus, or hf://org/name[@revision]")
    conditional: str | None = Field(None, description="the same after fine-tuning on the target")
    target: str | list[str] | None = Field(
        None, description="instead of the two: texts to be like, Parquet, .jsonl or .txt; the pair is trained"
    )
    target_text: str = Field("text", description="column of the target files that holds the text")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of the target that says when to stop; 0: no early stop")
    train: Training = Field(Training(), description="how the prior is trained")
    tune_steps: int = Field(200, ge=0, description="batches of the target to fine-tune on, at the most")
    tune_lr: float = Field(1e-3, gt=0, description="highest learning rate of the fine-tuning")
    max_tokens: int = Field(512, ge=2, description="tokens of a row that count; no more than the model's context")
    shrink: float = Field(0, ge=0, description="T0: scores of T tokens are multiplied by T / (T + T0)")
    mask: float | None = Field(None, gt=0, le=1, description="share of all tokens to mark for training (Rho-1: 0.6)")

    @model_validator(mode="after")
    def _one_pair(self) -> Self:
        check_installed("scores.loss_reduction", "models", "torch", "transformers", "safetensors")
        if self.target is None and None in (self.prior, self.conditional):
            raise ValueError("give either `prior` and `conditional` (models), or `target` (texts to train a pair for)")
        if self.target is not None and (self.prior or self.conditional):
            raise ValueError("`target` trains the pair: remove `prior` and `conditional`, or `target`")
        if self.target is None and (unused := self.model_fields_set.intersection(TUNING)):
            raise ValueError(f"the models are trained already: remove {', '.join(sorted(unused))}")
        for model in (self.prior, self.conditional):
            if model is not None:
                check_model(self.kind, model)
        return self

    def fit(self, run: Run) -> None:
        self._pair(run)

    def support(self, run: Run) -> Sequence[Column]:
        if self.mask is not None and run.config.output.rewrite:
            raise ConfigError(
                f"{self.column_name}.mask marks the tokens of whole texts, and output.rewrite shortens them: remove one"
            )
        pair = self._pair(run)
        longest = min(self.max_tokens, *(context(folder_of(model_source(run, model))) for model in pair))
        return [token_column(run, model, longest) for model in pair]

    @property
    def compares_rows(self) -> bool:
        return self.mask is not None  # the line through the tokens is known once all have their losses

    @property
    def along(self) -> Mapping[str, str]:
        return {} if self.mask is None else {f"{self.column_name}_{MASK.name}": MASK.name}

    def column(self, run: Run) -> Column:
        support = self.support(run)
        (before, *target), (after, *_) = map(losses_of, support)
        inputs = (before, after, *target)
        line = None if self.mask is None else self._line(run, inputs, self.mask)
        identity = fingerprint(type(self).__name__, self.version, self.shrink, *([line.fingerprint] if line else []))
        fields = FIELDS if line is None else FIELDS.append(MASK)
        # The actor of the models, so that the score is filled in the same pass as they.
        return Column(
            self.column_name, inputs, fields, partial(_open, self.shrink, line), identity, support[0].resources
        )

    def _line(self, run: Run, inputs: tuple[str, ...], share: float) -> Artifact:
        """Artifact `<name>-mask`: `mask.json` with the lowest bin of excess that is kept."""
        name = f"{self.column_name}-mask"
        identity = fingerprint("mask", self.version, share, run.identity(*inputs))
        state = run.aggregate(Excess(*inputs), name) if needs_fit(run, name, identity) else {}
        return run.artifact(name, identity, partial(_draw_line, state, share), resources=None)

    def _pair(self, run: Run) -> tuple[str | Artifact, str | Artifact]:
        """Prior and conditional; trained once, found again by their fingerprints. Raises ConfigError."""
        if self.prior is not None and self.conditional is not None:
            tokenizers = [_tokenizer(folder_of(model_source(run, m))) for m in (self.prior, self.conditional)]
            if tokenizers[0] != tokenizers[1]:
                raise ConfigError(
                    f"{self.column_name}: {self.prior} and {self.conditional} have different tokenizers, so their "
                    "losses are of different tokens: take a conditional model that was fine-tuned from the prior"
                )
            return self.prior, self.conditional
        files = locate(listed(self.target), f"{self.column_name}.target")
        role, chat = f"{self.column_name}.target", run.layout.chat
        examples = read_conversations(files, chat, role) if chat else read_targets(files, self.target_text, role)
        held_out = math.ceil(self.holdout * len(examples))
        if held_out == len(examples):
            raise ConfigError(
                f"{self.column_name}: the target set has one distinct text, so none can be held out to say when to "
                "stop: give more, or set holdout: 0 and the number of tune_steps"
            )
        before = prior(run, f"{self.column_name}-prior", self.train)
        tuning = Tuning(held_out, self.tune_steps, self.train.batch, self.tune_lr, seed_of(run, self.train))
        told = [] if self.target_text == "text" or chat else [self.target_text]
        name = f"{self.column_name}-conditional"
        identity = fingerprint("conditional", self.version, before.fingerprint, identify(files), *told, vars(tuning))
        if needs_fit(run, name, identity):
            warn_contained(run, examples["text"].combine_chunks(), role)
        gpu = run.config.engine.gpus > 0
        return before, run.artifact(name, identity, partial(_tune, tuning, before, examples, gpu), neural(run))


def _tokenizer(folder: Path) -> Any:
    """What decides on tokens in a folder's tokenizer.json."""
    found = json.loads((folder / "tokenizer.json").read_text())
    return {key: value for key, value in found.items() if key not in ("padding", "truncation")}


@dataclass(frozen=True)
class Tuning:
    """How the conditional is made of the prior; `held_out` counts texts."""

    held_out: int
    steps: int
    batch: int
    lr: float
    seed: int


def _tune(tuning: Tuning, before: Artifact, examples: pa.Table, gpu: bool, directory: Path) -> None:
    """Fine-tune the prior and keep it as it was when the held-out loss was lowest, which may be before any step."""
    import torch

    torch.set_num_threads(threads.cpus())
    model, tokenizer = load_causal(before.local())
    model = model.to("cuda" if gpu else "cpu")
    backend, length = tokenizer.backend_tokenizer, model.config.max_position_embeddings
    encoder = Encoder(tokenizer, LONGEST)
    read = encoder.read({name: examples[name].combine_chunks() for name in examples.column_names})
    backend.no_truncation()
    tokens = np.split(read.ids, read.offsets[1:-1])
    answers = None if read.target is None else np.split(read.target, read.offsets[1:-1])

    def packed(rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Blocks of some of the texts, and which of their tokens are learnt."""
        return pack(tokens[rows], length, 0), None if answers is None else pack(answers[rows], length, 1) > 0

    blocks, counts = packed(slice(tuning.held_out, None))
    looks: list[tuple[int, float]] = []
    best = {name: value.clone() for name, value in model.state_dict().items()}
    if tuning.held_out:
        watched, heard = packed(slice(tuning.held_out))
        watched, heard = watched[:HELD_OUT_BLOCKS], None if heard is None else heard[:HELD_OUT_BLOCKS]
        looks.append((0, lm_loss(model, watched, counts=heard)))

    def stop(step: int) -> bool:
        nonlocal best
        if not looks or (step % max(1, tuning.steps // LOOKS) and step < tuning.steps):
            return False
        loss = lm_loss(model, watched, counts=heard)
        if loss < min(known for _, known in looks):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        looks.append((step, loss))
        return len(looks) - 1 - int(np.argmin([known for _, known in looks])) >= PATIENCE

    losses = train_lm(model, blocks, tuning.steps, tuning.batch, tuning.lr, tuning.seed, stop=stop, counts=counts)
    if looks:
        model.load_state_dict(best)
    step = min(looks, key=lambda look: look[1])[0] if looks else len(losses)
    if step == 0:
        log.warning("loss_reduction: the target got no easier by fine-tuning: every score will be 0")
    save_lm(model, backend, directory)
    facts = {
        "texts": len(examples) - tuning.held_out,
        "tokens": blocks.size,
        "held_out_texts": tuning.held_out,
        "held_out_losses": [[step, round(loss, 4)] for step, loss in looks],
        "losses": [round(float(x), 4) for x in losses],
        "step": step,
    }
    (directory / FACTS).write_text(json.dumps(facts, indent=2))


def _draw_line(state: State, share: float, directory: Path) -> None:
    if not state:
        raise CorpusError("loss_reduction: no row has a loss; see quarantine/ for the reasons")
    tokens = state["tokens"]
    lowest = lowest_bin(tokens, share)
    facts = {"lowest_bin": lowest, "tokens": int(tokens.sum()), "kept": int(tokens[lowest:].sum())}
    (directory / LINE).write_text(json.dumps(facts, indent=2))


def _open(shrink: float, line: Artifact | None) -> Transform:
    lowest = None if line is None else json.loads((line.local() / LINE).read_text())["lowest_bin"]

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        prior, conditional, *target = batch.columns
        before, tokens = row_losses(prior, *target)
        after, _ = row_losses(conditional, *target)
        values = reduction(before, after, tokens, shrink)
        found = pa.record_batch([values, before, after, tokens], names=FIELDS.names).cast(FIELDS)
        if lowest is None:
            return found
        there = prior.value_lengths().to_numpy().astype(np.int64)
        return found.append_column(MASK, masks(excess(prior, conditional), there, lowest, *map(as_mask, target)))

    return score


def reduction(prior: np.ndarray, conditional: np.ndarray, tokens: np.ndarray, shrink: float = 0) -> np.ndarray:
    """Score of n rows from their losses in nats a token; see the module."""
    return np.asarray((prior - conditional) * (tokens / (tokens + shrink)))
