"""What influence scores share: a target set, a causal LM that reads rows, and what its gradients say of them.

A row's loss is the mean over the tokens that count: all but the first, or with a `prompt` those of the text alone. In a
corpus of instructions they are those of the responses, and the target set holds conversations in the same columns.
Where no token counts (one token, or a prompt that fills `max_tokens`) there is no gradient: the score is 0 and the
field `rule` says so. A gradient that is not finite sends the row to quarantine.

float32 on CPUs; on GPUs the model runs in bfloat16 and the products are float32. What runs beside a row changes its
score by float noise only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.corpus.chat import Chat
from pipeline.corpus.text import clean_text
from pipeline.engine import threads
from pipeline.errors import ConfigError
from pipeline.models.causal import MAX_CHARS, Scorer, context, groups
from pipeline.models.gradients import backward, head, linear_layers, outer
from pipeline.models.projection import CountSketch, Rademacher
from pipeline.recipe import QUARANTINE, Resources, fingerprint
from pipeline.scores._contamination import warn_contained
from pipeline.scores._seeds import identify, locate, read_columns
from pipeline.scores._targets import read_conversations
from pipeline.scores.base import Score

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32()), ("rule", pa.string()), (QUARANTINE, pa.string())])
BATCH_ROWS = 256
PROMPT = "prompt"
"""What `Reader.read` takes beside the references of a row: what stands before the text."""
OUTER_BYTES = 1 << 28
"""Gradients of one layer that are held at once."""
MASKED, NOT_FINITE = "no token counts", "gradient is not finite"

Projection = CountSketch | Rademacher
Direction = Callable[[str, "torch.Tensor"], "torch.Tensor"]
"""What is projected in a gradient's place, by the layer's name: (n, p) to (n, p)."""


class Influence(Score):
    """Base of the criteria that ask how training on a row would change the loss on a target set."""

    target: str | list[str] = Field(description="texts whose loss is to fall: Parquet, .jsonl or .txt files")
    target_text: str = Field("text", description="column of the target files that holds the text")
    subtask: str | None = Field(None, description="column of the target files that names a subtask (default: one task)")
    pool: Literal["max", "mean", "top2"] = Field(
        "max", description="how the scores by subtask become one: the best, their mean, the mean of the best two"
    )
    prompt: str | None = Field(
        None, description="column, of corpus and target, of what stands before the text and does not count as loss"
    )
    max_tokens: int = Field(2048, ge=2, description="tokens of a row that are read, prompt included")
    seed: int | None = Field(None, description="seed of samples and projections (default: the run's)")

    def inputs(self, run: Run) -> tuple[str, ...]:
        """References of what a model reads of a row. Raises ConfigError where the corpus has no such prompt."""
        if self.prompt is None:
            return run.layout.spoken
        if run.layout.chat is not None:
            raise ConfigError(
                f"{self.column_name}.prompt: corpus says what the responses answer: remove the prompt here"
            )
        if self.prompt not in run.schema.names:
            there = ", ".join(run.schema.names)
            raise ConfigError(f"{self.column_name}.prompt: the corpus has no column {self.prompt!r}; it has {there}")
        return ("text", f"corpus.{self.prompt}")

    def target_set(self, run: Run) -> Target:
        files = tuple(locate([self.target] if isinstance(self.target, str) else self.target, self._role))
        return Target(files, self.target_text, self.prompt, self.subtask, self._role, run.layout.chat)

    def warn_contained(self, run: Run, target: Target) -> None:
        warn_contained(run, target.read().texts, self._role)

    @property
    def _role(self) -> str:
        return f"{self.column_name}.target"

    def seed_of(self, run: Run) -> int:
        return run.seed if self.seed is None else self.seed


@dataclass(frozen=True)
class Examples:
    """Texts (large_string), prompts (None where there are none), and number of the subtask of each; (n,).

    `chat`: what else a model reads of conversations, by its references.
    """

    texts: pa.Array
    prompts: pa.Array | None
    subtask: np.ndarray
    names: list[str]
    chat: Mapping[str, pa.Array] = field(default_factory=dict)

    @property
    def spoken(self) -> Mapping[str, pa.Array]:
        """What `Reader.read` takes."""
        return {"text": self.texts, **self.chat, **({} if self.prompts is None else {PROMPT: self.prompts})}


@dataclass(frozen=True)
class Target:
    """A target set on disk."""

    uris: tuple[str, ...]
    text: str
    prompt: str | None
    subtask: str | None
    role: str
    chat: Chat | None = None

    @property
    def identity(self) -> str:
        told = [self.chat.identity] if self.chat else []
        return fingerprint(identify(self.uris), self.text, self.prompt, self.subtask, *told)

    def read(self) -> Examples:
        """Examples with a usable text; a null prompt is empty. Raises ConfigError where there is none."""
        if self.chat is not None:
            also = [self.subtask] if self.subtask else []
            table = read_conversations(self.uris, self.chat, self.role, also)
            chat = {name: table[name].combine_chunks() for name in self.chat.references if name != "text"}
            return Examples(table["text"].combine_chunks(), None, *self._subtasks(table), chat)
        columns = [c for c in (self.text, self.prompt, self.subtask) if c is not None]
        tables = [read_columns(uri, columns, self.role) for uri in self.uris]
        table = pa.concat_tables(tables, promote_options="permissive")
        texts = clean_text(table[self.text].combine_chunks())[0].cast(pa.large_string())
        usable = texts.is_valid()
        texts, table = texts.filter(usable), table.filter(usable)
        if not len(texts):
            raise ConfigError(f"{self.role}: the target set is empty: no text in {', '.join(self.uris)}")
        prompts = None if self.prompt is None else _whole(table[self.prompt].combine_chunks())
        return Examples(texts, prompts, *self._subtasks(table))

    def _subtasks(self, table: pa.Table) -> tuple[np.ndarray, list[str]]:
        if self.subtask is None:
            return np.zeros(len(table), np.int64), [""]
        encoded = _whole(table[self.subtask].combine_chunks()).dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def spoken(batch: pa.RecordBatch, inputs: Sequence[str]) -> dict[str, pa.Array]:
    """What `Reader.read` takes of a batch with the `inputs` of an influence score."""
    row = {name: batch.column(name) for name in inputs if not name.startswith("corpus.")}
    for name in inputs[len(row) :]:
        row[PROMPT] = _whole(batch.column(name))
    return row


def _whole(values: pa.Array) -> pa.Array:
    """Texts as large_string, nulls empty."""
    return pc.fill_null(values.cast(pa.large_string()), "")


@dataclass(frozen=True)
class Tokens:
    """Tokens of n rows: `ids` (N,) int32 between `offsets` (n + 1,), and which of them `counts` (N,) bool."""

    ids: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def counted(self) -> np.ndarray:
        """Tokens of every row that count; int64 (n,)."""
        return np.diff(np.append(0, np.cumsum(self.counts))[self.offsets])

    @property
    def masked(self) -> np.ndarray:
        return np.asarray(self.counted == 0)


class Reader:
    """A causal LM none of whose weights asks for a gradient, and its tokenizer."""

    def __init__(self, folder: Path, max_tokens: int, precision: str = "float32") -> None:
        import torch

        torch.set_num_threads(threads.cpus())
        self.max_tokens = min(max_tokens, context(folder))
        self.scorer = Scorer(folder, self.max_tokens, precision)
        self.model, self.device = self.scorer.model.requires_grad_(False), self.scorer.device

    def read(self, row: Mapping[str, pa.Array]) -> Tokens:
        """The first `max_tokens` tokens of each of n rows, a prompt's before those of its text."""
        if PROMPT not in row:
            found = self.scorer.read(row)
            counts = np.ones(len(found.ids), bool) if found.target is None else found.target
            return Tokens(found.ids, found.offsets, _behind(found.offsets, 1) & counts)
        before, after = (self._encode(row[PROMPT], True), self._encode(row["text"], False))
        rows = [np.asarray([*p, *t][: self.max_tokens], np.int32) for p, t in zip(before, after, strict=True)]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        return Tokens(np.concatenate(rows), offsets, _behind(offsets, np.maximum([len(p) for p in before], 1)))

    def _encode(self, texts: pa.Array, special: bool) -> list[list[int]]:
        cut = pc.utf8_slice_codeunits(texts, 0, MAX_CHARS * self.max_tokens).to_pylist()
        return [e.ids for e in self.scorer.tokenizer.encode_batch_fast(cut, add_special_tokens=special)]

    def batches(self, tokens: Tokens) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Rows with a token that counts (indices), their ids (n, T), and weights (n, T - 1) that sum to 1 a row."""
        import torch

        counted, starts = tokens.counted, tokens.offsets[:-1]
        lengths = np.where(counted > 0, np.diff(tokens.offsets), 0)
        for rows, width in groups(lengths, self.scorer.group_tokens):
            place = np.arange(width)
            inside = place < lengths[rows, None]
            where = (starts[rows, None] + place)[inside]
            block, counts = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), bool)
            block[inside], counts[inside] = tokens.ids[where], tokens.counts[where]
            weight = (counts / counted[rows, None]).astype(np.float32)
            yield rows, torch.from_numpy(block).to(self.device), torch.from_numpy(weight[:, 1:]).to(self.device)


@dataclass
class Lens:
    """A model at one checkpoint: whose gradients are asked for, what stands for them, and how to get there."""

    reader: Reader
    layers: Mapping[str, nn.Linear]
    direction: Direction | None = None
    focus: Callable[[], None] = lambda: None
    """Puts the checkpoint's weights in place, where several share one model."""

    def sketches(self, tokens: Tokens, project: Projection, plain: bool = False) -> np.ndarray:
        """Projected gradients of n rows, or of their directions unless `plain`; (n, size) float32, 0 where masked."""
        import torch

        self.focus()
        out = np.zeros((tokens.rows, project.size), np.float32)
        for rows, ids, weight in self.reader.batches(tokens):
            sums = torch.zeros(len(rows), project.size, device=ids.device)

            def take(layer: str, a: torch.Tensor, b: torch.Tensor, sums: torch.Tensor = sums) -> None:
                step = max(1, OUTER_BYTES // (4 * a.shape[2] * b.shape[2]))
                for part in map(slice, range(0, len(a), step), range(step, len(a) + step, step)):
                    gradient = outer(a[part], b[part])
                    if self.direction is not None and not plain:
                        gradient = self.direction(layer, gradient)
                    project.add(layer, gradient, sums[part])

            backward(self.reader.model, self.layers, ids, weight, take)
            out[rows] = sums.cpu().numpy()
        return out


def _behind(offsets: np.ndarray, first: int | np.ndarray) -> np.ndarray:
    """Tokens (N,) of rows between offsets (n + 1,) that stand at `first` of their row or behind."""
    lengths = np.diff(offsets)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return np.asarray(place >= np.repeat(np.broadcast_to(first, lengths.shape), lengths))


def layers_of(model: Any, which: str) -> dict[str, nn.Linear]:
    """`last`: the layer that gives logits; `full`: all linear layers."""
    return head(model) if which == "last" else linear_layers(model)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows divided by their norm; a row of zeros stays one."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(np.divide(x, norms, out=np.zeros_like(x), where=norms != 0))


def check_aims(examples: Examples, counts: np.ndarray, role: str) -> np.ndarray:
    """Weight of every example in the mean of its subtask, 0 where no token counts; (n,).

    Raises ConfigError for a subtask in which no token counts.
    """
    rows = np.bincount(examples.subtask[counts], minlength=len(examples.names))
    if (empty := np.flatnonzero(rows == 0)).size:
        name = examples.names[empty[0]]
        raise ConfigError(f"{role}: no token counts in the examples of subtask {name!r}: raise max_tokens or remove it")
    return np.asarray(np.where(counts, 1 / rows[examples.subtask], 0))


def subtask_means(values: np.ndarray, examples: Examples, counts: np.ndarray, role: str) -> np.ndarray:
    """Mean of (n, s) values over the examples of each subtask that count; (subtasks, s) float32.

    Raises ConfigError for a subtask without any, or for a value that is not finite.
    """
    share = check_aims(examples, counts, role)
    if not np.isfinite(values).all():
        raise ConfigError(f"{role}: the gradient of an example is not finite: the model cannot be used on it")
    sums = np.zeros((len(examples.names), values.shape[1]))
    np.add.at(sums, examples.subtask, values * share[:, None])
    return sums.astype(np.float32)


def pooled(scores: np.ndarray, pool: str) -> np.ndarray:
    """One score a row of (n, subtasks): the best, the mean, or the mean of the best two."""
    if pool == "mean":
        return np.asarray(scores.mean(axis=1))
    return np.asarray(np.sort(scores, axis=1)[:, -(2 if pool == "top2" else 1) :].mean(axis=1))


def scored(scores: np.ndarray, masked: np.ndarray) -> pa.RecordBatch:
    """The column's values: scores (n,), 0 with a rule where nothing counts, refused where they are not finite."""
    finite = np.isfinite(scores)
    why = pa.array(np.full(len(scores), NOT_FINITE), mask=finite)
    values = pa.array(np.where(finite, scores, 0).astype(np.float32), mask=~finite)
    return pa.record_batch([values, pa.array(np.where(masked, MASKED, ""), pa.string()), why], schema=FIELDS)


def engine_resources(run: Run) -> tuple[Resources, str]:
    """What a neural column reserves, and the precision that it runs in."""
    engine = run.config.engine
    return Resources(cpus=engine.cpus, gpus=engine.gpus), "bfloat16" if engine.gpus else "float32"
