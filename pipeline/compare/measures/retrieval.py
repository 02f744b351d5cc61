"""Retrieval from the context: the value of a key, and the second half of a text whose first half was seen.

Both are made up from syllables and digits by a seed, so no model knows them and every vocabulary spells them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.compare.measures.base import Measured, continued

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer

SYLLABLES = np.array([c + v for c in "bdfgklmnprstvz" for v in "aeiou"])


def words(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct made-up words of three syllables."""
    codes = rng.choice(len(SYLLABLES) ** 3, count, replace=False)
    n = len(SYLLABLES)
    return [str(SYLLABLES[c // n**2] + SYLLABLES[c // n % n] + SYLLABLES[c % n]) for c in codes]


def key_value_items(count: int, pairs: int = 8, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts that list `pairs` keys with numbers of four digits and ask for one of them, and its number."""
    rng = np.random.default_rng([seed, 1])
    items = []
    for _ in range(count):
        keys, values = words(rng, pairs), rng.choice(np.arange(1000, 10_000), pairs, replace=False)
        asked = int(rng.integers(pairs))
        listed = "".join(f"{k}: {v}\n" for k, v in zip(keys, values, strict=True))
        items.append((f"{listed}\n{keys[asked]}:", f" {values[asked]}"))
    return items


def copy_items(count: int, length: int = 16, seed: int = 0) -> list[tuple[str, str]]:
    """`length` made-up words with the first of their repetition, and the rest of it."""
    rng = np.random.default_rng([seed, 2])
    lists = (words(rng, length) for _ in range(count))
    return [(f"{' '.join(w)} {w[0]}", f" {' '.join(w[1:])}") for w in lists]


def retrieval(
    model: nn.Module, tokenizer: Tokenizer, count: int, pairs: int = 8, length: int = 16, seed: int = 0
) -> list[Measured]:
    """Measures `key_value` (1 where greedy decoding writes the value), `key_value.bits` (bits per byte of it) and
    `copy` (share of the repetition's tokens that are the most likely ones)."""
    asked = continued(model, tokenizer, key_value_items(count, pairs, seed))
    copied = continued(model, tokenizer, copy_items(count, length, seed))
    return [
        Measured("key_value", "retrieval", (asked.right == 1).astype(float), True),
        Measured("key_value.bits", "retrieval", asked.bits_per_byte, False),
        Measured("copy", "retrieval", copied.right, True),
    ]
