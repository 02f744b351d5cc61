"""Texts to hashed words, many at once: no vocabulary to fit, none to ship."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.hashing import hash64, row_keys

SPACELESS = (
    r"\u0E00-\u0FFF\u1000-\u109F\u1780-\u17FF\u3040-\u30FF\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\U00020000-\U0003FFFF"
)
"""Scripts that put no space between words: Thai, Lao, Tibetan, Burmese, Khmer, Kana and Han."""

WORD = rf"[\w&&[{SPACELESS}]]|[\w&&[^{SPACELESS}]]+"
"""A run of letters, digits and marks, or one character of a script without spaces; Rust's regex syntax (polars), where
a word holds its accents and vowel signs, as Hindi needs."""


def hashed_words(texts: pa.Array, buckets: int, max_chars: int, pattern: str = WORD) -> tuple[np.ndarray, np.ndarray]:
    """Lower-cased words of n texts, of their first `max_chars` characters, hashed to [0, buckets).

    `pattern`: what a word is. Returns the words of all texts end to end (int32), and n + 1 offsets (int64) between
    which each text's lie.
    """
    import polars as pl

    words = (
        pl.Series(pc.utf8_slice_codeunits(texts, 0, max_chars)).str.to_lowercase().str.extract_all(pattern).to_arrow()
    )
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(pc.list_value_length(words).to_numpy(), out=offsets[1:])
    distinct = words.flatten().cast(pa.large_string()).dictionary_encode()  # words repeat: each is hashed once
    hashes = (hash64(row_keys(distinct.dictionary), 0) % np.uint64(buckets)).astype(np.int32)
    return hashes[distinct.indices.to_numpy()], offsets
