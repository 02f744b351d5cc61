"""Status, show, plan and the page where corpus and run lie on s3://, against a real S3 server on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import curate
from pipeline.config import parse
from pipeline.corpus.storage import Store
from pipeline.report.plan import make_plan
from pipeline.report.show import print_rows
from pipeline.report.status import print_status


def test_everything_is_seen_through_the_store(
    bucket: str, hostile_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (hostile_run.parent / "corpus").iterdir():
        Store(bucket).write(file.read_bytes(), "corpus", file.name)
    config = parse(
        {
            "corpus": {"path": f"{bucket}/corpus", "source": "source", "shard_mb": 1e-6},
            "scores": ["length"],
            "select": {"budget": {"rows": 60}},
            "engine": {"address": "inline"},
            "run": f"{bucket}/run",
        }
    )
    plan = make_plan(config)
    assert (plan.rows, plan.free) == (200, None)
    assert not Store(bucket).exists("run")
    curate(config, quiet=True)
    assert b"<h1>run</h1>" in Store(bucket).read("run", "report", "index.html")
    assert print_status(f"{bucket}/run") == 2
    assert f"60 rows in 1 file in {bucket}/run/curated" in capsys.readouterr().out
    print_rows(f"{bucket}/run", kept=False, by="length", count=3)
    assert capsys.readouterr().out.count(f"{bucket}/corpus/a.parquet:") == 3
