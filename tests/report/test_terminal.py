from __future__ import annotations

import pytest

from pipeline.curation import Curated
from pipeline.report.terminal import print_result


def test_a_result_is_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failures = [{"file": f"f{i}[bold].parquet", "row_groups": "0..3", "reason": "cut \x1b off"} for i in range(12)]
    result = Curated(
        "runs/x", "runs/x/curated", ["a", "b"], 1000, 250, 1_234_567, 4_900_000, {"quota": 750, "kept": 250}, failures
    )
    print_result(result)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "Kept 250 of 1,000 rows (25.0 %): 1,234,567 tokens, 4.9 MB of text."
    assert "quota 750 75.0 % lost inside its concept with a score that was enough in another" in lines
    assert "kept 250 25.0 % in the curated set" in lines
    assert "Curated runs/x/curated (2 files)" in lines
    assert "Report runs/x/report/index.html" in lines
    assert "Left out: 12 files or parts of files" in lines
    assert "f0[bold].parquet row groups 0..3: cut ␛ off" in lines
    assert lines[-1] == "and 2 more: see `failed` in manifest.json"


def test_nothing_is_said_of_failures_where_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(Curated("s3://b/run", "s3://b/run/curated", ["a"], 10, 10, 5, 20, {"kept": 10}))
    out = capsys.readouterr().out
    assert "Left out" not in out
    assert "s3://b/run/report/index.html" in out
