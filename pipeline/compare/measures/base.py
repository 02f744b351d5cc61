"""What measures share: a value per item, log-probabilities of texts, greedy answers.

Rows run in groups of one width (`pipeline.models.causal.groups`), so that padding costs little and stands behind a row,
where a causal model does not look; what is generated runs in groups of one length, without any padding. Which rows run
together depends on the items alone: the same items give the same values. Items are texts, so models with other
vocabularies compare. What looks like a special token in a text is read as plain text; only a chat template may use one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import ConfigError, TamisError
from pipeline.models.causal import CHUNK_VALUES, CONTEXTS, GROUP_TOKENS, LOGIT_BYTES, groups

if TYPE_CHECKING:
    import torch
    from torch import nn

    Tokenizer = Any  # PreTrainedTokenizerFast

Axis = Literal["knowledge", "reasoning", "instruction", "retrieval", "language", "geometry", "cost"]
"""The columns of a comparison. Pruning moves them in different directions, so there is no mean over them."""


@dataclass(frozen=True)
class Measured:
    """Values of one measure, (items,) float64, in an order that is the same for every model."""

    name: str
    axis: Axis
    values: np.ndarray
    higher_is_better: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values, np.float64))
        if self.values.ndim != 1 or not self.values.size:
            raise TamisError(f"{self.name}: there is nothing to measure on: values of shape {self.values.shape}")
        if not np.isfinite(self.values).all():
            bad = np.flatnonzero(~np.isfinite(self.values))
            raise TamisError(f"{self.name}: {len(bad)} values are not finite, the first of item {bad[0]}")

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def graded(self) -> bool:
        """Whether items are right (1) or wrong (0), so that flips can be counted."""
        return bool(np.isin(self.values, (0, 1)).all())

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.values, q))


def encode(tokenizer: Tokenizer, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Ids of texts with nothing added; with `special`, names of special tokens in a text are these tokens."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    try:
        backend.encode_special_tokens = not special
        backend.no_padding()
        backend.no_truncation()
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def prefix(tokenizer: Tokenizer) -> int:
    """The token that texts start after: the tokenizer's beginning of a text, or its end."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise ConfigError("the tokenizer has neither a beginning nor an end of a text: set its bos_token or eos_token")
    return int(found)


