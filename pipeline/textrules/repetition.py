"""How much of a text repeats itself: lines, and n-grams of words, by the measures of Gopher (Rae et al. 2021, table A1).

Sorting 64-bit keys of (text, digest) brings repeats together. Most texts are far below every limit: an upper bound
from two sorts acquits them, and only the suspects are measured exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
    most = _most_frequent(_grams(words, min(limits)), len(docs))  # bounds the count of any longer n-gram
    for n, limit in limits.items():
        allowed = limit * docs.lengths
        suspects = among & (most * (_longest(words, n) + n - 1) > allowed)
        over = np.zeros(len(docs), bool)
        if suspects.any():
            over = _top_chars(_grams(_words_of(words, suspects), n), len(docs)) > allowed
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
    covered = _repeats(_grams(words, shortest), len(docs)) * _longest(words, shortest)
    suspects = among & (covered > loosest * docs.lengths)
    for n, limit in limits.items():
        over = np.zeros(len(docs), bool)
        if suspects.any():
            over[_repeat_more(_grams(_words_of(words, suspects), n), limit * docs.lengths)] = True
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
        return self.sizes[self.at + self.n] - self.sizes[self.at]


def _grams(words: Words, n: int) -> _Grams:
    count = max(len(words) - n + 1, 0)
    keys = np.zeros(count, np.uint64)
    for place in range(n):
        keys += words.digests[place : place + count] * np.uint64(pow(_STEP, place + 1, 2**64))
    docs = words.docs[:count]
    at = np.flatnonzero(docs == words.docs[n - 1 : n - 1 + count])
    return _Grams(n, at, docs[at], groups(docs[at], mix(keys[at])), np.append(0, np.cumsum(words.lengths)))


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


def _most_frequent(grams: _Grams, docs: int) -> np.ndarray:
    """How often the most frequent n-gram of every text occurs; shape (texts,)."""
    keys = np.sort(grams.keys)
    starts, lengths = _runs(keys)
    most = np.zeros(docs, np.int64)
    most[grams.docs] = 1
    many = lengths > 1
    np.maximum.at(most, (keys[starts[many]] >> np.uint64(48)).astype(np.int64), lengths[many])
    return most


def _repeats(grams: _Grams, docs: int) -> np.ndarray:
    """How many n-grams of every text occur before in it; shape (texts,)."""
    keys = np.sort(grams.keys)
    again = keys[1:][keys[1:] == keys[:-1]]
    return np.bincount((again >> np.uint64(48)).astype(np.int64), minlength=docs)


def _top_chars(grams: _Grams, docs: int) -> np.ndarray:
    """Characters that the most frequent n-gram takes in every text, spaces between its words included."""
    order = np.argsort(grams.keys, kind="stable")
    starts, counts = _runs(grams.keys[order])
    first, owner = order[starts], grams.docs[order[starts]]
    most = np.zeros(docs, np.int64)
    np.maximum.at(most, owner, counts)
    winners = counts == most[owner]
    chosen = np.full(docs, len(order))
    np.minimum.at(chosen, owner[winners], first[winners])
    return most * np.append(grams.chars + grams.n - 1, 0)[chosen]


def _repeat_more(grams: _Grams, allowed: np.ndarray) -> list[int]:
    """Texts whose repeated n-grams have more characters than allowed."""
    order = np.argsort(grams.keys, kind="stable")
    starts, counts = _runs(grams.keys[order])
    gram = np.empty(len(order), np.int64)
    gram[order] = np.repeat(np.arange(len(starts)), counts)
    again = np.ones(len(order), bool)
    again[order[starts]] = False

    # What repeats cover, overlaps counted once, is at least what is taken without overlap.
    edges = np.zeros(len(grams.sizes), np.int32)
    np.add.at(edges, grams.at[again], 1)
    np.subtract.at(edges, grams.at[again] + grams.n, 1)
    inside = np.cumsum(edges[:-1]) > 0
    words_docs = np.zeros(len(grams.sizes) - 1, np.int64)
    words_docs[grams.at] = grams.docs
    for offset in range(1, grams.n):
        words_docs[grams.at + offset] = grams.docs
    covered = np.bincount(words_docs[inside], np.diff(grams.sizes)[inside], minlength=len(allowed))

    # What is left is sequential by definition: a repeat hides the n-grams that it overlaps. Those that occur once
    # hide nothing and are passed over.
    often = (counts > 1)[gram] & (covered > allowed)[grams.docs]
    owner, chars = grams.docs[often], grams.chars[often]
    bounds = np.append(np.flatnonzero(np.diff(owner, prepend=-1)), len(owner)).tolist()
    at, ids, sizes = grams.at[often].tolist(), gram[often].tolist(), chars.tolist()
    over = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        seen: set[int] = set()
        free, taken = 0, 0
        for word, name, size in zip(at[start:stop], ids[start:stop], sizes[start:stop], strict=True):
            if word < free:
                continue
            if name in seen:
                taken += size
                free = word + grams.n
            seen.add(name)
        if taken > allowed[owner[start]]:
            over.append(int(owner[start]))
    return over
