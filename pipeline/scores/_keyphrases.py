"""Key phrases as RAKE finds them (Rose et al. 2010): runs of content words between stop words, punctuation, line ends.

A word's score is degree / frequency: the mean length of the phrases that it stands in. A phrase scores the sum of its
words, and the best third as many as there are different content words are key, as in the paper, but at most `most`.
All texts of a batch at once (`pipeline.textrules`); a phrase is the 64-bit digest of its lower-cased text.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.textrules.chars import ALPHA
from pipeline.textrules.docs import Docs, groups
from pipeline.textrules.words import lookup, split_words

CONTRACTIONS = ("'s", "'re", "'ve", "'ll", "'d", "'m", "n't")
"""Which the words are cut into, and no list of stop words has."""


@cache
def english() -> tuple[str, ...]:
    """scikit-learn's 318 stop words, and contractions."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    curly = tuple(c.replace("'", "’") for c in CONTRACTIONS)
    return (*sorted(ENGLISH_STOP_WORDS), *CONTRACTIONS, *curly)


def key_phrases(texts: pa.Array, stop_words: tuple[str, ...], most: int) -> pa.ListArray:
    """Digests (uint64) of the key phrases of every text, the best first, equals by their place."""
    docs = Docs.of(pc.utf8_lower(texts.cast(pa.large_string())))
    words = split_words(docs)
    content = (words.kinds & np.uint32(ALPHA)) != 0
    content[lookup(stop_words).find(words.digests)[0]] = False
    line = np.searchsorted(docs.lines.starts, words.starts, "right")
    at = np.flatnonzero(content)
    begins = np.ones(len(at), bool)
    begins[1:] = (np.diff(at) > 1) | (np.diff(line[at]) > 0)
    phrase = np.cumsum(begins) - 1
    first = np.flatnonzero(begins)
    length = np.bincount(phrase) if len(at) else np.empty(0, np.int64)

    key, word = np.unique(groups(words.docs[at], words.digests[at]), return_inverse=True)
    degree = np.bincount(word, length[phrase], len(key)) if len(at) else np.empty(0)
    score = np.bincount(phrase, (degree / np.maximum(np.bincount(word, minlength=len(key)), 1))[word], len(first))

    owner = words.docs[at[first]].astype(np.int64)
    last = np.append(first[1:], len(at))[: len(first)] - 1
    digest = docs.digests(words.starts[at[first]], words.ends[at[last]])
    _, once = np.unique(groups(owner, digest), return_index=True)
    best = once[np.lexsort((once, -score[once], owner[once]))]  # by text, then score, then place
    vocabulary = np.bincount((key >> np.uint64(48)).astype(np.int64), minlength=len(docs))
    there = np.bincount(owner[best], minlength=len(docs))
    rank = np.arange(len(best)) - np.repeat(np.cumsum(there) - there, there)
    best = best[rank < np.minimum(-(-vocabulary // 3), most)[owner[best]]]
    offsets = np.append(0, np.cumsum(np.bincount(owner[best], minlength=len(docs))))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(digest[best]))
