"""A tiny causal model of a made-up language, for tests of what reads language models."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.models.training import Shape, new_lm, pack, save_lm, train_lm, train_tokenizer

TINY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocab=300, context=64)
TREES = ("alder", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "willow")


BIRDS = ("crane", "dove", "eagle", "finch", "gull", "heron", "jay", "kite", "lark", "owl", "raven", "swift")


def sentences(count: int, seed: int = 0, words: tuple[str, ...] = TREES) -> list[str]:
    """Texts of 2 to 59 of twelve words, each of which has two successors: the next word and the one after it."""
    rng = np.random.default_rng(seed)
    walks = (rng.integers(12) + np.cumsum(rng.integers(1, 3, n)) for n in rng.integers(2, 60, count))
    return [" ".join(words[i % 12] for i in walk) for walk in walks]


def trained(folder: Path, texts: list[str], shape: Shape = TINY, steps: int = 60) -> Path:
    """Train a model on texts and save it."""
    tokenizer = train_tokenizer(texts, shape.vocab)
    model = new_lm(shape, 0)
    train_lm(model, pack([e.ids for e in tokenizer.encode_batch(texts)], shape.context, 0), steps, 8, 3e-3, 0)
    save_lm(model, tokenizer, folder)
    return folder
