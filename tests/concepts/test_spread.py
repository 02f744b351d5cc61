"""Effective rank and matrix entropy: their toys, and what a run says of its selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.concepts.spread import Spread, effective_rank, gram, matrix_entropy, measure
from pipeline.config import Config, parse
from pipeline.curation import curate, sieve
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError, TamisError
from pipeline.run import Run


def entropy(x: np.ndarray) -> float:
    return matrix_entropy(np.linalg.eigvalsh(gram(x)).clip(0))


def test_effective_rank() -> None:
    assert effective_rank(np.array([3.0, 1])) == pytest.approx(1.754765, abs=1e-6)
    assert np.log(effective_rank(np.array([3.0, 1]))) == pytest.approx(0.562335, abs=1e-6)
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([5.0, 0, 0])) == 1


def test_matrix_entropy_by_either_gram() -> None:
    assert matrix_entropy(np.array([0.9, 0.1])) == pytest.approx(0.325083, abs=1e-6)
    assert np.exp(matrix_entropy(np.array([0.9, 0.1]))) == pytest.approx(1.384145, abs=1e-6)
    x = np.array([[1, 0, 0], [0, 1, 0], [np.sqrt(0.5), np.sqrt(0.5), 0]])
    np.testing.assert_allclose(np.linalg.eigvalsh(x @ x.T / 3), [0, 1 / 3, 2 / 3], atol=1e-12)
    for matrix in (x @ x.T, x.T @ x):
        assert matrix_entropy(np.linalg.eigvalsh(matrix).clip(0)) == pytest.approx(0.636514, abs=1e-6)
    left_out = [entropy(np.delete(x, i, axis=0)) for i in range(3)]
    np.testing.assert_allclose(left_out, [0.416496, 0.416496, 0.693147], atol=1e-6)
    assert left_out[2] > entropy(x)  # row 2 is the redundant one


def test_the_smaller_gram_has_the_same_spectrum() -> None:
    x = np.random.default_rng(0).standard_normal((5, 12))
    assert (gram(x).shape, gram(x.T).shape) == ((5, 5), (5, 5))
    np.testing.assert_allclose(np.linalg.eigvalsh(gram(x)), np.linalg.eigvalsh(x.T @ x)[-5:], rtol=1e-10)


def configuration(directory: Path, *scores: Any, **changes: Any) -> Config:
    """Two concepts of eight dimensions: three rows in four of a concept lie on one direction."""
    rng = np.random.default_rng(0)
    concept = np.arange(300) % 2
    x = np.zeros((300, 8))
    x[np.arange(300), concept * 4] = 3
    wide = rng.random(300) < 0.25
    x[wide] += 2 * rng.standard_normal((wide.sum(), 8)) * (np.arange(8) // 4 == concept[wide, None])
    x += 0.01 * rng.standard_normal((300, 8))
    table = pa.table({"text": [f"row {i}" for i in range(300)], "vector": list(x.astype(np.float32))})
    (directory / "corpus").mkdir(exist_ok=True)
    pq.write_table(table, directory / "corpus" / "rows.parquet", row_group_size=60)
    base: dict[str, Any] = {
        "corpus": {"path": str(directory / "corpus"), "shard_mb": 1e-6},
        "embed": {"kind": "precomputed", "column": "vector"},
        "cluster": {"k": 2},
        "scores": list(scores),
        "select": {"budget": {"rows": 30}},
        "engine": {"address": "inline"},
        "run": str(directory / "run"),
    }
    return parse(base | changes)


def measured(config: Config) -> Spread:
    with Run(config, InlinePool, quiet=True) as run:
        sieve(run)
        found = measure(run)
        passes = len(run.manifest["passes"])
        again = measure(run)  # is read, not computed
        assert len(run.manifest["passes"]) == passes
    assert again.whole == found.whole
    return found


def test_a_diverse_selection_spreads_more_than_chance(tmp_path: Path) -> None:
    found = measured(configuration(tmp_path, {"kind": "diversity", "method": "k_center"}))
    table = pl.DataFrame(found.concepts)
    assert table["concept"].to_list() == [0, 1]
    assert table["rows"].sum() == found.whole["rows"] == 300
    assert table["rows_kept"].sum() == found.whole["rows_kept"] == 30
    for row in [found.whole, *table.to_dicts()]:
        assert 1 <= row["erank_drawn"] < row["erank_kept"] <= 8
        assert row["entropy_drawn"] < row["entropy_kept"] <= np.log(8)
    artifact = tmp_path / "run/artifacts/spread"
    assert json.loads((artifact / "spread.json").read_text()) == found.whole
    assert pq.read_table(artifact / "concepts.parquet").equals(found.concepts)


def test_what_is_measured_is_the_matrix_itself(tmp_path: Path) -> None:
    found = measured(configuration(tmp_path, "random", select={"budget": {"rows": 150}}))
    columns = tmp_path / "run/columns"
    x = np.array(pl.read_parquet(columns / "embed/*.parquet")["vector"].to_list())
    keep = pl.read_parquet(columns / "select/*.parquet")["keep"].to_numpy()
    concept = pl.read_parquet(columns / "concept/*.parquet")["concept"].to_numpy()
    sets = {"": np.ones(300, bool), "_kept": keep}
    for which, rows in sets.items():
        assert found.whole[f"erank{which}"] == pytest.approx(effective_rank(np.linalg.svd(x[rows])[1]))
        for j, row in enumerate(pl.DataFrame(found.concepts).to_dicts()):
            s = np.linalg.svd(x[rows & (concept == j)])[1]
            assert row[f"erank{which}"] == pytest.approx(effective_rank(s))
            assert row[f"entropy{which}"] == pytest.approx(matrix_entropy(s**2))
    assert found.whole["erank_drawn"] == pytest.approx(found.whole["erank_kept"], rel=0.1)  # both are random


def test_a_concept_of_which_nothing_is_kept_has_no_spread(tmp_path: Path) -> None:
    config = configuration(tmp_path, "density", select={"budget": {"rows": 1}, "quotas": "none"})
    table = pl.DataFrame(measured(config).concepts)
    assert sorted(zip(table["rows_kept"], table["erank_kept"], table["entropy_kept"], strict=True)) == [
        (0, 0.0, 0.0),
        (1, pytest.approx(1), pytest.approx(0)),
    ]


def test_without_concepts_it_says_what_is_missing(tmp_path: Path) -> None:
    config = configuration(tmp_path, "random", embed=None, cluster=None)
    with Run(config, InlinePool, quiet=True) as run:
        sieve(run)
        with pytest.raises(TamisError, match="this run has no embed and concept"):
            measure(run)


def test_the_report_tells_where_it_is_asked_for(tmp_path: Path) -> None:
    config = configuration(tmp_path, {"kind": "diversity"}, output={"spread": True})
    curate(config, pool=InlinePool, quiet=True)
    whole = json.loads((tmp_path / "run/artifacts/spread/spread.json").read_text())
    page = (tmp_path / "run/report/index.html").read_text()
    assert f"an effective rank of {whole['erank_kept']:.1f}, all have {whole['erank']:.1f}" in page


def test_it_needs_concepts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output\.spread compares concepts"):
        configuration(tmp_path, "random", cluster=None, output={"spread": True})
