"""The main job from end to end, on the sample corpus and on bad input, as its users run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from pipeline import curate
from pipeline.config import parse
from pipeline.engine.pool import InlinePool, RayPool
from pipeline.errors import ConfigError, CorpusError, TamisError, TooManyBadRows

ROOT = Path(__file__).parent.parent
SAMPLE = str(ROOT / "examples" / "sample")


def configuration(run: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "corpus": {"path": SAMPLE, "id": "id", "source": "source"},
        "embed": {"kind": "lsa", "dims": 32},
        "cluster": {"k": 12},
        "scores": [{"kind": "density"}, {"kind": "heuristics"}, {"kind": "length"}, {"kind": "random"}],
        "select": {"budget": {"tokens": 150_000}, "floors": {"heuristics": 1}, "weights": {"density": 2, "length": 1}},
        "engine": {"address": "inline"},
        "run": str(run),
    }
    return base | changes


def simple(run: Path, place: Path, **changes: Any) -> dict[str, Any]:
    """A run that needs no vectors, over a corpus with the columns id and text."""
    base = {"corpus": {"path": str(place), "id": "id"}, "scores": ["random"], "select": {"budget": {"fraction": 0.5}}}
    return configuration(run) | {"embed": None, "cluster": None} | base | changes


def digests(run: Path) -> dict[str, str]:
    """Content of everything in a run that results are made of (the manifest and the report hold times)."""
    kinds = ("columns", "artifacts", "curated", "handoff", "quarantine")
    files = [f for kind in kinds for f in sorted((run / kind).rglob("*")) if f.is_file()]
    return {
        str(f.relative_to(run)): hashlib.sha256(f.read_bytes().replace(str(run).encode(), b"RUN")).hexdigest()
        for f in files
    }


def texts(directory: Path, rows: int, files: int = 2) -> Path:
    rng = np.random.default_rng(0)
    words = np.array(["sieve", "corpus", "model", "budget", "token", "concept", "shard", "vector", "quality", "row"])
    for i in range(files):
        body = [" ".join(rng.choice(words, 40)) + f" {i} {j}" for j in range(rows)]
        directory.mkdir(exist_ok=True)
        table = pa.table({"id": [f"{i}-{j}" for j in range(rows)], "text": body})
        pq.write_table(table, directory / f"part-{i}.parquet", row_group_size=max(1, rows // 3))
    return directory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    curate(configuration(run), quiet=True)
    return run


def test_the_run_holds_what_the_contract_names(undisturbed: Path) -> None:
    names = {p.name for p in undisturbed.iterdir()}
    assert {"manifest.json", "README.md", "columns", "artifacts", "curated", "report", "handoff.json"} <= names
    assert (undisturbed / "report" / "index.html").stat().st_size > 10_000
    assert "scratch" not in names
    assert "lock.json" not in names
    assert json.loads((undisturbed / "manifest.json").read_text())["status"] == "done"


def test_the_budget_is_filled_exactly(undisturbed: Path) -> None:
    selection = json.loads((undisturbed / "artifacts/selection/selection.json").read_text())
    tokens = pl.read_parquet(f"{undisturbed}/columns/row/*.parquet")["tokens"]
    kept = pl.read_parquet(f"{undisturbed}/columns/select/*.parquet")["keep"]
    assert tokens.filter(kept).sum() == selection["tokens"] <= 150_000
    assert selection["tokens"] + selection["next_row"] > 150_000


def test_every_row_has_its_reason(undisturbed: Path) -> None:
    reasons = pl.read_parquet(f"{undisturbed}/columns/select/*.parquet")["reason"]
    rows = pq.read_table(SAMPLE).num_rows
    assert len(reasons) == rows
    assert reasons.null_count() == 0
    assert reasons.cast(pl.String).str.starts_with("heuristics:").any()


def test_the_curated_set_is_the_kept_rows_in_order(undisturbed: Path, tmp_path: Path) -> None:
    source = pl.read_parquet(f"{SAMPLE}/*.parquet")
    keep = pl.read_parquet(f"{undisturbed}/columns/select/*.parquet")["keep"]
    curated = pl.read_parquet(f"{undisturbed}/curated/*.parquet")
    assert curated.drop("tamis").equals(source.filter(keep))
    scores = curated["tamis"].struct
    assert pq.read_table(undisturbed / "curated").num_rows == len(curated)
    assert load_dataset(str(undisturbed), cache_dir=str(tmp_path), split="train").num_rows == len(curated)
    assert {"id", "concept", "density", "heuristics", "length", "random"} == set(scores.fields)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_do_not_depend_on_the_workers(
    workers: int, undisturbed: Path, tmp_path: Path, ray_pool: Callable[[int], RayPool]
) -> None:
    curate(configuration(tmp_path / "run"), pool=lambda: ray_pool(workers), quiet=True)
    assert digests(tmp_path / "run") == digests(undisturbed)


def test_a_second_call_computes_nothing(undisturbed: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in (undisturbed / "columns").rglob("*.parquet")}
    curate(configuration(undisturbed), quiet=True)
    assert {f: f.stat().st_mtime_ns for f in (undisturbed / "columns").rglob("*.parquet")} == before
    passes = json.loads((undisturbed / "manifest.json").read_text())["passes"]
    assert not [p for p in passes if p["pass"].startswith(("row", "fit", "concept", "select", "write"))]


def test_another_budget_touches_no_score(tmp_path: Path, undisturbed: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    scores = ("row", "embed", "concept", "density", "heuristics", "length", "random")
    before = {f: f.stat().st_mtime_ns for name in scores for f in (run / "columns" / name).iterdir()}
    changed = configuration(run)
    changed["select"] = changed["select"] | {"budget": {"rows": 77}}
    result = curate(changed, quiet=True)
    assert result.rows_kept == 77
    assert {f: f.stat().st_mtime_ns for name in scores for f in (run / "columns" / name).iterdir()} == before


def test_hand_off_subsets_are_disjoint_and_kept(undisturbed: Path) -> None:
    hand = json.loads((undisturbed / "handoff.json").read_text())
    ids = {n: set(pl.read_parquet(f"{undisturbed}/handoff/{n}/*.parquet")["id"]) for n in ("calibration", "recovery")}
    kept = set(pl.read_parquet(f"{undisturbed}/curated/*.parquet")["id"])
    assert not ids["calibration"] & ids["recovery"]
    assert ids["calibration"] | ids["recovery"] <= kept
    assert hand["calibration"]["num_samples"] == len(ids["calibration"])


def test_calibration_covers_every_concept_that_was_kept(undisturbed: Path) -> None:
    concept = pl.read_parquet(f"{undisturbed}/columns/concept/*.parquet")["concept"]
    names = ("select", "handoff_calibration")
    kept, drawn = (pl.read_parquet(f"{undisturbed}/columns/{n}/*.parquet")["keep"] for n in names)
    assert set(concept.filter(drawn)) == set(concept.filter(kept))


def test_nanochat_layout_is_what_that_trainer_reads(tmp_path: Path) -> None:
    result = curate(configuration(tmp_path / "run", output={"layout": "nanochat"}), quiet=True)
    files = sorted((tmp_path / "run/curated").glob("shard_*.parquet"))
    assert [f.name for f in files] == [f"shard_{i:05d}.parquet" for i in range(len(files))]
    assert len(files) >= 2
    assert all(pq.read_schema(f).names == ["text"] for f in files)
    assert sum(pq.read_metadata(f).num_rows for f in files) == result.rows_kept
    assert pq.read_metadata(files[-1]).num_rows == max(1, result.rows_kept // 100)


def test_a_small_file_size_makes_more_files(tmp_path: Path) -> None:
    result = curate(configuration(tmp_path / "run", output={"file_mb": 0.05}), quiet=True)
    assert len(result.files) > 2
    assert sum(pq.read_metadata(tmp_path / "run/curated" / f).num_rows for f in result.files) == result.rows_kept


# ---- bad input


def test_unusable_text_goes_to_quarantine_with_its_address(tmp_path: Path) -> None:
    corpus = texts(tmp_path / "corpus", 30)
    broken = pa.array([b"fine " * 9, None, b"\xff\xfe\xfa", b"  \n", b"long " * 4_000_000], pa.binary())
    bad = pa.StringArray.from_buffers(5, *broken.buffers()[1:], broken.buffers()[0])
    pq.write_table(pa.table({"id": list("abcde"), "text": bad}), corpus / "part-9.parquet")
    config = simple(tmp_path / "run", corpus, select={"budget": {"fraction": 1.0}})
    result = curate(config, quiet=True)
    assert result.rows_kept == 62
    assert result.reasons["quarantined"] == 3
    held = pl.read_parquet(f"{tmp_path}/run/quarantine/row/*.parquet")
    assert dict(zip(held["row"], held["reason"], strict=True)) == {
        1: "null text",
        2: "text is not UTF-8",
        3: "blank text",
    }
    assert held["file"].str.ends_with("part-9.parquet").all()
    assert "e" in set(pl.read_parquet(f"{tmp_path}/run/curated/*.parquet")["id"])  # 20 MB is a text like any other


def test_a_file_that_cannot_be_read_is_listed_and_the_rest_goes_on(tmp_path: Path) -> None:
    corpus = texts(tmp_path / "corpus", 30, files=3)
    whole = (corpus / "part-1.parquet").read_bytes()
    (corpus / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"id": ["x"], "text": [7]}), corpus / "part-3.parquet")
    result = curate(simple(tmp_path / "run", corpus, select={"budget": {"fraction": 1.0}}), quiet=True)
    assert result.exit_code == 2
    assert result.rows_kept == 60
    reasons = {Path(f["file"]).name: f["reason"] for f in result.failures}
    assert reasons["part-1.parquet"].startswith("unreadable")
    assert "column 'text' is int64, in the first file string" in reasons["part-3.parquet"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"select": {"budget": {"rows": 1_000_000}}}, ConfigError, "more than the corpus has, 60 rows"),
        ({"select": {"budget": {"tokens": 10**12}}}, ConfigError, "more than the corpus has"),
        ({"cluster": {"k": 1000}}, ConfigError, "cluster.k = 1,000 but the corpus has 60 rows"),
        ({"corpus": {"path": "nowhere/*.parquet"}}, CorpusError, "no Parquet file at 'nowhere"),
        ({"corpus": {"path": "CORPUS", "text": "body"}}, ConfigError, "corpus.text: the corpus has no column 'body'"),
        ({"corpus": {"path": "CORPUS", "id": "key"}}, ConfigError, "corpus.id: the corpus has no column 'key'"),
        ({"scores": [{"kind": "quality", "model": "no/model.bin"}]}, ConfigError, "no/model.bin"),
        (
            {"embed": {"kind": "sentence_transformer", "model": "./no-model"}, "cluster": {"k": 2}},
            ConfigError,
            "no-model",
        ),
    ],
)
def test_what_cannot_work_is_said_before_work_starts(
    tmp_path: Path, change: dict[str, Any], error: type[TamisError], words: str
) -> None:
    corpus = texts(tmp_path / "corpus", 30)
    if change.get("corpus", {}).get("path") == "CORPUS":
        change = change | {"corpus": change["corpus"] | {"path": str(corpus)}}
    with pytest.raises(error) as caught:
        curate(simple(tmp_path / "run", corpus, **change), quiet=True)
    assert words in str(caught.value)


def test_a_corpus_without_rows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "corpus/a.parquet"
    )
    with pytest.raises(CorpusError, match="no rows"):
        curate(simple(tmp_path / "run", tmp_path / "corpus"), quiet=True)


def test_identical_rows_all_the_way_through(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"text": ["the same text in every row"] * 50}), tmp_path / "corpus/a.parquet")
    config = configuration(
        tmp_path / "run",
        corpus={"path": str(tmp_path / "corpus")},
        cluster={"k": 5},
        scores=["density"],
        select={"budget": {"rows": 20}},
    )
    assert curate(config, quiet=True).rows_kept == 20


def test_vectors_that_are_no_vectors_are_quarantined(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    vectors = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    vectors[7], vectors[9] = np.nan, 0
    table = pa.table(
        {"text": [f"text {i}" for i in range(60)], "v": pa.FixedSizeListArray.from_arrays(vectors.ravel(), 4)}
    )
    pq.write_table(table, tmp_path / "corpus/a.parquet")
    config = configuration(
        tmp_path / "run",
        corpus={"path": str(tmp_path / "corpus")},
        embed={"kind": "precomputed", "column": "v"},
        cluster={"k": 3},
        scores=["density"],
        select={"budget": {"fraction": 1.0}},
    )
    result = curate(config, quiet=True)
    assert (result.rows_kept, result.reasons["quarantined"]) == (58, 2)
    held = pl.read_parquet(f"{tmp_path}/run/quarantine/embed/*.parquet")
    assert sorted(held["row"]) == [7, 9]
    with pytest.raises(TooManyBadRows, match="max_bad_fraction"):
        curate(
            config | {"engine": {"address": "inline", "max_bad_fraction": 0.01}, "run": str(tmp_path / "strict")},
            quiet=True,
        )


def test_a_changed_recipe_recomputes_what_depends_on_it(tmp_path: Path, undisturbed: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    changed = configuration(run)
    changed["scores"] = [
        s if s["kind"] != "length" else {"kind": "length", "prefer": "short"} for s in changed["scores"]
    ]
    curate(changed, quiet=True)
    computed = {n: c["computed"] for n, c in json.loads((run / "manifest.json").read_text())["columns"].items()}
    shards = json.loads((run / "manifest.json").read_text())["corpus"]["shards"]
    assert {n for n in ("row", "embed", "concept", "density", "heuristics", "random") if computed[n]} == set()
    assert computed["length"] == computed["select"] == shards


def test_a_pool_of_ones_own(tmp_path: Path) -> None:
    config = parse(simple(tmp_path / "run", texts(tmp_path / "corpus", 20)))
    assert curate(config, pool=InlinePool, quiet=True).rows_kept == 20
