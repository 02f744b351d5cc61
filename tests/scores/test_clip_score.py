"""The CLIP score of pairs: the specification's numbers, the pass that it shares, and what is no pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from vision_toys import pairs, write_open_clip

from pipeline import curate
from pipeline.errors import ConfigError
from pipeline.models.image_text import pairs as joined
from pipeline.scores.clip_score import ClipScore

pytest.importorskip("open_clip")
pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_open_clip(tmp_path_factory.mktemp("clip"))


def curated(directory: Path, table: pa.Table, **config: Any) -> list[dict[str, Any]]:
    pq.write_table(table, directory / "pairs.parquet")
    asked: dict[str, Any] = {
        "corpus": {"path": str(directory / "pairs.parquet"), "image": "image"},
        "engine": {"address": "inline", "max_bad_fraction": 1},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "run": str(directory / "run"),
    }
    done = curate(asked | config, quiet=True)
    rows: list[dict[str, Any]] = pq.read_table(done.path).to_pylist()
    return rows


def test_the_numbers_of_the_specification() -> None:
    """(1, 0) and (.6, .8) have a score of .6, whatever the scale of either, and whichever tower either is of."""
    image, text = np.float32([[1, 0], [100, 0]]), np.float32([[0.6, 0.8], [6e-3, 8e-3]])
    for left, right in ((image, text), (text, image)):
        found = joined(left, right, np.array(["", ""], object))
        np.testing.assert_allclose(found["cosine"].to_numpy(), 0.6, rtol=1e-6)


def test_a_side_that_is_no_direction_has_no_score() -> None:
    x, y = np.float32([[1, 0], [0, 0], [1, 0], [1, 1]]), np.float32([[1, 0], [1, 0], [np.nan, 0], [1, 1]])
    found = joined(x, y, np.array(["", "", "", "broken"], object))
    assert found["cosine"].to_pylist() == [1, None, None, None]
    assert found["vector"].null_count == found["text_vector"].null_count == 3
    assert found["quarantine"].to_pylist() == [None, "vector is zero", "vector is not finite", "broken"]


def test_exactly_three_of_ten_are_kept(tmp_path: Path, folder: Path) -> None:
    """Where DataComp's own code keeps four, because it compares with the score of the row behind the last."""
    rows = curated(
        tmp_path,
        pairs(10),
        scores=[{"kind": "clip_score", "model": str(folder)}],
        select={"budget": {"fraction": 0.3}},
    )
    stored = pq.read_table(tmp_path / "run/columns/clip_score/part-00000.parquet")["score"].to_numpy()
    kept = [row["tamis"]["clip_score"] for row in rows]
    assert sorted(kept) == pytest.approx(sorted(stored)[-3:])


def test_embedding_and_score_of_one_model_are_one_pass(tmp_path: Path, folder: Path) -> None:
    both = {"scores": ["clip_score", "density"], "select": {"budget": {"fraction": 0.5}}, "cluster": {"k": 3}}
    curated(tmp_path, pairs(24), embed={"kind": "open_clip", "model": str(folder)}, **both)
    columns = tmp_path / "run/columns"
    assert not [c.name for c in columns.iterdir() if c.name.startswith("pairs-")]
    stored = pq.read_table(columns / "embed/part-00000.parquet")["cosine"]
    assert pq.read_table(columns / "clip_score/part-00000.parquet")["score"].to_pylist() == stored.to_pylist()


def test_a_score_of_another_model_has_a_pass_of_its_own(tmp_path: Path, folder: Path) -> None:
    other = write_open_clip(tmp_path / "other")
    asked = {"kind": "open_clip", "model": str(folder), "tower": "image"}
    scores = [{"kind": "clip_score", "model": str(other)}, "density"]
    curated(tmp_path, pairs(12), embed=asked, scores=scores, select={"budget": {"fraction": 1}}, cluster={"k": 2})
    columns = {c.name.partition("-")[0] for c in (tmp_path / "run/columns").iterdir()}
    assert {"pairs", "embed", "clip_score"} <= columns


def test_errors_say_what_is_missing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValidationError, match="name it in `model`"):
        ClipScore(pretrained="openai")
    with pytest.raises(ConfigError, match="name an image-text `model`, here or in `embed`"):
        curated(tmp_path, pairs(4), scores=["clip_score"], select={"budget": {"rows": 1}})
    score = {"kind": "clip_score", "model": str(folder)}
    corpus = {"path": str(tmp_path / "pairs.parquet"), "text": None, "image": "image"}
    with pytest.raises(ConfigError, match=r"compares images with texts: corpus\.text names no column"):
        curated(tmp_path, pairs(4), scores=[score], select={"budget": {"rows": 1}}, corpus=corpus)
