"""Exact match of a generated answer: sums, differences and products of small numbers, after four worked ones.

Generation shows what log-likelihoods of given options do not: a pruned model loses arithmetic first.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from pipeline.compare.measures.base import Measured, generate

if TYPE_CHECKING:
    from torch import nn

    from pipeline.compare.measures.base import Tokenizer

SHOTS = "3 + 5 = 8\n12 - 4 = 8\n6 * 2 = 12\n20 + 17 = 37\n"
NUMBER = re.compile(r"\s*(-?\d+)")
MAX_NEW = 8


def problems(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Expressions and their values; a third of each operation, operands up to 99 (products: 9), no negative values."""
    rng = np.random.default_rng([seed, 3])
    found = []
    for i in range(count):
        operation = "+-*"[i % 3]
        a, b = sorted((int(x) for x in rng.integers(1, 10 if operation == "*" else 100, 2)), reverse=True)
        found.append((f"{a} {operation} {b}", {"+": a + b, "-": a - b, "*": a * b}[operation]))
    return found


def arithmetic(model: nn.Module, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Measured]:
    """Measure `arithmetic`: 1 where the first number of the generated line is the value."""
    items = problems(count, seed)
    written = generate(model, tokenizer, [f"{SHOTS}{asked} =" for asked, _ in items], MAX_NEW, stop="\n")
    found = (NUMBER.match(text) for text in written)
    right = [m is not None and int(m[1]) == value for m, (_, value) in zip(found, items, strict=True)]
    return [Measured("arithmetic", "reasoning", np.array(right, float), True)]
