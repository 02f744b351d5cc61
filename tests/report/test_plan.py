"""The plan against what a run then does. Times are not compared: they are the machine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import curate
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.report import plan as planning
from pipeline.report.plan import make_plan, model_flops, print_plan

WORDS = ("sieve", "corpus", "model", "budget", "token", "concept", "shard", "vector", "quality", "row", "grain")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    for file in range(3):
        texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(40)) + f" {file} {i}" for i in range(1000)]
        ids = [f"{file}-{i}" for i in range(1000)]
        pq.write_table(pa.table({"id": ids, "text": texts}), directory / f"{file}.parquet", row_group_size=250)
    return directory


def configuration(corpus: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "id": "id", "shard_mb": 0.001},
        "embed": {"kind": "lsa", "dims": 8},
        "cluster": {"k": 6},
        "scores": ["length", "random", "density"],
        "select": {"budget": {"fraction": 0.2}},
        "engine": {"address": "inline"},
        "run": str(run),
    } | changes


def test_counts_and_sizes_are_those_of_the_run(corpus: Path, tmp_path: Path) -> None:
    config = parse(configuration(corpus, tmp_path / "run"))
    plan = make_plan(config)
    assert not (tmp_path / "run").exists()
    assert (plan.rows, plan.files, plan.shards, plan.workers) == (3000, 3, 12, 1)
    assert plan.kept_rows == pytest.approx(600)
    assert plan.columns["embed"] == 3000 * 8 * 2
    assert all(stage.seconds > 0 for stage in plan.stages)
    names = [stage.name for stage in plan.stages]
    assert names[-4:] == ["k-means, k = 6", "concept", "select and report", "write"]
    assert "row+embed+length+random" in names
    concept = plan.stages[names.index("concept")]
    assert concept.flops == 2 * 6 * 8 * 3000

    result = curate(config, quiet=True)
    fitted = (tmp_path / "run" / "artifacts" / "lsa").iterdir()
    assert plan.artifacts == pytest.approx(sum(f.stat().st_size for f in fitted), rel=0.05)
    written = sum(f.stat().st_size for f in (tmp_path / "run" / "curated").glob("*.parquet"))
    assert plan.curated == pytest.approx(written, rel=0.4)
    assert plan.tokens == pytest.approx(result.tokens_kept * 5, rel=0.1)
    for name in plan.columns:
        files = (tmp_path / "run" / "columns" / name).iterdir()
        data = sum(
            pq.read_metadata(f).row_group(g).total_byte_size
            for f in files
            for g in range(pq.ParquetFile(f).num_row_groups)
        )
        assert data == pytest.approx(plan.columns[name], rel=0.15, abs=4000), name


def test_the_sample_is_of_the_whole_corpus_and_the_run_stays_as_it_is(corpus: Path, tmp_path: Path) -> None:
    config = parse(configuration(corpus, tmp_path / "run"))
    curate(config, quiet=True)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    plan = make_plan(config)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    assert plan.sample_rows == 4 * 250


def test_what_will_go_wrong_is_said(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / "z.parquet").write_bytes(b"PAR1 cut off")
    monkeypatch.setattr(planning, "_free", lambda run: 1000)
    engine = {"address": "inline", "workers": None}
    simple = {"embed": None, "cluster": None, "scores": ["random"], "engine": engine}
    config = parse(configuration(corpus, tmp_path / "run", **simple, select={"budget": {"tokens": 10**9}}))
    plan = make_plan(config)
    assert [w.split(":")[0] for w in plan.warnings] == [
        "select.budget.tokens",
        "1 file cannot be read and will be left out; the first",
        next(w for w in plan.warnings if "are free" in w).split(":")[0],
    ]
    assert plan.kept_rows == 3000
    print_plan(plan)
    out = capsys.readouterr().out
    assert "1,000,000,000 is more than the corpus has, about" in out
    assert "cut off" not in out  # the reason, not the content
    assert "3,000 rows" in out


def test_what_curate_would_refuse_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.k = 4,000"):
        make_plan(parse(configuration(corpus, tmp_path / "run", cluster={"k": 4000})))


def test_workers_share_the_work(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fixed rates, four workers take a quarter of the time of one in what is done shard by shard."""
    monkeypatch.setattr(planning.measure, "reading_rate", lambda run, names: 1.0)
    monkeypatch.setattr(planning.measure, "writing_rate", lambda table, file: (1.0, 100.0))
    seconds = []
    for engine in ({"address": "inline"}, {"workers": 4}, {"workers": 400}):
        config = parse(
            configuration(corpus, tmp_path / "run", embed=None, cluster=None, scores=["random"], engine=engine)
        )
        plan = make_plan(config)
        seconds.append(next(s.seconds for s in plan.stages if s.name == "write"))
    assert seconds == pytest.approx([3600, 900, 300])  # 12 shards: no more than 12 workers have something to do


def test_flops_of_a_transformer(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    import numpy as np

    tensors = {"embeddings.word": np.zeros((100, 8)), "layer.weight": np.zeros((8, 8)), "layer.bias": np.zeros(8)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")

    class Encoder:
        model = str(tmp_path)

    assert model_flops(Encoder(), 10) == 2 * 64 * 10  # type: ignore[arg-type]  # stands for an encoder
    assert model_flops(object(), 10) == 0  # type: ignore[arg-type]  # stands for an encoder


def test_a_budget_of_compute_shows_its_curve_and_choice(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = {"utility": [-0.18, -0.16, -0.14], "half_life": 2, "share": 0.2, "scale": 100.0}
    budget = {"compute": 1e9, "params": 1000, "law": law}
    simple = {"embed": None, "cluster": None, "scores": ["random"], "select": {"budget": budget}}
    plan = make_plan(parse(configuration(corpus, tmp_path / "run", **simple)))
    small, now, large = plan.training
    assert small.best.buckets < now.best.buckets <= large.best.buckets
    assert plan.kept_rows == pytest.approx(now.best.fraction * 3000, rel=0.01)
    print_plan(plan)
    out = capsys.readouterr().out
    assert out.count(" *") == 3  # one choice a compute
    for said in ("tokens kept", "BETR's rule", f"{now.best.epochs:.3g}"):
        assert said in out
