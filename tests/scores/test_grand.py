"""GraNd through the whole job; its numbers are in test_head.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.curation import curate
from pipeline.engine.pool import InlinePool


def test_wrong_labels_have_the_largest_gradients_and_without_a_hidden_layer_it_is_el2n(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    wrong = rng.random(300) < 0.1
    x = rng.standard_normal((300, 6)) * 0.25 + np.eye(6)[y]
    texts = [f"text {i}" for i in range(300)]
    table = pa.table({"text": texts, "vector": list(x), "label": np.where(wrong, (y + 1) % 3, y)})
    pq.write_table(table, tmp_path / "corpus.parquet")
    shared = {"label": "label", "models": 2, "epochs": 10}
    config = {
        "corpus": {"path": str(tmp_path / "corpus.parquet")},
        "embed": {"kind": "precomputed", "column": "vector"},
        "scores": [
            {"kind": "grand", **shared},
            {"kind": "grand", "name": "last", "layers": "last", "hidden": 0, **shared},
            {"kind": "el2n", "hidden": 0, **shared},
        ],
        "select": {"budget": {"rows": 100}},
        "engine": {"address": "inline"},
        "run": str(tmp_path / "run"),
    }
    assert curate(config, pool=InlinePool, quiet=True).rows_kept == 100
    columns = tmp_path / "run/columns"
    score = {
        n: pq.read_table(columns / n / "part-00000.parquet")["score"].to_numpy() for n in ("grand", "last", "el2n")
    }
    assert roc_auc_score(wrong, score["grand"]) > 0.95
    np.testing.assert_allclose(score["last"], np.sqrt(2) * score["el2n"], rtol=2e-3)  # vectors are float16
    assert score["grand"] != pytest.approx(score["last"], rel=0.05)
