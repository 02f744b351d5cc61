"""Texts to measure on that stand, in part, in what was trained on: word n-grams that both have.

13 words in a row (Brown et al. 2020, appendix C), lower-cased, punctuation apart. A text of fewer words is not found.
Memory is that of the evaluation texts' hashes; training texts pass by in batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.hashing import mix64
from pipeline.report.format import visible
from pipeline.words import hashed_words

log = logging.getLogger(__name__)

N = 13
BUCKETS = (1 << 31) - 1
MAX_CHARS = 1 << 20
SHOWN = 10


@dataclass(frozen=True)
class Overlap:
    """Of an evaluation text: the share of its n-grams that a training text has, and the first one's row."""

    id: str
    share: float
    row: int


def overlaps(evaluation: Mapping[str, str], training: Iterable[pa.Array], n: int = N) -> list[Overlap]:
    """Evaluation texts (by id) that share an n-gram with a training text, in their order.

    `training`: batches of texts; rows are counted through.
    """
    hashes, of = _ngrams(pa.array(list(evaluation.values()), pa.large_string()), n)
    distinct, which = np.unique(hashes, return_inverse=True)
    first = np.full(len(distinct), -1, np.int64)
    seen = 0
    for texts in training:
        theirs, row = _ngrams(texts, n)
        at = np.searchsorted(distinct, theirs)
        hit = np.flatnonzero(distinct[np.minimum(at, len(distinct) - 1)] == theirs) if len(distinct) else at[:0]
        new = hit[first[at[hit]] < 0][::-1]  # of several rows the first one is written last
        first[at[new]] = seen + row[new]
        seen += len(texts)
    found = []
    for i, id in enumerate(evaluation):
        rows = first[which[of == i]]
        if (rows >= 0).any():
            found.append(Overlap(id, float((rows >= 0).mean()), int(rows[rows >= 0].min())))
    return found


def warn_overlaps(evaluation: Mapping[str, str], training: Iterable[pa.Array], n: int = N) -> list[Overlap]:
    """`overlaps`, with a warning that names the texts where there are some."""
    found = overlaps(evaluation, training, n)
    if found:
        shown = ", ".join(f"{visible(o.id, 80)} (row {o.row})" for o in found[:SHOWN])
        more = ", ..." if len(found) > SHOWN else ""
        said = "%d of %d evaluation texts share %d words in a row with the training data, which flatters: %s%s"
        log.warning(said, len(found), len(evaluation), n, shown, more)
    return found


def _ngrams(texts: pa.Array, n: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 hashes of all n-grams of words, and the text that each is of; (m,)."""
    words, offsets = hashed_words(texts, BUCKETS, MAX_CHARS)
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for j in range(n):
        hashes = mix64(hashes ^ words[j : j + count].astype(np.uint64))
    of = np.repeat(np.arange(len(texts)), np.diff(offsets))
    inside = of[:count] == of[n - 1 :][:count]
    return hashes[inside], of[:count][inside]
