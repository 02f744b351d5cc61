"""Words of many scripts."""

from __future__ import annotations

import polars as pl
import pyarrow as pa
import pytest

from pipeline.words import WORD, hashed_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, wörld_x 3.14 it's", ["Hello", "wörld_x", "3", "14", "it", "s"]),
        ("我喜欢猫。hello世界", ["我", "喜", "欢", "猫", "hello", "世", "界"]),
        ("日本語テスト。", list("日本語テスト")),
        ("ครับ x", ["ค", "ร", "ั", "บ", "x"]),
        ("हिन्दी में है।", ["हिन्दी", "में", "है"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("مرحبا بِكَ", ["مرحبا", "بِكَ"]),
        ("e\u0301tude", ["e\u0301tude"]),
        ("—…!? \u200b", []),
    ],
)
def test_words_by_script(text: str, words: list[str]) -> None:
    assert pl.Series([text]).str.extract_all(WORD).to_list() == [words]


def test_hashes_are_the_words_in_order_whatever_the_batch() -> None:
    texts = pa.array(["The cat. the CAT", "!!", "cat the"])
    words, offsets = hashed_words(texts, 1 << 16, 100)
    the, cat = words[:2].tolist()
    assert (words.tolist(), offsets.tolist()) == ([the, cat, the, cat, cat, the], [0, 4, 4, 6])
    assert hashed_words(texts.slice(2).cast(pa.large_string()), 1 << 16, 100)[0].tolist() == [cat, the]


def test_words_behind_max_chars_are_not_seen() -> None:
    assert len(hashed_words(pa.array(["aé bb cc"]), 64, 5)[0]) == 2


def test_hashes_stay_the_same_between_releases() -> None:
    assert hashed_words(pa.array(["tamis sieve"]), 1 << 16, 100)[0].tolist() == [32558, 11767]
