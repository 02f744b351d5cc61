"""The hand-off: two disjoint subsets of what was kept, and a file that names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from pipeline.output.curated import write_curated
from pipeline.output.handoff import write_handoff
from pipeline.run import Run
from pipeline.select.stage import Selection

Sieve = Callable[..., tuple[Run, Selection]]


def handed(run: Run) -> dict[str, Any]:
    return dict(json.loads(run.store.read("handoff.json")))


def ids(described: dict[str, Any]) -> list[str]:
    table = ds.dataset(described["dataset"]).to_table()
    assert table.num_rows == described["num_samples"] == sum(f["rows"] for f in described["files"])
    return list(table["text"].to_pylist())


@pytest.mark.parametrize("layout", ["parquet", "nanochat"])
def test_calibration_recovery_and_validation_are_disjoint_parts_of_what_was_kept(
    sieved: Sieve, corpus: Path, layout: str
) -> None:
    wanted = {"calibration_rows": 64, "recovery_tokens": 20_000}
    run, selection = sieved(corpus, output={"layout": layout}, handoff=wanted)
    directory, files = write_curated(run, selection)
    write_handoff(run, selection)
    described = handed(run)
    calibration, recovery = set(ids(described["calibration"])), set(ids(described["recovery"]))
    curated = [set(ds.dataset(directory.at(f["file"])).to_table()["text"].to_pylist()) for f in files]
    assert len(calibration) == 64
    assert recovery
    assert not calibration & recovery
    assert calibration | recovery <= set.union(*curated)
    if layout == "nanochat":
        assert not (calibration | recovery) & curated[-1]
    tokens = sum(-(-len(t.encode()) // 4) for t in recovery)
    assert 19_500 < tokens <= 20_000


def test_a_larger_draw_holds_the_smaller_one(sieved: Sieve, corpus: Path) -> None:
    drawn = []
    for rows in (16, 64):
        run, selection = sieved(corpus, f"run{rows}", handoff={"calibration_rows": rows, "recovery_tokens": 0})
        write_handoff(run, selection)
        drawn.append(set(ids(handed(run)["calibration"])))
    assert drawn[0] < drawn[1]


def test_what_is_set_to_zero_is_left_out_and_removed(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus)
    write_handoff(run, selection)
    assert {"calibration", "recovery"} <= handed(run).keys()
    run.__exit__(None, None, None)
    run, selection = sieved(corpus, handoff={"calibration_rows": 0, "recovery_tokens": 0})
    write_handoff(run, selection)
    assert not {"calibration", "recovery"} & handed(run).keys()
    assert not run.store.files("handoff", recursive=True)


@pytest.mark.parametrize(("rows", "layout"), [(1, "parquet"), (2, "parquet"), (2, "nanochat"), (3, "nanochat")])
def test_very_few_rows_are_shared_as_far_as_they_go(sieved: Sieve, corpus: Path, rows: int, layout: str) -> None:
    run, selection = sieved(corpus, output={"layout": layout}, select={"budget": {"rows": rows}})
    write_curated(run, selection)
    write_handoff(run, selection)
    described = handed(run)
    counts = [described[name]["num_samples"] for name in ("calibration", "recovery") if name in described]
    assert counts[0] == 1
    assert sum(counts) == rows - (layout == "nanochat")


def test_a_recovery_budget_below_one_row_does_not_lose_the_run(sieved: Sieve, corpus: Path) -> None:
    run, selection = sieved(corpus, handoff={"calibration_rows": 4, "recovery_tokens": 1})
    write_handoff(run, selection)
    described = json.loads(run.store.read("handoff.json"))
    assert described["recovery"]["num_samples"] == 0
    assert "recovery_tokens" in described["recovery"]["why"]
