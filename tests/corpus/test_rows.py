"""The base column: keys, bytes, tokens."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.corpus.rows import load_tokenizer, row_column
from pipeline.errors import ConfigError
from pipeline.hashing import row_keys


def test_bytes_and_tokens() -> None:
    texts = ["a", "abcd", "abcde", "né", "中文", "x" * 4001]
    out = row_column(False, None).open()(pa.record_batch({"text": texts}))
    assert out.column("bytes").to_pylist() == [1, 4, 5, 3, 6, 4001]
    assert out.column("tokens").to_pylist() == [1, 1, 2, 1, 2, 1001]  # bytes / 4, rounded up
    assert out.column("key").equals(row_keys(pa.array(texts)))


def test_keys_are_of_the_id_where_there_is_one() -> None:
    column = row_column(True, None)
    assert column.inputs == ("text", "id")
    for ids in (pa.array(["a", "b"]), pa.array([1, 2]), pa.array([b"\xff", b"\xfe"])):
        out = column.open()(pa.record_batch([pa.array(["t", "t"]), ids], names=["text", "id"]))
        assert out.column("key").equals(row_keys(ids))
        assert len(out.column("key").unique()) == 2


def test_large_strings_count_alike() -> None:
    texts = ["a", "né"]
    out = row_column(False, None).open()(pa.record_batch([pa.array(texts, pa.large_string())], names=["text"]))
    assert out.column("bytes").to_pylist() == [1, 3]
    assert out.column("key").equals(row_keys(pa.array(texts)))


def test_a_named_tokenizer_counts(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        out = row_column(False, str(name)).open()(pa.record_batch({"text": ["a", "a b  c", "a\nb"]}))
        assert out.column("tokens").to_pylist() == [1, 3, 2]
    same = row_column(False, str(tmp_path)).identity
    assert same == row_column(False, str(tmp_path / "tokenizer.json")).identity != row_column(False, None).identity
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"corpus.tokenizer: cannot load '.*'"):
        load_tokenizer(str(tmp_path))
