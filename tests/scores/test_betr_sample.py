"""BETR with vectors of a sample alone: what `betr` finds, at the price of the sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from pipeline.curation import curate
from pipeline.errors import TamisError
from pipeline.scores.betr_sample import BetrSample

LSA = {"kind": "lsa", "dims": 16, "features": 4096}
SMALL = {"dim": 8, "bucket": 5000, "lr": 0.5, "epoch": 15}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 rows of four kinds, with ids, and examples of the first kind; every row is there twice under other ids."""
    directory: Path = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = [[f"{kind}{i}" for i in range(60)] for kind in ("tree", "bird", "rock", "boat")]
    texts = [" ".join(rng.choice(words[i % 4], 30)) for i in range(300)]
    table = pa.table({"id": [f"r{i}" for i in range(600)], "text": texts * 2})
    pq.write_table(table, directory / "corpus.parquet", row_group_size=100)
    (directory / "targets.txt").write_text("\n".join(" ".join(rng.choice(words[0], 30)) for _ in range(10)))
    return directory


def run(
    corpus: Path,
    directory: Path,
    kind: str = "betr_sample",
    shard_mb: float = 8,
    named: str | None = "id",
    **changes: Any,
) -> np.ndarray:
    fields = {"embed": LSA} if kind == "betr_sample" else {}
    score = {"kind": kind, "targets": str(corpus / "targets.txt"), "fasttext": SMALL, "positive_share": 0.25, **fields}
    config = {
        "corpus": {"path": str(corpus / "corpus.parquet"), "id": named, "shard_mb": shard_mb},
        "scores": [score | changes.pop("score", {})],
        "select": {"budget": {"fraction": 0.2}},
        "engine": {"address": "inline"},
        "run": str(directory),
    }
    curate(config | changes, quiet=True)
    return np.asarray(ds.dataset(directory / f"columns/{kind}").to_table()["score"].to_numpy())


def test_only_the_sample_is_embedded_and_the_rest_is_found_all_the_same(corpus: Path, tmp_path: Path) -> None:
    score = run(corpus, tmp_path, score={"sample": 120})
    assert roc_auc_score(np.arange(600) % 4 == 0, score) > 0.95
    vectors = ds.dataset(tmp_path / "columns/betr_sample-sample").to_table()
    inside = vectors["vector"].is_valid().to_numpy()
    assert len(set(vectors["key"].filter(pa.array(inside)).to_pylist())) == 120  # distinct texts
    assert inside.sum() == 240
    assert not (tmp_path / "columns/embed").exists()
    facts = json.loads((tmp_path / "artifacts/betr_sample/betr.json").read_text())
    assert (facts["sample"], facts["positives"]) == (120, 30)


def test_shards_do_not_matter_and_a_second_run_embeds_nothing(corpus: Path, tmp_path: Path) -> None:
    scores = [run(corpus, tmp_path / str(mb), shard_mb=mb, score={"sample": 150}) for mb in (8, 1e-6)]
    assert scores[0].tobytes() == scores[1].tobytes()
    parts = sorted((tmp_path / "8/columns/betr_sample-sample").glob("*.parquet"))
    before = [p.stat().st_mtime_ns for p in parts]
    run(corpus, tmp_path / "8", score={"sample": 150})
    assert [p.stat().st_mtime_ns for p in parts] == before


def test_it_labels_as_betr_does_where_the_sample_is_the_corpus(corpus: Path, tmp_path: Path) -> None:
    """Without ids both draw distinct texts; the embedding is the same, so are ranks, classifier and scores."""
    ours = run(corpus, tmp_path / "sample", named=None)
    theirs = run(corpus, tmp_path / "all", "betr", named=None, embed=LSA)
    np.testing.assert_array_equal(ours, theirs)


def test_errors_at_the_door(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="classifier"):
        BetrSample.model_validate({"targets": "t.txt", "classifier": "linear"})
    with pytest.raises(TamisError, match="embeds every row anyway: use `kind: betr`"):
        run(corpus, tmp_path, embed=LSA)
