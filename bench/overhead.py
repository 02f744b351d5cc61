"""What the engine costs a shard, and what Ray adds to it.

usage: python bench/overhead.py [--scale small|full] [--dir DIR] [--rounds R]

`shard_ms`: a corpus of many shards of 10 rows, so that nearly all the time is the engine's: planning, asking which
parts are true, opening the file, sending the unit, writing and renaming the part, noting the outcome. Wall time over
shards, inline and on one Ray actor, and for a bare loop that reads each row group and writes it to a file. `ray_ratio`:
rows a second on Ray with one actor over inline, on shards of 64 MB; `ray_cores`: the same for the two together, i.e.
how much faster two actors are than one inline. Starting Ray and its actors is not counted; actors are not made nicer
than this process. Figures are medians over the rounds, in which all take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from materialize import COLUMNS, SCALES, make_corpus, rates, ratio

from pipeline.config import EngineConfig, parse
from pipeline.engine.connect import connect
from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.run import Run

SHARDS = {"small": 500, "full": 2000}
ROWS = 10


def make_shards(directory: Path, shards: int) -> Path:
    """One file with a row group for every shard."""
    path = directory / f"shards-{shards}.parquet"
    if not path.exists():
        texts = pa.table({"text": [f"a short text, number {i}" for i in range(shards * ROWS)]})
        pq.write_table(texts, path, row_group_size=ROWS)
    return path


def bare(path: Path, output: Path) -> int:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    schema = COLUMNS["touch"].fields
    file = pq.ParquetFile(path, pre_buffer=False)
    groups = file.num_row_groups
    for group in range(groups):
        batches = file.iter_batches(row_groups=[group], columns=["text"], use_threads=False)
        with pq.ParquetWriter(output / f"{group:05d}.parquet", schema) as writer:
            for batch in batches:
                zeros = pa.array(np.zeros(len(batch), np.float32))
                writer.write_batch(pa.RecordBatch.from_arrays([zeros], schema=schema))
    return groups


def materialize(kind: str, corpus: Path, run: Path, shard_mb: float, pool: Pool) -> tuple[int, int]:
    """Shards and rows."""
    shutil.rmtree(run, ignore_errors=True)
    options = {"corpus": {"path": str(corpus), "shard_mb": shard_mb}, "run": str(run)}
    config = parse(options | {"scores": ["random"], "select": {"budget": {"rows": 1}}})
    with Run(config, lambda: pool, quiet=True) as active:
        active.materialize([COLUMNS[kind]])
        return len(active.shards), active.rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "bench")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # that is its name
    corpus = make_corpus(args.dir, SCALES[args.scale])
    small = make_shards(args.dir, SHARDS[args.scale])
    run, output = args.dir / "overhead-run", args.dir / "overhead-bare"
    first = connect(EngineConfig(address="local", workers=3))
    one, two = (RayPool(workers, 3600, 3, elastic=False) for workers in (1, 2))
    for pool in (one, two):
        pool.close = lambda: None  # type: ignore[method-assign]  # runs come and go, the actors stay

    def shards(pool: Pool) -> int:
        return materialize("touch", small, run, 1e-6, pool)[0]

    def rows(pool: Pool) -> int:
        return materialize("copy", corpus, run, 64, pool)[1]

    pools: tuple[Pool, ...] = (InlinePool(), one, two)
    for pool in pools:
        shards(pool)  # warm
    works = [*(partial(shards, p) for p in pools), partial(bare, small, output)]
    inline, ray, _, loop = np.median(rates(time.perf_counter, args.rounds, *works), axis=0)
    result: dict[str, Any] = {"bench": "overhead", "shards": SHARDS[args.scale]}
    result["shard_ms"] = {"inline": 1e3 / inline, "ray": 1e3 / ray, "bare": 1e3 / loop}
    found = rates(time.perf_counter, args.rounds, *(partial(rows, p) for p in pools))
    result |= {"gb": SCALES[args.scale] / 1e9, "ray_ratio": ratio(found), "ray_cores": ratio(found, of=2)}
    first.close()
    print(json.dumps(result, default=float))


if __name__ == "__main__":
    main()
