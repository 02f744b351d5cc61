"""Priming: probabilities to risks, the keyword beside a plain search of the text, and what is no keyword."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_lm import BIRDS, TREES, sentences, trained
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers

from pipeline.config import parse
from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError
from pipeline.hashing import hash64, row_keys
from pipeline.models.causal import Scorer, token_batch
from pipeline.models.training import END, train_tokenizer
from pipeline.scores.priming import BUCKETS, LETTERS, Pieces, Priming, Words, keywords


def vocabulary(folder: Path, texts: list[str], size: int = 400) -> tuple[Tokenizer, Pieces]:
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(texts, size)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer, Pieces.of(folder)


def bucket(word: str) -> int:
    return int(hash64(row_keys(pa.array([word])), 0)[0] % np.uint64(BUCKETS))


def allowing(*words: str) -> np.ndarray:
    allowed = np.zeros(BUCKETS, bool)
    allowed[[bucket(word) for word in words]] = True
    return allowed


def tokens_of(encoding: Encoding, word: re.Match[str]) -> list[int]:
    """Tokens of a word and the space before it."""
    return [i for i, (a, b) in enumerate(encoding.offsets) if b > word.start() - 1 and a < word.end()]


def rows_of(tokenizer: Tokenizer, texts: list[str], surprise: dict[str, float]) -> tuple[pa.Array, pa.Array]:
    """Tokens of texts, and log-probabilities: -0.1 a token, but those that `surprise` says of words, for all of it."""
    ids, logp = [], []
    for text in texts:
        encoding = tokenizer.encode(text)
        row = np.full(len(encoding.ids), -0.1)
        for word, value in surprise.items():
            for found in re.finditer(rf"(?<= ){word}\b", text):
                inside = tokens_of(encoding, found)
                row[inside] = value / len(inside)
        ids.append(encoding.ids)
        logp.append(row[1:])
    return pa.array(ids, pa.list_(pa.int32())), pa.array(logp, pa.list_(pa.float32()))


def test_a_probability_is_its_order_of_magnitude(tmp_path: Path) -> None:
    filler = "so we went on and on until "
    texts = [filler + word + " came" for word in ("heron", "crane", "raven", "kite")]
    tokenizer, pieces = vocabulary(tmp_path, texts)
    probability = {"heron": 1e-3, "crane": 1e-2, "raven": 1e-5, "kite": 1.0}
    ids, logp = rows_of(tokenizer, texts, {w: np.log(p) for w, p in probability.items()})
    found = keywords(pieces, ids, logp, allowing(*probability), 4)
    assert found["keyword"].to_pylist() == list(probability)
    np.testing.assert_allclose(found["score"], [-3, -2, -5, 0], atol=1e-6)  # risks of 3, 2, 5 and 0
    np.testing.assert_allclose(found["min_key_logp"], np.log(list(probability.values())), atol=1e-5)


def test_a_keyword_of_several_tokens_is_their_product(tmp_path: Path) -> None:
    text = "we were there when it was unforeseeable again"
    tokenizer, pieces = vocabulary(tmp_path, ["we were there when it was again"], 280)
    ids, logp = rows_of(tokenizer, [text], {"unforeseeable": -9.0})
    found = keywords(pieces, ids, logp, allowing("unforeseeable"), 3).to_pylist()[0]
    (word,) = re.finditer("unforeseeable", text)
    inside = tokens_of(tokenizer.encode(text), word)
    assert len(inside) > 5
    assert found["keyword_pos"] == inside[0]
    assert found["min_key_logp"] == pytest.approx(-9, abs=1e-5)
    assert found["mean_key_logp"] == pytest.approx(-9 / len(inside), abs=1e-5)
    assert found["score"] == pytest.approx(-9 / np.log(10), abs=1e-5)


TEXT = "one two three four five heron six seven x1heron 2heron heron_a (heron) http://heron.org naïve Jäger eight heron"


@pytest.mark.parametrize(
    ("words", "position", "keyword", "at"),
    [
        (("heron",), 1, "heron", TEXT.index("heron")),  # the first of equal ones that stand whole
        (("heron",), 16, None, None),  # x1heron, 2heron, (heron), the end of the row: none is a word of letters
        (("naïve",), 1, "naïve", TEXT.index("naïve")),
        (("jäger",), 1, "Jäger", TEXT.index("Jäger")),  # counted in lower case, shown as it is
        (("eagle",), 1, None, None),
    ],
)
def test_what_is_a_keyword(
    tmp_path: Path, words: tuple[str, ...], position: int, keyword: str | None, at: int | None
) -> None:
    tokenizer, pieces = vocabulary(tmp_path, [TEXT.replace("heron", "") * 3, "on she the her one"], 300)
    ids, logp = rows_of(tokenizer, [TEXT], {"heron": -5.0, "naïve": -5.0, "Jäger": -5.0})
    row = keywords(pieces, ids, logp, allowing(*words), position).to_pylist()[0]
    assert row["keyword"] == keyword
    if at is None:
        assert (row["score"], row["keyword_pos"], row["min_key_logp"], row["mean_key_logp"]) == (0, None, None, None)
    else:
        start = tokenizer.encode(TEXT).offsets[row["keyword_pos"]][0]
        assert TEXT[start:].lstrip().startswith(str(keyword))


@settings(max_examples=60)
@given(
    st.lists(st.text(st.sampled_from("ab é1-木\U0001f332"), min_size=8, max_size=60), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_the_keyword_is_that_of_a_plain_search(texts: list[str], seed: int) -> None:
    tokenizer, pieces = PLAIN
    rng = np.random.default_rng(seed)
    encodings = [tokenizer.encode(text) for text in texts]
    values = [-20 * rng.random(len(e.ids) - 1, np.float32) for e in encodings]
    ids = pa.array([e.ids for e in encodings], pa.list_(pa.int32()))
    found = keywords(pieces, ids, pa.array(values, pa.list_(pa.float32())), np.ones(BUCKETS, bool), 3)
    for text, encoding, logp, row in zip(texts, encodings, values, found.to_pylist(), strict=True):
        best: tuple[float, int, str] | None = None
        for match in re.finditer(r"(?<= )[abé木]+", text):
            inside = tokens_of(encoding, match)
            if inside[0] < 3 or match.end() == len(text) or text[match.end()] in "1\U0001f332":
                continue  # too early, perhaps cut, or not the end of the word
            if "木" in match[0] and match[0] != "木":
                continue  # characters of Han are words of their own
            total = float(np.sum(logp[np.array(inside) - 1].astype(np.float64)))
            if best is None or total < best[0] - 1e-12:
                best = (total, inside[0], match[0])
        if best is None:
            assert row["keyword"] is None
        else:
            assert row["min_key_logp"] == pytest.approx(best[0], abs=1e-4)
            assert (row["keyword_pos"], row["keyword"]) == best[1:]


def _plain() -> tuple[Tokenizer, Pieces]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return vocabulary(Path(folder), [" ab ab é éa 1a a1 a- -b" * 3], 270)


PLAIN = _plain()


@settings(max_examples=10)
@given(st.lists(st.lists(st.sampled_from(["Oak", "oak", "elm", "Ärger"]), max_size=9), min_size=1, max_size=9))
def test_words_are_counted_whatever_the_shards(rows: list[list[str]]) -> None:
    texts, statistic = [" ".join(row) + "." for row in rows], Words(1000)
    state = statistic.merge([statistic.update({}, pa.record_batch([pa.array([t])], ["text"])) for t in texts])
    flat = [word.lower() for row in rows for word in row]
    for word in ("oak", "elm", "ärger"):
        assert state["count"][bucket(word)] == flat.count(word)
    assert state["count"].sum() == len(flat)


def test_a_vocabulary_that_marks_no_words_is_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"oak": 0, "elm": 1}, unk_token="oak"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="does not mark where words begin"):
        Pieces.of(tmp_path)


def test_sentencepiece_vocabularies_mark_words_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({END: 0, "▁oak": 1, "tree": 2, "▁elm": 3, "▁2": 4, ",": 5}))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pieces = Pieces.of(tmp_path)
    ids = pa.array([[3, 1, 2, 5, 4]], pa.list_(pa.int32()))
    logp = pa.array([[-3, -2, -1, -9]], pa.list_(pa.float32()))
    row = keywords(pieces, ids, logp, allowing("oaktree"), 1).to_pylist()[0]
    assert (row["keyword"], row["keyword_pos"], row["min_key_logp"]) == ("oaktree", 1, -5)


def test_a_run(tmp_path: Path) -> None:
    """A bird among trees is what surprises a model of trees; a word that is too rare, or one typo, is none."""
    folder = trained(tmp_path / "model", sentences(300), steps=150)
    plain = [t for t in sentences(200, 1) if len(t.split()) > 40][:20]
    surprising = [" ".join([*t.split()[:30], BIRDS[i], *t.split()[30:]]) for i, t in enumerate(plain[:4])]
    typo = [t.replace(" oak ", " oka ", 1) for t in plain[4:6]]
    texts = ["oak elm", *plain[6:], *surprising * 3, *typo]
    pq.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet", row_group_size=8)
    config = {
        "corpus": {"path": str(tmp_path / "corpus.parquet"), "shard_mb": 1e-6},
        "scores": [{"kind": "priming", "model": str(folder), "min_count": 3, "max_share": 0.5}],
        "select": {"budget": {"fraction": 1.0}, "floors": {"priming": -3}},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "run": str(tmp_path / "run"),
    }
    result = curate(parse(config), pool=InlinePool, quiet=True)
    parts = sorted((tmp_path / "run/columns/priming").glob("*.parquet"))
    table = pa.concat_tables(pq.read_table(p) for p in parts).to_pylist()
    kept = [t for f in sorted(Path(result.path).glob("*.parquet")) for t in pq.read_table(f)["text"].to_pylist()]
    assert table[0]["score"] == 0
    assert table[0]["keyword"] is None
    for text, row in zip(texts, table, strict=True):
        if text in surprising:
            assert row["keyword"] in BIRDS
            assert row["score"] < -3
        elif row["keyword"] is not None:
            assert row["keyword"] in TREES
            assert row["score"] > -3
    assert set(kept) == set(texts) - set(surprising)

    scorer = Scorer(folder, 1024)
    ids, offsets = scorer.tokenize(pa.array(texts[:3]))
    logp = token_batch(ids, offsets, scorer(ids, offsets))["logp"].to_pylist()
    at = table[1]["keyword_pos"]
    assert table[1]["min_key_logp"] <= max(logp[1][at - 1 :])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "Field required"),
        ({"model": "nowhere"}, "there is no folder 'nowhere'"),
        ({"model": "hf://a/b", "min_position": 0}, "greater than or equal to 1"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Priming.model_validate(fields)


def test_letters_are_of_any_script() -> None:
    import polars as pl

    words = ["oak", "Ärger", "हिन्दी", "木", "a1", "a-b", "", "caf\ufffd"]
    assert pl.Series(words).str.contains(LETTERS).to_list() == [True] * 4 + [False] * 4
