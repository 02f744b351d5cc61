"""EL2N on a labelled corpus with known wrong labels, through the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.errors import TamisError
from pipeline.scores.el2n import El2n

ROWS = 400


def labelled(directory: Path, group: int = 100) -> tuple[Path, np.ndarray]:
    """Four classes of vectors, a tenth of the labels wrong; the folder, and which labels are wrong."""
    rng = np.random.default_rng(0)
    y = np.arange(ROWS) % 4
    x = rng.standard_normal((ROWS, 8)) * 0.25 + np.eye(8)[y]
    wrong = rng.random(ROWS) < 0.1
    label = np.where(wrong, (y + 1 + rng.integers(0, 3, ROWS)) % 4, y)
    table = pa.table(
        {
            "text": [f"text {i}" for i in range(ROWS)],
            "vector": list(x.astype(np.float32)),
            "label": [f"class {c}" for c in label],
            "number": label,
            "one": ["same"] * ROWS,
            "real": label.astype(float),
        }
    )
    (directory / "corpus").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, directory / "corpus/part.parquet", row_group_size=group)
    return directory / "corpus", wrong


def scores_of(directory: Path, corpus: Path, **score: Any) -> np.ndarray:
    """Scores in the corpus's order, after a whole job that keeps half; row groups are shards."""
    config = {
        "corpus": {"path": str(corpus), "shard_mb": 1e-6},
        "embed": {"kind": "precomputed", "column": "vector"},
        "scores": [{"models": 3, "sample": 400} | score],
        "select": {"budget": {"fraction": 0.5}},
        "engine": {"address": "inline", "max_bad_fraction": 1},
        "run": str(directory / "run"),
    }
    assert curate(config, pool=InlinePool, quiet=True).rows_kept == ROWS // 2
    parts = sorted((directory / f"run/columns/{score['kind']}").iterdir())
    return np.concatenate([pq.read_table(part)["score"].to_numpy() for part in parts])


@pytest.mark.parametrize("label", ["label", "number"])
def test_wrong_labels_are_the_hardest_rows(tmp_path: Path, label: str) -> None:
    corpus, wrong = labelled(tmp_path)
    score = scores_of(tmp_path, corpus, kind="el2n", label=label, epochs=10)
    assert roc_auc_score(wrong, score) > 0.95
    assert 0 <= score.min() <= score.max() <= np.sqrt(2)


def test_easy_is_the_other_end_and_shards_do_not_matter(tmp_path: Path) -> None:
    corpus, _ = labelled(tmp_path)
    hard = scores_of(tmp_path / "hard", corpus, kind="el2n", label="label")
    labelled(tmp_path / "other", group=37)
    other = scores_of(tmp_path / "other", tmp_path / "other/corpus", kind="el2n", label="label")
    np.testing.assert_array_equal(hard, other)
    easy = scores_of(tmp_path / "easy", corpus, kind="el2n", label="label", keep="easy")
    np.testing.assert_array_equal(hard, -easy)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("nothing", r"el2n\.label: the corpus has no column 'nothing'; it has text, vector"),
        ("real", "column 'real' is double: labels are texts, whole numbers or booleans"),
        ("one", "400 rows with 1 labels are too few to learn from"),
    ],
)
def test_labels_that_cannot_be_learnt(tmp_path: Path, label: str, says: str) -> None:
    corpus, _ = labelled(tmp_path)
    with pytest.raises(TamisError, match=says):
        scores_of(tmp_path, corpus, kind="el2n", label=label)


def test_a_label_is_asked_for() -> None:
    with pytest.raises(ValidationError, match="label"):
        El2n.model_validate({"kind": "el2n"})
