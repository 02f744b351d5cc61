"""Bits per byte of held-out texts, and how far a pruned model's predictions lie from the dense one's.

A text's bits per byte are `sum -log2 p(token) / UTF-8 bytes`, every token predicted, the first after the prefix token.
Long texts run in windows of the model's context, each of which starts with the last token of the one before. Bytes do
not depend on the vocabulary, so trimmed ones compare; a tokenizer that cannot spell a text is refused, for its unknown
tokens would be cheap.

The value of an item is its own rate, so the mean is over texts, not over bytes: short ones count as much as long ones.

Of a conversation the responses count, with what a template ends them by: their tokens, over their bytes. Its prompts
are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa

from pipeline.compare.measures.base import (
    Measured,
    batches,
    context_length,
    encode,
    evaluating,
    prefix,
    token_values,
)
from pipeline.compress.documents import read_ids, response_bytes, tokens_of
from pipeline.errors import ConfigError, TamisError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer

Documents: TypeAlias = Sequence[str] | pa.StructArray
"""Texts, or conversations (`pipeline.compress.documents`)."""


def bits_per_byte(model: nn.Module, tokenizer: Tokenizer, documents: Documents, domain: str) -> list[Measured]:
    """Measure `bits_per_byte.<domain>`, an item a document."""
    windows = _windows(model, tokenizer, documents, domain)
    bits = np.zeros(len(documents))
    for (logp, _), item, counts in zip(token_values(model, windows.rows), windows.owner, windows.counts, strict=True):
        bits[item] -= logp.sum(dtype=np.float64, where=counts) / np.log(2)
    return [Measured(f"bits_per_byte.{domain}", "language", bits / _bytes(documents), False)]


def divergence(
    dense: nn.Module, pruned: nn.Module, tokenizer: Tokenizer, documents: Documents, name: str = "kl"
) -> Measured:
    """KL(dense || pruned) of next-token distributions, nats a token that counts; an item a document.

    Raises ConfigError for models of different vocabularies.
    """
    if dense.config.vocab_size != pruned.config.vocab_size:
        raise ConfigError(
            f"vocabularies of {dense.config.vocab_size} and {pruned.config.vocab_size} tokens have no divergence: "
            "compare models of different vocabularies by bits per byte"
        )
    total, count = np.zeros(len(documents)), np.zeros(len(documents))
    windows = _windows(dense, tokenizer, documents, name)
    rows, owner = windows.rows, windows.owner
    with evaluating(dense), evaluating(pruned):
        for members, ids in batches(dense, rows):
            ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (dense, pruned))
            for i, member in enumerate(members):
                end = len(rows[member]) - 1
                each = kl(ours[i, :end].float(), theirs[i, :end].float()).double().cpu().numpy()
                counts = np.broadcast_to(windows.counts[member], end)
                total[owner[member]] += each.sum(where=counts)
                count[owner[member]] += counts.sum()
    return Measured(name, "language", total / count, False)


def kl(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """KL(softmax(dense) || softmax(pruned)) of logits (n, vocab); (n,) nats."""
    from torch.nn.functional import log_softmax

    p, q = log_softmax(dense, -1), log_softmax(pruned, -1)
    return (p.exp() * (p - q)).sum(-1)


@dataclass
class Windows:
    """Rows of ids in which every token of every document is predicted once, the document that each is of, and which of
    the predicted tokens count (True: all)."""

    rows: list[list[int]] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    counts: list[np.ndarray | bool] = field(default_factory=list)


def _windows(model: nn.Module, tokenizer: Tokenizer, documents: Documents, name: str) -> Windows:
    if not len(documents) or not _bytes(documents).all():
        raise TamisError(f"{name}: a text or a response is empty, or there is none")
    start, length = prefix(tokenizer), context_length(model)
    found = Windows()
    for i, (ids, counts) in enumerate(_encoded(tokenizer, documents)):
        if (unknown := tokenizer.unk_token_id) is not None and unknown in ids:
            raise ConfigError(f"{name}: the tokenizer cannot spell text {i}: what it does not know would cost nothing")
        whole = [start, *ids]
        for at in range(0, len(ids), length - 1):
            found.rows.append(whole[at : at + length])
            found.owner.append(i)
            found.counts.append(True if counts is None else counts[at : at + length - 1])
    return found


def _encoded(tokenizer: Tokenizer, documents: Documents) -> Iterator[tuple[list[int], np.ndarray | None]]:
    """Ids of every document, and which of them count."""
    if isinstance(documents, pa.StructArray):
        yield from ((read_ids(ids).tolist(), ids >= 0) for ids in tokens_of(documents, tokenizer))
    else:
        yield from ((ids, None) for ids in encode(tokenizer, documents))


def _bytes(documents: Documents) -> np.ndarray:
    if isinstance(documents, pa.StructArray):
        return response_bytes(documents)
    return np.array([len(text.encode()) for text in documents])
