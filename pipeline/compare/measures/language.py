"""Bits per byte of held-out texts, and how far a pruned model's predictions lie from the dense one's.

A text's bits per byte are `sum -log2 p(token) / UTF-8 bytes`, every token predicted, the first after the prefix token.
Long texts run in windows of the model's context, each of which starts with the last token of the one before. Bytes do
not depend on the vocabulary, so trimmed ones compare; a tokenizer that cannot spell a text is refused, for its unknown
tokens would be cheap.

The value of an item is its own rate, so the mean is over texts, not over bytes: short ones count as much as long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compare.measures.base import (
    Measured,
    batches,
    context_length,
    encode,
    evaluating,
    prefix,
    token_values,
)
from pipeline.errors import ConfigError, TamisError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer


def bits_per_byte(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], domain: str) -> list[Measured]:
    """Measure `bits_per_byte.<domain>`, an item a text."""
    rows, owner = _windows(model, tokenizer, texts, domain)
    bits = np.zeros(len(texts))
    for (logp, _), text in zip(token_values(model, rows), owner, strict=True):
        bits[text] -= logp.sum(dtype=np.float64) / np.log(2)
    size = np.array([len(text.encode()) for text in texts])
    return [Measured(f"bits_per_byte.{domain}", "language", bits / size, False)]


def divergence(
    dense: nn.Module, pruned: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], name: str = "kl"
) -> Measured:
    """KL(dense || pruned) of next-token distributions, nats a token; an item a text. They must share a vocabulary."""
    if dense.config.vocab_size != pruned.config.vocab_size:
        raise ConfigError(
            f"vocabularies of {dense.config.vocab_size} and {pruned.config.vocab_size} tokens have no divergence: "
            "compare models of different vocabularies by bits per byte"
        )
    total, count = np.zeros(len(texts)), np.zeros(len(texts))
    rows, owner = _windows(dense, tokenizer, texts, name)
    with evaluating(dense), evaluating(pruned):
        for members, ids in batches(dense, rows):
            ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (dense, pruned))
            for i, member in enumerate(members):
                end = len(rows[member]) - 1
                each = kl(ours[i, :end].float(), theirs[i, :end].float())
                total[owner[member]] += float(each.double().sum())
                count[owner[member]] += end
    return Measured(name, "language", total / count, False)


def kl(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """KL(softmax(dense) || softmax(pruned)) of logits (n, vocab); (n,) nats."""
    from torch.nn.functional import log_softmax

    p, q = log_softmax(dense, -1), log_softmax(pruned, -1)
    return (p.exp() * (p - q)).sum(-1)


def _windows(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], name: str
) -> tuple[list[list[int]], list[int]]:
    """Rows of ids in which every token of every text is predicted once, and the text that each is of."""
    if not texts or not all(texts):
        raise TamisError(f"{name}: a text is empty, or there is none")
    start, length = prefix(tokenizer), context_length(model)
    rows, owner = [], []
    for i, ids in enumerate(encode(tokenizer, texts)):
        if (unknown := tokenizer.unk_token_id) is not None and unknown in ids:
            raise ConfigError(f"{name}: the tokenizer cannot spell text {i}: what it does not know would cost nothing")
        whole = [start, *ids]
        windows = range(0, len(ids), length - 1)
        rows += [whole[at : at + length] for at in windows]
        owner += [i] * len(windows)
    return rows, owner
