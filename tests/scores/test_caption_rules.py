"""Rules for captions: DataComp's limits, languages, and captions that many rows share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import curate
from pipeline.errors import ConfigError

TEXTS = {
    "a red house": "",
    "red house": "too_few_words",
    "a b c": "too_few_characters",
    "a b cd": "",
    "  a   red\thouse ": "",
    "x": "too_few_words",
    "ein rotes Haus am Hang": "",
}


def judged(directory: Path, texts: list[str], **fields: Any) -> list[tuple[float, str]]:
    pq.write_table(pa.table({"text": texts}), directory / "captions.parquet", row_group_size=3)
    config = {
        "corpus": {"path": str(directory / "captions.parquet"), "shard_mb": 1e-6},
        "scores": [{"kind": "caption_rules", **fields}],
        "select": {"budget": {"fraction": 1}, "floors": {"caption_rules": 1}},
        "engine": {"address": "inline"},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "run": str(directory / "run"),
    }
    done = curate(config, quiet=True)
    parts = sorted((directory / "run/columns/caption_rules").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in parts])
    assert done.rows_kept == sum(table["score"].to_pylist())
    return list(zip(table["score"].to_pylist(), table["rule"].to_pylist(), strict=True))


def test_the_basic_filter_wants_three_words_and_six_characters(tmp_path: Path) -> None:
    assert judged(tmp_path, [*TEXTS]) == [(float(not rule), rule) for rule in TEXTS.values()]


def test_limits_can_be_moved_and_taken_away(tmp_path: Path) -> None:
    found = judged(tmp_path, [*TEXTS], min_words=2, max_words=4, min_chars=None)
    assert [rule for _, rule in found] == ["", "", "", "", "", "too_few_words", "too_many_words"]
    found = judged(tmp_path, [*TEXTS], min_words=None, min_chars=None, max_chars=11)
    assert [rule for _, rule in found] == ["", "", "", "", "too_many_characters", "", "too_many_characters"]


def test_a_caption_that_many_rows_share_is_none_of_theirs(tmp_path: Path) -> None:
    """Counted over all shards, and as exact duplicates are compared: three of the first, two of the second."""
    texts = ["The Red House", "a blue house", "the red  house", "a green house", "A BLUE house", "the red house"]
    found = [rule for _, rule in judged(tmp_path, texts, max_shared=2)]
    assert found == ["shared", "", "shared", "", "", "shared"]
    assert [rule for _, rule in judged(tmp_path, texts, max_shared=1)] == ["shared"] * 3 + ["", "shared", "shared"]


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fastText model that tells English from German by what little it read."""
    import fasttext

    folder: Path = tmp_path_factory.mktemp("languages")
    lines = ["__label__en the house is a red one on the hill", "__label__de das Haus am Hang ist ein rotes"]
    (folder / "train.txt").write_text("\n".join(lines * 50) + "\n")
    model = fasttext.train_supervised(str(folder / "train.txt"), dim=8, epoch=30, lr=0.5, thread=1, verbose=0)
    model.save_model(str(folder / "languages.bin"))
    return str(folder / "languages.bin")


def test_only_the_wanted_language_passes(tmp_path: Path, languages: str) -> None:
    texts = ["the red house", "das rote Haus", "the\nred house\x85is one", "das Haus ist ein rotes"]
    english = judged(tmp_path, texts, language_model=languages)
    assert [rule for _, rule in english] == ["", "language", "", "language"]
    german = judged(tmp_path, texts, language_model=languages, language="de")
    assert [rule for _, rule in german] == ["language", "", "language", ""]
    mixed = ["the house is a red one on the hill", "the house ist ein rotes", "das Haus am Hang ist ein rotes"]
    sure = judged(tmp_path, mixed, language_model=languages, min_confidence=0.9)
    assert [rule for _, rule in sure] == ["", "language", "language"]


def test_a_language_that_the_model_does_not_know(tmp_path: Path, languages: str) -> None:
    with pytest.raises(ConfigError, match="has no 'fr'; it has de, en"):
        judged(tmp_path, [*TEXTS], language_model=languages, language="fr")
    (tmp_path / "broken.bin").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="is not a fastText model"):
        judged(tmp_path, [*TEXTS], language_model=str(tmp_path / "broken.bin"))
