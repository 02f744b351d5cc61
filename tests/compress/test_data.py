"""Blocks of tokens: what is calibrated, healed and measured on, and that nothing is on both sides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from pipeline.compress.compression import gather
from pipeline.compress.data import Source, by_score, curated, pack_blocks, parquet, set_apart, sources
from pipeline.corpus.content import Content
from pipeline.errors import ConfigError, CorpusError
from tests.compress.test_compression import configured


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    from pipeline.models.training import END, train_tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(["abc abd <|endoftext|>"], 257), eos_token=END)


def texts(*values: str | None) -> pa.Array:
    return pa.array(values, pa.large_string())


def test_documents_follow_each_other_and_each_is_closed(tokenizer) -> None:
    blocks = pack_blocks(texts("aa", "b"), tokenizer, 5, 100, seed=None)
    assert blocks.dtype == np.int32
    assert tokenizer.convert_ids_to_tokens(blocks[0].tolist()) == ["a", "a", "<|endoftext|>", "b", "<|endoftext|>"]


def test_what_looks_like_the_end_in_a_text_is_plain_text(tokenizer) -> None:
    blocks = pack_blocks(texts("<|endoftext|>" * 3), tokenizer, 8, 8)
    assert tokenizer.eos_token_id not in blocks


def test_no_more_tokens_than_asked_for_and_all_blocks_whole(tokenizer) -> None:
    blocks = pack_blocks(texts(*["abc" * 10] * 5000), tokenizer, 8, 100)
    assert blocks.shape == (12, 8)


def test_less_than_a_block_is_filled_up(tokenizer) -> None:
    assert pack_blocks(texts("a"), tokenizer, 8, 100).shape == (1, 8)


def test_documents_come_in_an_order_drawn_from_the_seed(tokenizer) -> None:
    many = texts(*[f"{n:03d}" for n in range(300)])
    drawn = [pack_blocks(many, tokenizer, 10, 400, seed) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all()
    assert not (drawn[0] == drawn[2]).all()
    first = tokenizer.decode(drawn[0].ravel().tolist()).split("<|endoftext|>")
    assert max(map(int, first[:-1])) > 200  # a budget takes of all, not the first


def test_nothing_to_pack_is_an_error(tokenizer) -> None:
    with pytest.raises(CorpusError, match="no text"):
        pack_blocks(texts(), tokenizer, 8, 100)


def test_a_tokenizer_without_an_end_is_refused(tokenizer) -> None:
    from copy import deepcopy

    endless = deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        pack_blocks(texts("a"), endless, 8, 100)


@given(st.lists(st.text("abc", min_size=1), min_size=1, max_size=40), st.floats(0.1, 0.9), st.integers(0, 5))
def test_a_text_is_on_one_side_in_whatever_set_it_is_met(found: list[str], share: float, seed: int) -> None:
    apart, rest = set_apart(iter([texts(*found)]), share, seed)
    assert sorted(apart.to_pylist() + rest.to_pylist()) == sorted(found)
    other = set_apart(iter([texts(*reversed(found), "z")]), share, seed)
    assert not set(apart.to_pylist()) & set(other[1].to_pylist())


def test_unusable_texts_are_left_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", None, "  ", "two"]}), tmp_path / "a.parquet")
    assert [t.to_pylist() for t in parquet([str(tmp_path)], Content()).documents()] == [["one", "two"]]


def test_what_is_left_out_is_counted_over_all_of_the_data(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": ["one", None, "  "] * 700}), tmp_path / f"{name}.parquet")
    refused: Counter[str] = Counter()
    assert sum(map(len, parquet([str(tmp_path)], Content()).documents(refused))) == 1400
    assert refused == {"null text": 1400, "blank text": 1400}


def test_parquet_serves_as_both_sets(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    calibrate, recover = sources(str(tmp_path / "a.parquet"), Content())
    assert calibrate == recover


def test_files_that_serve_as_both_sets_are_read_once(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": [f"abc {i}" for i in range(200)]}), tmp_path / "a.parquet")
    config = configured(str(tmp_path / "a.parquet"), tmp_path / "made", held_out=0.2)
    read: list[Source] = []
    documents = Source.documents
    monkeypatch.setattr(Source, "documents", lambda self, *rest: read.append(self) or documents(self, *rest))
    blocks = gather(config, sources(config.data, config), tokenizer)
    assert len(read) == 1
    assert blocks.calibration.size
    assert blocks.recovery.size


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"no column 'text'; it has body"):
        list(parquet([str(tmp_path)], Content()).documents())


def test_what_is_neither_a_run_nor_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a curated run nor Parquet"):
        sources(str(tmp_path / "nothing"), Content())


def test_a_run_that_handed_over_nothing_says_why(tmp_path: Path) -> None:
    why = {"num_samples": 0, "why": "handoff.recovery_tokens: not even one row fits"}
    (tmp_path / "handoff.json").write_text(json.dumps({"text_column": "text", "calibration": why, "recovery": why}))
    with pytest.raises(ConfigError, match="not even one row fits"):
        sources(str(tmp_path), Content())


def test_the_hand_off_of_a_run_is_read(tiny_run: str) -> None:
    calibrate, recover = sources(tiny_run, Content())
    found = [sum(len(t) for t in source.documents()) for source in (calibrate, recover)]
    assert found[0] == 20
    assert found[1] > 50
    assert calibrate.fingerprint != recover.fingerprint


def test_rows_come_by_a_score_of_the_run_highest_first(tiny_run: str) -> None:
    lengths = [-(-len(text) // 4) for text in by_score(curated(tiny_run), "length").to_pylist()]
    assert lengths == sorted(lengths, reverse=True)
    with pytest.raises(CorpusError, match=r"tamis\.length"):
        by_score(curated(tiny_run), "quality")
