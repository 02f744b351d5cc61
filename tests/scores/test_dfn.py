"""A filtering network trained on trusted pairs, and one that comes trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from vision_toys import CAPTIONS, pairs, write_open_clip, write_text, write_vision

from pipeline import curate
from pipeline.errors import ConfigError
from pipeline.models.image_text import open_folder
from pipeline.scores import dfn
from pipeline.scores.dfn import Dfn

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

TRAIN = {"dims": 16, "epochs": 60, "batch": 64, "lr": 3e-3, "image_dropout": 0, "text_dropout": 0}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("encoders")
    pq.write_table(pairs(320, seed=1000), folder / "trusted.parquet", row_group_size=100)
    return {
        "image_encoder": str(write_vision(folder / "image", hidden_size=32)),
        "text_encoder": str(write_text(folder / "text")),
        "trusted": str(folder / "trusted.parquet"),
    }


def scored(directory: Path, table: pa.Table, score: dict[str, Any]) -> np.ndarray:
    pq.write_table(table, directory / "pairs.parquet")
    config = {
        "corpus": {"path": str(directory / "pairs.parquet"), "image": "image"},
        "scores": [{"kind": "dfn", **score}],
        "select": {"budget": {"fraction": 0.15}},
        "engine": {"address": "inline"},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "run": str(directory / "run"),
    }
    curate(config, quiet=True)
    return np.asarray(pq.read_table(directory / "run/columns/dfn/part-00000.parquet")["score"])


def test_a_network_trained_on_clean_pairs_finds_the_matched_ones(tmp_path: Path, encoders: dict[str, str]) -> None:
    table = pairs(96)
    matched = np.arange(96) % 3 == 0
    wrong = [CAPTIONS[(CAPTIONS.index(t) + 5) % len(CAPTIONS)] for t in table["text"].to_pylist()]
    texts = np.where(matched, table["text"].to_pylist(), wrong).tolist()
    found = scored(tmp_path, table.set_column(1, "text", [texts]), encoders | {"train": TRAIN})
    from sklearn.metrics import roc_auc_score

    assert roc_auc_score(matched, found) > 0.9

    artifact = tmp_path / "run/artifacts/dfn"
    facts = json.loads((artifact / dfn.FACTS).read_text())
    assert facts["trusted"] + facts["held_out"]["pairs"] == 320
    assert facts["held_out"]["auc"] > 0.6  # captions of which not one was trained on
    model = open_folder(artifact)  # the folder that `embed: {kind: dual_encoder}` takes
    assert model.texts(CAPTIONS[:3]).shape == (3, 16)


def test_a_trained_network_is_used_as_it_is(tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path / "clip")
    found = scored(tmp_path, pairs(8), {"model": str(folder)})
    assert np.all(np.abs(found) <= 1)
    assert len(set(found.tolist())) > 1


def test_measures_of_a_perfect_and_of_a_blind_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfn, "BLOCK", 17)
    x = np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)
    perfect = dfn.measure(x, x, 0)
    assert perfect["auc"] == 1
    assert set(perfect["recall"].values()) == {1}
    blind = dfn.measure(*np.random.default_rng(0).normal(size=(2, 400, 16)), 0)
    assert blind["auc"] == pytest.approx(0.5, abs=0.08)
    assert blind["recall"]["image@10"] == pytest.approx(10 / 400, abs=0.03)
    assert dfn.measure(x[:1], x[:1], 0)["auc"] is None
    second = dfn.measure(np.eye(2), np.array([[0.6, 0.8], [0, 1]]), 0)["recall"]  # a text is nearer to the other image
    assert second == {"image@1": 1, "image@10": 1, "text@1": 0.5, "text@10": 1}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (pa.table({"image": [b"x"], "caption": ["a"]}), "has no column 'text'; it has image, caption"),
        (pa.table({"image": [1], "text": ["a"]}), "column 'image' of .* is int64"),
        (pa.table({"image": [b"broken"] * 3, "text": list("abc")}), "no pair of an image that can be decoded"),
    ],
)
def test_trusted_pairs_that_are_none(tmp_path: Path, encoders: dict[str, str], table: pa.Table, says: str) -> None:
    pq.write_table(table, tmp_path / "trusted.parquet")
    with pytest.raises(ConfigError, match=says):
        scored(tmp_path, pairs(4), encoders | {"trusted": str(tmp_path / "trusted.parquet")})


def test_errors_at_the_door(encoders: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"missing: image_encoder, trusted"):
        Dfn(text_encoder=encoders["text_encoder"])
    with pytest.raises(ValidationError, match="is trained already: remove trusted"):
        Dfn(model="x", trusted="y")
