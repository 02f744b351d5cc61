"""Vocabulary: tokens that a corpus hardly uses go from embedding, head and tokenizer.

In small models the embedding is large: 21 % of SmolLM2-135M, 27.6 % of Qwen2.5-0.5B. Kept are the most frequent tokens
that cover `coverage` of the corpus's, what they are merged from, all bytes and all special tokens, so every text can
still be written (`pipeline.compress.steps._tokenizer`); a rare word takes more tokens. Not lossless: compare models in
bits per byte, never per token. The idea is ours; VocabTrim's head of a drafter is in `pipeline.compress.steps._draft`.

Counts come from `corpus` (a curated run or Parquet files), without it from the calibration data, which then have to
be many: what does not occur goes. The calibration's rows are rewritten in the new tokens and cut to their length, for
the steps after. `Outcome.vocabulary` holds the kept ids; `trimmed_fast(tokenizer, vocabulary)` makes the tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import LABELS, batch_of
from pipeline.compress.data import curated, handoff, parquet
from pipeline.compress.documents import read_ids, tokens_of
from pipeline.compress.steps._tokenizer import closed, rewritten, trimmed
from pipeline.compress.steps.base import Outcome, Step
from pipeline.compress.surgery import keep_tokens
from pipeline.corpus.content import Content
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from pipeline.compress.calibration import Batch, Calibration


class Vocab(Content, Step):
    """Keep the tokens that cover a share of a corpus's tokens, and what no text can be written without.

    Rows of Parquet files are the texts or conversations that the step says.
    """

    kind: Literal["vocab"] = "vocab"
    coverage: float = Field(0.999, gt=0, le=1, description="share of the corpus's tokens that keep their token")
    corpus: str | list[str] | None = Field(None, description="curated run or Parquet files to count in")
    texts: int = Field(100_000, ge=1, description="texts to count in, from the first on")
    tokenizer: str | None = Field(None, description="folder of the tokenizer (default: the one the model came from)")

    def apply(self, model: nn.Module, calibration: Calibration) -> Outcome:
        body = anatomy(model)
        if not body.embedding:
            raise ConfigError(f"vocab: a model of {body.family!r} has no vocabulary")
        old = body.modules[body.embedding].num_embeddings
        tokenizer = self._tokenizer(model)
        backend = tokenizer.backend_tokenizer
        known = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if known > old:
            raise ConfigError(
                f"vocab: the tokenizer has ids up to {known - 1}, the model {old} rows: it is not the model's tokenizer"
            )
        counts = self._counts(tokenizer, calibration, old)
        if counts[known:].any():
            raise ConfigError("vocab: the calibration data have tokens that the tokenizer does not: it made other ids")
        if not counts.any():
            raise ConfigError("vocab: there is no token to count: name a corpus")
        keep = closed(backend, covering(counts, self.coverage))
        parameters = sum(p.numel() for p in model.parameters())
        report: dict[str, Any] = {
            "tokens": f"{len(keep)} of {old}",
            "coverage": float(counts[keep].sum() / counts.sum()),
            "counted": int(counts.sum()),
        }
        if len(keep) < old:
            pieces = rewritten(backend, trimmed(backend, keep), keep)
            report |= _growth(counts, pieces, backend)
            keep_tokens(model, keep)
            calibration.batches = [rewrite(batch, pieces) for batch in calibration.batches]
            calibration.forget()
        report["removed_parameters"] = parameters - sum(p.numel() for p in model.parameters())
        return Outcome(model, vocabulary=keep, report=report)

    def _tokenizer(self, model: nn.Module) -> PreTrainedTokenizerFast:
        from transformers import AutoTokenizer

        folder = self.tokenizer or getattr(model, "name_or_path", "")
        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"vocab: no tokenizer in {folder!r}: set tokenizer to its folder") from error
        if not found.is_fast:
            raise ConfigError(f"vocab: {folder} has no fast tokenizer (tokenizer.json)")
        return found

    def _counts(self, tokenizer: PreTrainedTokenizerFast, calibration: Calibration, size: int) -> np.ndarray:
        """How often each token occurs, (size,) int64."""
        if self.corpus is None:
            rows = (_real(batch).cpu().numpy() for batch in calibration.batches if "input_ids" in batch)
            return sum((np.bincount(ids, minlength=size) for ids in rows), np.zeros(size, np.int64))
        run = isinstance(self.corpus, str) and handoff(self.corpus) is not None
        paths = [self.corpus] if isinstance(self.corpus, str) else self.corpus
        source = curated(paths[0]) if run else parquet(paths, self)
        counts, left = np.zeros(size, np.int64), self.texts
        for documents in source.documents():
            for ids in tokens_of(documents.slice(0, left), tokenizer):
                counts += np.bincount(read_ids(ids), minlength=size)
            left -= len(documents)
            if left <= 0:
                break
        return counts


def covering(counts: np.ndarray, coverage: float) -> np.ndarray:
    """The fewest tokens that make up a share of all, most frequent first, of equal ones the lower id; ids (int64)."""
    order = np.argsort(-counts, kind="stable")
    running = np.cumsum(counts[order])
    # as many as there are before the share is reached, and one more; what never occurs covers nothing
    needed = int(np.searchsorted(running, coverage * running[-1] * (1 - 1e-12))) + 1
    return np.sort(order[: min(needed, int(np.count_nonzero(counts)))])


def rewrite(batch: Batch, pieces: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch in new tokens (`pieces[i]` for token i), each row as many tokens as before: its end falls off."""
    import torch

    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool().cpu().numpy()
    silent = (batch.get(LABELS, ids) < 0).cpu().numpy()
    new = np.zeros(ids.shape, np.int64)
    for row, old, quiet, real in zip(new, ids.cpu().numpy(), silent, mask, strict=True):
        found = [~pieces[t] if q else pieces[t] for t, q in zip(old[real], quiet[real], strict=True)]
        row[real] = np.concatenate(found or [row[:0]])[: real.sum()]
    return {**batch, **batch_of(torch.from_numpy(new).to(ids.device))}


def _real(batch: Batch) -> torch.Tensor:
    """Tokens that are not padding, in a row."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].flatten() if mask is None else batch["input_ids"][mask.bool()]


def _growth(counts: np.ndarray, pieces: list[np.ndarray], backend: Any) -> dict[str, float]:
    """Tokens a byte of the text that was counted, before and after."""
    sizes = np.array([len(p) for p in pieces])
    special = set(backend.get_added_tokens_decoder())
    tokens = (backend.id_to_token(i) or "" for i in range(len(pieces)))
    # in a byte-level vocabulary a character is a byte; special tokens stand for no text
    widths = np.array([0 if i in special else len(token) for i, token in enumerate(tokens)])
    counts = counts[: len(pieces)]
    total = max(1, int(counts @ widths))
    return {"tokens_per_byte": counts.sum() / total, "tokens_per_byte_after": counts @ sizes / total}
