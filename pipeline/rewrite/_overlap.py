"""Likeness of two texts by the words that they share: a cheap stand-in for an embedding or a language model."""

from __future__ import annotations

import re
from collections import Counter

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
"""A character of a script without spaces is a word."""
PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W_a-zA-Z]+")
"""Words of an identifier: `parseHtml_page` has three."""


def counts(text: str, word: re.Pattern[str] = WORD) -> Counter[str]:
    """How often every word is there, in small letters."""
    return Counter(found.lower() for found in word.findall(text))


def cosine(a: Counter[str], b: Counter[str]) -> float:
    """Cosine of two word counts; 0 where one is empty."""
    norms = sum(n * n for n in a.values()) * sum(n * n for n in b.values())
    return float(sum(n * b[word] for word, n in a.items()) / norms**0.5) if norms else 0.0
