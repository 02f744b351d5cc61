"""How much of a text repeats itself, lines and n-grams of words, as Gopher measures it (Rae et al. 2021, table A1).

Sorting 64-bit keys of (text, digest) brings repeats together. Most texts are far below every limit: an upper bound
from two sorts acquits them, and only the suspects are measured exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.textrules.docs import Docs, Spans, groups, mix
from pipeline.textrules.words import Words

_STEP = 0xC2B2AE3D27D4EB4F


def duplicates(docs: Docs, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Spans that an equal span of the same text precedes, and their characters; shape (texts,) each."""
    keys = groups(spans.docs, docs.digests(spans.starts, spans.ends))
    order = np.argsort(keys)
    repeats = spans[order[1:][keys[order[1:]] == keys[order[:-1]]]]
    return docs.tally(repeats.docs), docs.tally(repeats.docs, repeats.lengths)


def top_grams(
    docs: Docs, words: Words, limits: Mapping[int, float], among: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """For each n: those among the texts in which the most frequent n-gram takes more than its share of the characters.

    A text is named once, at the first n. The words of an n-gram count as joined by spaces; of n-grams equally
    frequent, the first counts.
    """
    if not limits:
        return
    size = np.maximum(docs.lengths, 1)
    most = _most_frequent(words, min(limits))  # bounds the count of any longer n-gram
    for n, limit in limits.items():
        suspects = among & (most * (_longest(words, n) + n - 1) / size > limit)
        over = np.zeros(len(docs), bool)
        if suspects.any():
            over = _top_chars(_grams(_words_of(words, suspects), n), len(docs)) / size > limit
        among = among & ~over
        yield n, over


def duplicate_grams(
    docs: Docs, words: Words, limits: Mapping[int, float], among: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """For each n: those among the texts in which repeated n-grams take more than their share of the characters.

    Repeats are taken from left to right without overlap, their words joined without spaces. A text is named once.
    """
    if not limits:
        return
    shortest, loosest = min(limits), min(limits.values())
    # A repeated n-gram is made of repeated shorter ones, so what those cover bounds every n.
    covered = _repeats(words, shortest) * _longest(words, shortest)
    size = np.maximum(docs.lengths, 1)
    suspects = among & (covered / size > loosest)
    for n, limit in limits.items():
        over = np.zeros(len(docs), bool)
        if suspects.any():
            over[_repeat_more(_grams(_words_of(words, suspects), n), size, limit)] = True
        suspects &= ~over
        yield n, over


@dataclass(frozen=True)
class _Grams:
    """The n-grams of every text, in order."""

    n: int
    at: np.ndarray
    """Index of the first word."""
    docs: np.ndarray
    keys: np.ndarray
    """Equal for equal n-grams of one text; sorted by text."""
    sizes: np.ndarray
    """Characters of all words before a word; shape (words + 1,)."""

    @property
    def chars(self) -> np.ndarray:
        """Characters of the words of each n-gram."""
        chars: np.ndarray = self.sizes[self.at + self.n] - self.sizes[self.at]
        return chars


def _keys(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A key for each n-gram, and which word it begins with (a mask)."""
    count = max(len(words) - n + 1, 0)
    keys = np.zeros(count, np.uint64)
    for place in range(n):
        keys += words.digests[place : place + count] * np.uint64(pow(_STEP, place + 1, 2**64))
    begins = words.docs[:count] == words.docs[n - 1 : n - 1 + count]
    return groups(words.docs[:count][begins], mix(keys[begins])), begins


def _grams(words: Words, n: int) -> _Grams:
    keys, begins = _keys(words, n)
    at = np.flatnonzero(begins)
    return _Grams(n, at, words.docs[at], keys, np.append(0, np.cumsum(words.lengths)))


def _words_of(words: Words, docs: np.ndarray) -> Words:
    """The words of the texts where a mask is true; texts keep their numbers."""
    which = docs[words.docs]
    first = np.append(0, np.cumsum(np.where(docs, words.counts, 0)))
    return Words(
        words.starts[which], words.ends[which], words.docs[which], words.digests[which], words.kinds[which], first
    )


def _longest(words: Words, n: int) -> np.ndarray:
    """Characters of the longest n-gram of every text, 0 where it has none; shape (texts,)."""
    sizes = np.append(0, np.cumsum(words.lengths))
    first, stop = words.first[:-1], words.first[1:] - n + 1
    has_one = first < stop
    longest = np.zeros(len(first), np.int64)
    if has_one.any():
        # Pairs of bounds: the even segments are the n-grams of a text, the odd ones run over into the next.
        bounds = np.column_stack([first[has_one], stop[has_one]]).ravel()
        chars = np.append(sizes[n:] - sizes[:-n], 0)
        longest[has_one] = np.maximum.reduceat(chars, bounds)[::2]
    return longest


def _runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the runs of equal values."""
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    return starts, np.diff(starts, append=len(keys))


def _most_frequent(words: Words, n: int) -> np.ndarray:
    """How often the most frequent n-gram of every text occurs; shape (texts,)."""
    keys, _ = _keys(words, n)
    keys.sort()
    starts, lengths = _runs(keys)
    many = lengths > 1
    most = (words.counts >= n).astype(np.int64)
    np.maximum.at(most, _docs_of(keys[starts[many]]), lengths[many])
    return most


def _repeats(words: Words, n: int) -> np.ndarray:
    """How many n-grams of every text occur before in it; shape (texts,)."""
    keys, _ = _keys(words, n)
    keys.sort()
    return np.bincount(_docs_of(keys[1:][keys[1:] == keys[:-1]]), minlength=len(words.first) - 1)


def _docs_of(keys: np.ndarray) -> np.ndarray:
    return (keys >> np.uint64(48)).astype(np.int64)


def _top_chars(grams: _Grams, docs: int) -> np.ndarray:
    """Characters that the most frequent n-gram takes in every text, spaces between its words included."""
    order = np.argsort(grams.keys)
    starts, counts = _runs(grams.keys[order])
    first = np.minimum.reduceat(order, starts)
    owner = grams.docs[first]
    most = np.zeros(docs, np.int64)
    np.maximum.at(most, owner, counts)
    winners = counts == most[owner]
    chosen = np.full(docs, len(order))
    np.minimum.at(chosen, owner[winners], first[winners])
    chars: np.ndarray = most * np.append(grams.chars + grams.n - 1, 0)[chosen]
    return chars


def _repeat_more(grams: _Grams, sizes: np.ndarray, limit: float) -> list[int]:
    """Texts whose repeated n-grams have more than a share of their characters; `sizes`: those, shape (texts,)."""
    if not len(grams.at):
        return []
    order = np.argsort(grams.keys)
    starts, counts = _runs(grams.keys[order])
    gram = np.empty(len(order), np.int64)
    gram[order] = np.repeat(np.arange(len(starts)), counts)
    again = np.ones(len(order), bool)
    again[np.minimum.reduceat(order, starts)] = False

    # What repeats cover, overlaps counted once, is at least what is taken without overlap.
    edges = np.zeros(len(grams.sizes), np.int32)
    np.add.at(edges, grams.at[again], 1)
    np.subtract.at(edges, grams.at[again] + grams.n, 1)
    inside = np.cumsum(edges[:-1]) > 0
    words_docs = np.zeros(len(grams.sizes) - 1, np.int64)
    words_docs[grams.at] = grams.docs
    for offset in range(1, grams.n):
        words_docs[grams.at + offset] = grams.docs
    covered = np.bincount(words_docs[inside], np.diff(grams.sizes)[inside], minlength=len(sizes))

    # What is left is sequential by definition: a repeat hides the n-grams that it overlaps. Those that occur once
    # hide nothing and are passed over.
    often = (counts > 1)[gram] & (covered / sizes > limit)[grams.docs]
    owner, chars = grams.docs[often], grams.chars[often]
    bounds = np.append(np.flatnonzero(np.diff(owner, prepend=-1)), len(owner)).tolist()
    at, ids, lengths = grams.at[often].tolist(), gram[often].tolist(), chars.tolist()
    over = []
    for start, stop in pairwise(bounds):
        seen: set[int] = set()
        free, taken = 0, 0
        for word, name, size in zip(at[start:stop], ids[start:stop], lengths[start:stop], strict=True):
            if word < free:
                continue
            if name in seen:
                taken += size
                free = word + grams.n
            seen.add(name)
        if taken / sizes[owner[start]] > limit:
            over.append(int(owner[start]))
    return over
