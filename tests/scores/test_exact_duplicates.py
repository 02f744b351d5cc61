"""Exact duplicates across shards, which of them stays, and what is told about the groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError
from pipeline.scores._duplicates import Groups
from pipeline.scores.exact_duplicates import ExactDuplicates, normalise

TEXTS = [
    "Caf\u00e9  au lait",  # group of 0, 3, 5
    "something else",
    "one of a pair",  # group of 2, 6
    "cafe\u0301 au\n lait",
    "alone",
    "  CAF\u00c9 au lait ",
    "One of a Pair   ",
]


def write(directory: Path, texts: list[str | None], shard_rows: int = 2) -> Path:
    pq.write_table(pa.table({"text": texts}), directory / "corpus.parquet", row_group_size=shard_rows)
    return directory / "corpus.parquet"


def curated(directory: Path, path: Path, scores: list[dict[str, Any]], floors: dict[str, float]) -> Any:
    config = {
        "corpus": {"path": str(path), "shard_mb": 1e-6},
        "scores": scores,
        "select": {"floors": floors, "budget": {"fraction": 1.0}},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(directory / "run"),
    }
    return curate(config, pool=InlinePool, quiet=True)


def stored(directory: Path, name: str) -> dict[str, list[Any]]:
    parts = sorted((directory / "run/columns" / name).glob("*.parquet"))
    values: dict[str, list[Any]] = pa.concat_tables([pq.read_table(p) for p in parts]).to_pydict()
    return values


def address(row: int) -> int:
    """Of a row of `write`: shard of two rows, packed."""
    return (row // 2 << 32) | row % 2


def test_one_row_of_every_group_is_kept(tmp_path: Path) -> None:
    result = curated(tmp_path, write(tmp_path, TEXTS), [{"kind": "exact_duplicates"}], {"exact_duplicates": 0})
    assert stored(tmp_path, "exact_duplicates") == {
        "score": [0, 0, 0, -1, 0, -1, -1],
        "group": [0, -1, address(2), 0, -1, 0, address(2)],
        "representative": [True, True, True, False, True, False, False],
        "size": [3, 1, 2, 3, 1, 3, 2],
        "rule": ["", "", "", "exact_duplicate", "", "exact_duplicate", "exact_duplicate"],
    }
    assert result.reasons == {"kept": 4, "exact_duplicates:exact_duplicate": 3}
    kept = [t for f in result.files for t in pq.read_table(Path(result.path, f))["text"].to_pylist()]
    assert sorted(kept) == sorted([TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4]])
    told = json.loads((tmp_path / "run/artifacts/exact_duplicates-groups/groups.json").read_text())
    assert {k: told[k] for k in ("rows", "groups", "rows_in_groups", "dropped")} == {
        "rows": 7,
        "groups": 2,
        "rows_in_groups": 5,
        "dropped": 3,
    }
    assert told["largest"] == [
        {"group": 0, "shard": 0, "row": 0, "size": 3},
        {"group": address(2), "shard": 1, "row": 0, "size": 2},
    ]


@pytest.mark.parametrize(
    ("fields", "stays"),
    [({}, 0), ({"keep": "longest"}, 3), ({"keep": "best", "by": "length"}, None)],
)
def test_which_row_stays(tmp_path: Path, fields: dict[str, Any], stays: int | None) -> None:
    scores = [{"kind": "length"}, {"kind": "exact_duplicates", **fields}]
    curated(tmp_path, write(tmp_path, ["a  b", "x", "a b", " A   B ", "a   b  ", "x"]), scores, {"exact_duplicates": 0})
    if stays is None:
        score, copies = np.array(stored(tmp_path, "length")["score"]), np.array([0, 2, 3, 4])
        stays = int(copies[np.argmax(score[copies])])
    assert np.flatnonzero(stored(tmp_path, "exact_duplicates")["representative"]).tolist() == sorted([1, stays])


def test_two_criteria_do_not_drop_each_other_s_representatives(tmp_path: Path) -> None:
    copies = ["a  b", "x", "a b", " A   B ", "a   b  "]
    scores = [
        {"kind": "exact_duplicates", "keep": "longest", "name": "longest"},
        {"kind": "exact_duplicates", "keep": "first", "name": "first"},  # alone it would keep row 0
    ]
    result = curated(tmp_path, write(tmp_path, copies), scores, {"longest": 0, "first": 0})
    assert result.rows_kept == 2
    assert stored(tmp_path, "first")["representative"] == [False, True, False, True, False]


def test_a_corpus_of_nothing_but_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, ["the same text"] * 301, 100)
    result = curated(tmp_path, path, [{"kind": "exact_duplicates"}], {"exact_duplicates": 0})
    assert result.rows_kept == 1
    assert set(stored(tmp_path, "exact_duplicates")["group"]) == {0}
    assert "one group holds 301 of 301 rows" in caplog.text


def test_unusable_rows_take_no_part(tmp_path: Path) -> None:
    path = write(tmp_path, ["a", None, "a", "  ", "b"] * 4 + ["c"] * 200, 55)
    result = curated(tmp_path, path, [{"kind": "exact_duplicates"}], {"exact_duplicates": 0})
    assert result.rows_kept == 3
    assert stored(tmp_path, "exact_duplicates")["size"][:5] == [8, None, 8, None, 4]


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, TEXTS)
    scores = [{"kind": "exact_duplicates"}]
    curated(tmp_path, path, scores, {"exact_duplicates": 0})
    curated(tmp_path, path, scores, {"exact_duplicates": 0})
    passes = {p["pass"] for p in json.loads((tmp_path / "run/manifest.json").read_text())["passes"]}
    assert not passes & {"exact_duplicates split", "exact_duplicates gather", "exact_duplicates scatter", "groups"}


@given(st.lists(st.text(min_size=1).filter(lambda t: "\0" not in t), min_size=1, max_size=10))
def test_normalising_twice_changes_nothing(texts: list[str]) -> None:
    once = normalise(pa.array(texts, pa.string()))
    assert normalise(once).equals(once)


def test_what_counts_as_the_same() -> None:
    same = ["Stra\u00dfe \u00c4\u2003x", "  stra\u00dfe\t\n a\u0308 X", "STRA\u1e9eE \u00e4\u00a0x "]
    assert normalise(pa.array([*same, "a.b"])).to_pylist() == ["stra\u00dfe \u00e4 x"] * 3 + ["a.b"]


def test_groups_merge_in_any_cut() -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(1, 50, 400).astype(np.int32)
    batch = pa.record_batch(
        [pa.array(size), pa.array(np.arange(400)), pa.array(rng.random(400) < 0.5)], list(Groups("x").inputs)
    )
    whole = Groups("x").update({}, batch)
    parts = Groups("x").merge([Groups("x").update({}, batch.slice(i, 100)) for i in range(0, 400, 100)])
    assert all(np.array_equal(whole[k], parts[k]) for k in whole)
    own = batch.column(2).to_numpy(zero_copy_only=False) & (size > 1)
    assert whole["count"].tolist() == [400, own.sum(), (size > 1).sum()]
    assert whole["size"].tolist() == np.sort(size[own])[::-1][:20].tolist()


@pytest.mark.parametrize(("fields", "says"), [({"keep": "best"}, "needs `by`"), ({"by": "length"}, "needs `by`")])
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ExactDuplicates.model_validate(fields)


def test_a_score_to_decide_must_be_there(tmp_path: Path) -> None:
    scores = [{"kind": "exact_duplicates", "keep": "best", "by": "quality"}, {"kind": "length"}]
    with pytest.raises(ConfigError, match="no score 'quality' is filled before it; there are length"):
        curated(tmp_path, write(tmp_path, TEXTS), scores, {"exact_duplicates": 0})