def context_length(model: nn.Module) -> int:
    """Tokens that a model takes at once."""
    config = model.config
    return int(next((v for name in CONTEXTS if (v := getattr(config, name, None))), 1 << 20))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients or dropout; leaves the model in the mode in which it was."""
    import torch

    was = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was)


def batches(model: nn.Module, rows: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Rows of ids (T >= 2 each) that run together: their indices (n,), and their ids (n, width), 0 behind a row's end.

    A batch's logits take at most `LOGIT_BYTES`, where a row alone does not take more. Raises ValueError for a row of
    one token, which has nothing to predict.
    """
    import torch

    lengths = np.array([len(row) for row in rows], np.int64)
    if len(rows) and lengths.min() < 2:
        raise ValueError("a row of one token has nothing to predict")
    device = next(model.parameters()).device
    for members, width in groups(lengths, max(1, min(GROUP_TOKENS, LOGIT_BYTES // (4 * int(model.config.vocab_size))))):
        width = min(width, max(context_length(model), int(lengths[members].max())))  # padding never leaves the context
        block = np.zeros((len(members), width), np.int64)
        for row, member in zip(block, members, strict=True):
            row[: lengths[member]] = rows[member]
        yield members, torch.from_numpy(block).to(device)


def token_values(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every row of T >= 2 ids: log-probabilities in nats (T - 1,) float32 of tokens 2 to T, and whether each is the
    most likely one (T - 1,) bool."""
    import torch

    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.float32), np.empty(0, bool))] * len(rows)
    with evaluating(model):
        for members, ids in batches(model, rows):
            chunk = max(1, CHUNK_VALUES["cuda" if ids.is_cuda else "cpu"] // int(model.config.vocab_size))
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            logp, best = [], []
            for part, target in zip(logits.split(chunk), ids.roll(-1, dims=1).flatten().split(chunk), strict=True):
                part = part.float()
                logp.append(-torch.nn.functional.cross_entropy(part, target, reduction="none"))
                best.append(part.argmax(-1) == target)
            all_logp, all_best = (torch.cat(v).view(ids.shape).cpu().numpy() for v in (logp, best))
            for i, member in enumerate(members):
                end = len(rows[member]) - 1
                found[member] = (all_logp[i, :end].copy(), all_best[i, :end].copy())
    return found


@dataclass(frozen=True)
class Continued:
    """How likely continuations are after their contexts, (n,) each."""

    logp: np.ndarray
    """Of the whole continuation, nats, float64."""
    right: np.ndarray
    """Share of its tokens that are the most likely ones; 1: greedy decoding writes it."""
    size: np.ndarray
    """UTF-8 bytes of the continuation."""

    @property
    def bits_per_byte(self) -> np.ndarray:
        return np.asarray(-self.logp / (self.size * np.log(2)))


def continued(model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Continued:
    """Score (context, continuation) pairs, as lm-evaluation-harness does.

    Both are encoded in one piece and split where the context's own tokens end; a context's trailing spaces go with the
    continuation; an empty context is the prefix token; what does not fit is cut from the left.
    """
    if not pairs:
        raise TamisError("there is nothing to score")
    contexts = [context.rstrip(" ") for context, _ in pairs]
    wholes = encode(tokenizer, [context + continuation for context, continuation in pairs])
    starts = [len(ids) for ids in encode(tokenizer, contexts)]
    limit, rows, counts = context_length(model), [], []
    for whole, start, (_, continuation) in zip(wholes, starts, pairs, strict=True):
        if not continuation:
            raise ValueError("an empty continuation has no probability")
        row = whole if start else [prefix(tokenizer), *whole]
        counts.append(min(max(1, len(whole) - start), limit - 1))  # a merge over the border may leave none
        rows.append(row[-limit:])
    values = token_values(model, rows)
    return Continued(
        np.array([logp[-n:].sum(dtype=np.float64) for (logp, _), n in zip(values, counts, strict=True)]),
        np.array([best[-n:].mean() for (_, best), n in zip(values, counts, strict=True)]),
        np.array([len(continuation.encode()) for _, continuation in pairs]),
    )


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new: int,
    stop: str = "",
    special: bool = False,
) -> list[str]:
    """What greedy decoding writes after every prompt, up to `max_new` tokens, the end of a text or the string
    `stop`."""
    import torch

    limit = context_length(model) - max_new
    if limit < 1:
        raise ConfigError(f"{max_new} new tokens leave no room in a context of {limit + max_new}")
    rows = [ids[-limit:] or [prefix(tokenizer)] for ids in encode(tokenizer, prompts, special)]
    lengths = np.array([len(row) for row in rows])
    configured = getattr(model.config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    device = next(model.parameters()).device
    written = [""] * len(rows)
    step = max(1, GROUP_TOKENS // (int(lengths.max(initial=1)) + max_new))
    with evaluating(model):
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            for members in (same[i : i + step] for i in range(0, len(same), step)):
                new = _greedy(model, torch.tensor([rows[m] for m in members], device=device), max_new, ends)
                for member, ids in zip(members, new.tolist(), strict=True):
                    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
                    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                    written[member] = text.split(stop)[0] if stop else text
    return written


def _greedy(model: nn.Module, ids: torch.Tensor, max_new: int, ends: set[int]) -> torch.Tensor:
    """New tokens (rows, at most max_new), ties to the lowest id."""
    import torch

    length, cache, new = ids.shape[1], None, []
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    last = torch.tensor(sorted(ends), device=ids.device)
    positions = torch.arange(length, device=ids.device)[None]
    for _ in range(max_new):
        given = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        cache, ids = given.past_key_values, given.logits[:, -1:].argmax(-1)
        positions = positions[:, -1:] + 1
        new.append(ids)
        finished |= torch.isin(ids[:, 0], last)
        if finished.all():
            break
    return torch.cat(new, dim=1)


def instruct(tokenizer: Tokenizer, instruction: str) -> tuple[str, bool]:
    """A prompt that asks for something, in the model's own chat template where it has one, and whether it is one."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": instruction}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)), True
    return f"Instruction: {instruction}\nAnswer:", False
