"""Selecting 10 % of 1, 10 and 100 million scores to an exact budget of rows, beside a polars sort of the same column.

usage: python bench/selection.py [--rows 1000000 10000000 100000000] [--engine ray|inline] [--workers 2] [--keep DIR]

The scores are normal deviates in Parquet parts, as a run stores them. `threshold` finds the line (what a sort is for);
`select` is the whole stage: threshold, `keep` and `reason` of every row written, and the totals of rows, tokens and
bytes. `sort` reads the same parts and sorts them in memory, on the same cores. Every figure is the best of three rounds
in a process of its own, Ray is up before the clock starts, and memory is the driver's peak above what it held then. The
lowest score kept is checked against the sort.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import parse
from pipeline.engine.connect import connect
from pipeline.hashing import KEY
from pipeline.recipe import Column, Transform
from pipeline.run import Run
from pipeline.scores.base import Score
from pipeline.select.config import Select
from pipeline.select.ranking import Ranking
from pipeline.select.stage import select
from pipeline.select.threshold import exact

ROWS_A_SHARD = 1_000_000
ROUNDS = 3
SCORE = pa.schema([("score", pa.float32())])
ROW = pa.schema([("key", KEY), ("bytes", pa.int64()), ("tokens", pa.int64())])


class Normal(Score):
    """Standard normal deviates."""

    kind: Literal["normal"] = "normal"

    def column(self, run: Run) -> Column:
        return Column("normal", ("address.shard", "address.row"), SCORE, _normal, "normal", batch_rows=2**17)


def _normal() -> Transform:
    def draw(batch: pa.RecordBatch) -> pa.RecordBatch:
        random = np.random.default_rng([batch.column(0)[0].as_py(), batch.column(1)[0].as_py()])
        return pa.record_batch([pa.array(random.standard_normal(batch.num_rows, np.float32))], schema=SCORE)

    return draw


def _row() -> Transform:
    def make(batch: pa.RecordBatch) -> pa.RecordBatch:
        random = np.random.default_rng([1, batch.column(0)[0].as_py(), batch.column(1)[0].as_py()])
        key = pa.py_buffer(random.bytes(16 * batch.num_rows))
        size = random.integers(100, 8_000, batch.num_rows)
        keys = pa.FixedSizeBinaryArray.from_buffers(KEY, batch.num_rows, [None, key])
        return pa.record_batch([keys, pa.array(size), pa.array(-(-size // 4))], schema=ROW)

    return make


def open_run(directory: Path, engine: dict[str, Any]) -> Run:
    config = {
        "corpus": {"path": str(directory / "corpus"), "shard_mb": 1e-6},  # every row group is a shard
        "scores": ["random"],
        "select": {"budget": {"rows": 1}},
        "engine": engine,
        "run": str(directory / "run"),
    }
    parsed = parse(config)
    return Run(parsed, lambda: connect(parsed.engine), quiet=True)


def prepare(run: Run) -> None:
    """Fill the columns, or find them filled."""
    row = Column("row", ("address.shard", "address.row"), ROW, _row, "row", batch_rows=2**17)
    run.materialize([row, Normal().column(run)])


def write_corpus(directory: Path, rows: int) -> None:
    (directory / "corpus").mkdir(parents=True)
    for number, start in enumerate(range(0, rows, ROWS_A_SHARD)):
        text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(min(ROWS_A_SHARD, rows - start), np.int32)), ["x"])
        pq.write_table(pa.table({"text": text.cast(pa.string())}), directory / "corpus" / f"{number:05d}.parquet")


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def measured(work: Callable[[int], float]) -> dict[str, float]:
    """Best time of some rounds, and the peak of memory over all of them."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, seconds = peak(), []
    for number in range(ROUNDS):
        start = time.perf_counter()
        result = work(number)
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "bytes": peak() - before, "result": result}


def child(what: str, directory: Path, rows: int, engine: dict[str, Any]) -> dict[str, float]:
    budget = rows // 10
    if what == "sort":
        import polars as pl

        parts = str(directory / "run" / "columns" / "normal" / "*.parquet")
        warm = pl.read_parquet(parts, columns=["score"], n_rows=1000).sort("score")
        assert len(warm)
        return measured(lambda _: pl.read_parquet(parts, columns=["score"])["score"].sort(descending=True)[budget - 1])
    with open_run(directory, engine) as run:
        prepare(run)
        if what == "prepare":
            return {}
        if engine.get("address") != "inline":
            list(run.map("warm", _warm, list(range(2 * (engine["workers"] or 1)))))
        if what == "threshold":
            ranking = Ranking(("normal.score",))
            return measured(lambda _: exact(run, ranking, lambda _: np.array([budget])).passes)

        def stage(number: int) -> float:  # another seed each time: the same selection again would read nothing
            config = Select.model_validate({"budget": {"rows": budget}, "seed": number})
            return select(run, config, [Normal()]).threshold

        return measured(stage)


def _warm(unit: int, attempt: int) -> dict[str, Any]:
    time.sleep(0.2)  # so that every actor gets one
    return {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--engine", choices=["ray", "inline"], default="ray")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", help="directory for the synthetic columns, to use them again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    engine = {"address": "inline"} if options.engine == "inline" else {"workers": options.workers}
    if options.child:
        print(json.dumps(child(options.child, Path(options.keep), options.rows[0], engine)))
        return

    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'rows':>12} {'what':>10} {'seconds':>8} {'driver MiB':>11} {'against sort':>13}")
        for rows in options.rows:
            directory = Path(options.keep or scratch) / str(rows)
            if not (directory / "corpus").exists():
                write_corpus(directory, rows)
            found: dict[str, dict[str, float]] = {}
            for what in ("prepare", "sort", "threshold", "select"):
                arguments = ["--child", what, "--keep", str(directory), "--rows", str(rows), "--engine", options.engine]
                command = [sys.executable, __file__, *arguments, "--workers", str(options.workers)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{what} failed:\n{done.stderr}")
                found[what] = json.loads(done.stdout.splitlines()[-1])
                if what == "prepare":
                    continue
                f = found[what]
                ratio = found["sort"]["seconds"] / f["seconds"]
                print(f"{rows:>12,} {what:>10} {f['seconds']:>8.2f} {f['bytes'] / 2**20:>11.0f} {ratio:>12.2f}x")
            if found["sort"]["result"] != found["select"]["result"]:
                raise SystemExit("the lowest score kept is not the one that the sort finds")


if __name__ == "__main__":
    main()
