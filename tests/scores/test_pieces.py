"""Pieces: Ultra-FineWeb's normalisation in its order, and a classifier whose words are a tokenizer's pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import parse
from pipeline.corpus.storage import Store
from pipeline.engine.pool import InlinePool
from pipeline.errors import TamisError
from pipeline.run import Artifact, Run
from pipeline.scores._pieces import Pieces
from pipeline.scores.quality import open_classifier

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with a few merges."""
    from pipeline.models.training import train_tokenizer

    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["cafe au lait", "francais et anglais", "东京 北京 今天 天气 很 好"] * 3, 600).save(str(file))
    return file


@pytest.fixture(scope="module")
def pieces(tokenizer: Path) -> Pieces:
    return Pieces(tokenizer.read_text())


def whole(pieces: Pieces, text: str) -> str:
    """The pieces of a text put together again."""
    return str(pieces(pa.array([text]))[0].as_py().replace(" ", ""))


def test_case_accents_and_line_breaks(pieces: Pieces) -> None:
    assert whole(pieces, "Café\n\n\n\nFrançais") == r"cafe\n\nfrancais"
    assert whole(pieces, "Café\n\nFrançais") == r"cafe\n\nfrancais"
    assert whole(pieces, "A\tB\r") == r"a\tb\r"
    assert whole(pieces, "\ufb01ne \u2460") == "fine1"  # compatibility forms


@given(st.lists(st.text(st.sampled_from("aBé\n\t 东")), min_size=1, max_size=5))
@settings(max_examples=30)
def test_one_line_of_single_spaces_whatever_the_neighbours(pieces: Pieces, texts: list[str]) -> None:
    together = pieces(pa.array(texts)).to_pylist()
    for text, line in zip(texts, together, strict=True):
        assert not set("\n\r\t") & set(line)
        assert "  " not in line
        assert line == line.strip(" ")
        assert pieces(pa.array([text], pa.large_string())).to_pylist() == [line]


@given(st.text(st.sampled_from("aBé\n\t 东Zö")))
@settings(max_examples=30)
def test_what_is_normalised_stays_as_it_is_up_to_the_escapes(pieces: Pieces, text: str) -> None:
    once = whole(pieces, text)
    assert whole(pieces, once) == once  # characters; where pieces are cut may change with the spaces between them


def run_quality(directory: Path, **fields: Any) -> Path:
    """The artifact of a small classifier; its seeds are given, so the corpus does not matter."""
    (directory / "corpus").mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": ["some text"]}), directory / "corpus/p.parquet")
    config = {
        "corpus": {"path": str(directory / "corpus")},
        "scores": [{"kind": "quality", "dim": 8, "bucket": 1000, "lr": 1.0, "epoch": 100, "holdout": 0, **fields}],
        "select": {"budget": {"rows": 1}},
        "run": str(directory / "run"),
    }
    with Run(parse(config), InlinePool, quiet=True) as run:
        run.config.scores[0].fit(run)
    return directory / "run/artifacts/quality"


def test_a_script_without_spaces_has_words(tmp_path: Path, tokenizer: Path) -> None:
    good = [f"今天天气很好{a}北京{b}" for a in "甲乙丙丁" for b in "子丑寅卯"]
    bad = [f"东京{a}{b}不下雨" for a in "甲乙丙丁" for b in "子丑寅卯"]
    (tmp_path / "good.txt").write_text("\n".join(good))
    (tmp_path / "bad.txt").write_text("\n".join(bad))
    seeds = {"positives": str(tmp_path / "good.txt"), "negatives": str(tmp_path / "bad.txt")}
    unseen = pa.record_batch([pa.array(["今天北京天气很好!", "东京今天不下雨。"])], ["text"])
    artifact = run_quality(tmp_path, **seeds, tokenizer=str(tokenizer))
    high, low = open_classifier(Artifact("quality", "", Store(str(artifact))))(unseen)["score"].to_pylist()
    assert high > 0.8 > 0.2 > low
    words = json.loads((artifact / "model.json").read_text())["words"]
    plain = run_quality(tmp_path, **seeds)
    assert not (plain / "tokenizer.json").exists()  # it was another identity, and fitted anew
    same = open_classifier(Artifact("quality", "", Store(str(plain))))(unseen)["score"].to_pylist()
    assert abs(same[0] - same[1]) < 0.2  # a document is one word there, and unknown
    assert json.loads((plain / "model.json").read_text())["words"] == len(good) + len(bad) + 1 > words

    model = tmp_path / "model.bin"
    adopted = run_quality(tmp_path, **seeds, tokenizer=str(tokenizer), exact=True)
    model.write_bytes((adopted / "model.bin").read_bytes())
    again = {"kind": "quality", "model": str(model), "tokenizer": str(tokenizer)}
    config = {"corpus": {"path": str(tmp_path / "corpus")}, "scores": [again], "select": {"budget": {"rows": 1}}}
    with Run(parse(config | {"run": str(tmp_path / "again")}), InlinePool, quiet=True) as run:
        run.config.scores[0].fit(run)
    artifact = tmp_path / "again/artifacts/quality"
    scores = open_classifier(Artifact("quality", "", Store(str(artifact))))(unseen)["score"].to_pylist()
    assert scores == pytest.approx([high, low], abs=1e-5)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("a fine text\n")
    seeds = {"positives": str(tmp_path / "good.txt"), "negatives": str(tmp_path / "good.txt")}
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TamisError, match=r"tokenizer: this is no tokenizer\.json"):
        run_quality(tmp_path, **seeds, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(TamisError, match=r"tokenizer: no such file: nowhere\.json"):
        run_quality(tmp_path, **seeds, tokenizer="nowhere.json")
