"""Diversity as a score: orders inside concepts, across shards, with another score, and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline import curate
from pipeline.config import Config, parse
from pipeline.curation import sieve
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError
from pipeline.run import Run
from pipeline.scores.diversity import Diversity
from pipeline.select.config import Quotas

ROWS, CONCEPTS, DIMS = 240, 4, 16


def planted(directory: Path, files: int = 3) -> Path:
    """Four concepts, in each of which one row in two is a copy, close or exact, of one of ten others."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CONCEPTS, DIMS))
    subtopics = centres[:, None] + 0.3 * rng.standard_normal((CONCEPTS, 10, DIMS))
    concept, subtopic = rng.integers(0, CONCEPTS, ROWS), rng.integers(0, 10, ROWS)
    x = subtopics[concept, subtopic] + 0.01 * rng.standard_normal((ROWS, DIMS)) * rng.integers(0, 2, (ROWS, 1))
    table = pa.table(
        {
            "id": [f"row {i}" for i in range(ROWS)],
            "text": [f"{'word ' * int(n)}{i}" for i, n in enumerate(rng.integers(1, 40, ROWS))],
            "vector": list(x.astype(np.float32)),
            "subtopic": concept * 10 + subtopic,
        }
    )
    (directory / "corpus").mkdir()
    for i in range(files):
        step = ROWS // files
        pq.write_table(table.slice(i * step, step), directory / "corpus" / f"{i}.parquet", row_group_size=25)
    return directory / "corpus"


def configuration(corpus: Path, run: Path, *scores: Any, **select: Any) -> Config:
    return parse(
        {
            "corpus": {"path": str(corpus), "id": "id", "shard_mb": 1e-6},
            "embed": {"kind": "precomputed", "column": "vector"},
            "cluster": {"k": CONCEPTS},
            "scores": list(scores),
            "select": {"budget": {"rows": 40}} | select,
            "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
            "engine": {"address": "inline"},
            "run": str(run),
        }
    )


def filled(config: Config) -> pl.DataFrame:
    with Run(config, InlinePool, quiet=True) as run:
        sieve(run)
    columns = Path(config.run) / "columns"
    parts = [pl.read_parquet(columns / name / "*.parquet") for name in ("diversity", "concept", "select")]
    return pl.concat(parts, how="horizontal")


@pytest.mark.parametrize("method", ["facility_location", "k_center", "max_min", "max_sum"])
def test_every_concept_is_ordered_from_0_on(tmp_path: Path, method: str) -> None:
    rows = filled(configuration(planted(tmp_path), tmp_path / "run", {"kind": "diversity", "method": method}))
    assert rows.height == ROWS
    for (_,), concept in rows.group_by("concept"):
        n = concept.height
        assert sorted(concept["pick_order"].to_list()) == list(range(n))
        np.testing.assert_array_equal(concept["score"], (-concept["pick_order"].to_numpy() / n).astype(np.float32))
    assert not np.signbit(rows["score"].to_numpy()[rows["pick_order"].to_numpy() == 0]).any()


def test_a_run_keeps_one_row_of_every_subtopic(tmp_path: Path) -> None:
    corpus = planted(tmp_path)
    result = curate(configuration(corpus, tmp_path / "run", "diversity"), quiet=True)
    kept = pl.concat([pl.read_parquet(file) for file in sorted(Path(result.path).glob("*.parquet"))])
    assert result.rows_kept == 40
    assert kept["subtopic"].n_unique() >= 38
    drawn = curate(configuration(corpus, tmp_path / "drawn", "random"), quiet=True)
    random = pl.concat([pl.read_parquet(file) for file in sorted(Path(drawn.path).glob("*.parquet"))])
    assert random["subtopic"].n_unique() < 32


def test_quotas_are_proportional_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    config = configuration(planted(tmp_path), tmp_path / "run", "diversity")
    assert config.select.quotas_for(config.scores) == Quotas(rule="proportional")
    assert config.needs_concepts
    rows = filled(config)
    shares = rows.group_by("concept").agg(pl.col("keep").sum(), pl.len())
    assert (shares["keep"] - 40 * shares["len"] / ROWS).abs().max() <= 1
    for (_,), concept in rows.group_by("concept"):
        kept = concept.filter("keep")["pick_order"]
        assert sorted(kept.to_list()) == list(range(len(kept)))  # a prefix of the order


def test_shards_do_not_show(tmp_path: Path) -> None:
    corpus = planted(tmp_path)
    whole = configuration(corpus, tmp_path / "whole", "diversity").model_dump()
    whole["corpus"]["shard_mb"] = None
    split = filled(configuration(corpus, tmp_path / "split", "diversity"))
    assert filled(parse(whole)).equals(split)


def test_importance_is_another_score(tmp_path: Path) -> None:
    corpus = planted(tmp_path)
    mmr = {"kind": "diversity", "method": "mmr", "importance": "length", "lam": 1}
    rows = filled(configuration(corpus, tmp_path / "run", "length", mmr, weights={"diversity": 1}))
    scores = pl.read_parquet(tmp_path / "run/columns/length/*.parquet")["score"]
    for (_,), concept in rows.with_columns(length=scores).group_by("concept"):
        by_order = concept.sort("pick_order")["length"]
        assert by_order.to_list() == sorted(by_order.to_list(), reverse=True)  # lam 1: importance alone


@pytest.mark.parametrize("before", [[], ["random"]])
def test_an_importance_that_is_not_there_is_said_before_any_work(tmp_path: Path, before: list[str]) -> None:
    mmr = {"kind": "diversity", "method": "mmr", "importance": "length"}
    config = configuration(planted(tmp_path), tmp_path / "run", *before, mmr, "length")
    there = "are random" if before else "is none"
    with pytest.raises(ConfigError, match=f"diversity.importance: no score 'length' is listed before.*there {there}"):
        filled(config)
    assert not (tmp_path / "run/columns/embed").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "mmr"}, "set importance to its name, or use k_center"),
        ({"lam": 0.3}, "facility_location does not use lam"),
        ({"method": "mig", "importance": "x", "lam": 0.3}, "mig does not use lam"),
        ({"method": "k_centre"}, "k_center"),
        ({"trim": 1}, "less than 1"),
        ({"cap": 1}, "greater than or equal to 2"),
        ({"depth": 0}, "greater than 0"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Diversity.model_validate(fields)


def test_a_concept_of_one_row_and_copies_only() -> None:
    recipe, hashes = Diversity(method="k_center", cap=4), np.arange(11)
    assert recipe.order(np.ones((1, 1), np.float32), np.zeros(1), hashes[:1]).tolist() == [0]
    copies = np.tile(np.float32([[0.6, 0.8]]), (11, 1))
    assert sorted(recipe.order(copies, np.zeros(11), hashes).tolist()) == list(range(11))
    assert Diversity().order(copies, np.zeros(11), hashes).tolist() == list(range(11))


def test_what_shapes_the_order_is_in_the_identity() -> None:
    class Fake:
        seed = 0

    def identity(**fields: Any) -> str:
        return Diversity.model_validate(fields).column(Fake()).identity  # type: ignore[arg-type]  # stands for a run

    assert identity() == identity(name="other")
    others = [{"method": "k_center"}, {"depth": 0.5}, {"trim": 0.1}, {"cap": 50}]
    assert len({identity(), *(identity(**o) for o in others)}) == 1 + len(others)
