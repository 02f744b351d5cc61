"""`materialize` with a column that does nothing, beside a bare pyarrow loop that reads and writes, on the same cores.

usage: python bench/materialize.py [--scale small|full] [--dir DIR] [--workers N] [--rounds R]

Two columns: `copy` writes the text that it reads, `touch` reads the text and writes a float32 a row. The bare loop does
the same file by file in N processes: `ParquetFile.iter_batches`, `ParquetWriter`. Both are warm: starting Ray, the
actors and the processes is not counted (Ray takes about 5 s). Tamis also checks that every text is UTF-8 and not blank,
skips nulls, counts what it refuses, and writes parts atomically with fingerprints. Figures are medians over the rounds;
`cpu_ratio` compares processor seconds on one core, in this process, which other work on the machine disturbs less.
Ray's actors are as nice as the bare processes here, not 15 steps nicer, so that such work slows both alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.config import EngineConfig, parse
from pipeline.engine.connect import connect
from pipeline.engine.pool import InlinePool, Pool
from pipeline.recipe import Column, Transform
from pipeline.run import Run

SAMPLE = Path(__file__).parents[1] / "examples/sample"
FILE_BYTES = 64_000_000
SCALES = {"small": 2 * FILE_BYTES, "full": 16 * FILE_BYTES}
COPY = pa.schema([("text", pa.string())])
TOUCH = pa.schema([("score", pa.float32())])


def make_corpus(directory: Path, size: int) -> Path:
    """Files of about 64 MB of texts of the sample, each text with words of its own, until there are `size` bytes."""
    corpus = directory / f"corpus-{size}"
    if corpus.is_dir():
        return corpus
    building = directory / "building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    sample = ds.dataset(SAMPLE).to_table(columns=["text"])["text"].to_pylist()
    rng = np.random.default_rng(0)
    for file in range(size // FILE_BYTES):
        path = building / f"part-{file:03d}.parquet"
        with pq.ParquetWriter(
            path, pa.schema([("id", pa.string()), ("text", pa.string())]), compression="zstd"
        ) as writer:
            while path.stat().st_size < FILE_BYTES * 0.95:
                at = rng.integers(0, len(sample), 4000)
                salt = rng.integers(0, 2**62, (4000, 4)).astype(str)
                text = [f"{' '.join(s)} {sample[i]}" for i, s in zip(at, salt, strict=True)]
                writer.write_table(pa.table({"id": salt[:, 0], "text": text}))
    building.rename(corpus)
    return corpus


def copy() -> Transform:
    return lambda batch: pa.RecordBatch.from_arrays([batch.column("text")], schema=COPY)


def touch() -> Transform:
    return lambda batch: pa.RecordBatch.from_arrays([pa.array(np.zeros(len(batch), np.float32))], schema=TOUCH)


COLUMNS = {
    "copy": Column("copy", ("text",), COPY, copy, "1"),
    "touch": Column("touch", ("text",), TOUCH, touch, "1"),
}


def bare(kind: str, output: Path, file: Path) -> int:
    """The loop that one would write by hand."""
    pa.set_cpu_count(1)
    schema = COLUMNS[kind].fields
    rows = 0
    with pq.ParquetWriter(output / file.name, schema, compression="zstd" if kind == "copy" else "none") as writer:
        for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(1024, columns=["text"], use_threads=False):
            values = batch.column(0) if kind == "copy" else pa.array(np.zeros(len(batch), np.float32))
            writer.write_batch(pa.RecordBatch.from_arrays([values], schema=schema))
            rows += len(batch)
    return rows


def ours(kind: str, corpus: Path, run: Path, pool: Pool) -> int:
    shutil.rmtree(run, ignore_errors=True)
    options = {"corpus": {"path": str(corpus), "shard_mb": 64}, "run": str(run)}
    config = parse(options | {"scores": ["random"], "select": {"budget": {"rows": 1}}})
    with Run(config, lambda: pool, quiet=True) as active:
        active.materialize([COLUMNS[kind]])
        return active.rows


def theirs(kind: str, corpus: Path, output: Path, spread: Callable[..., Any]) -> int:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return sum(spread(partial(bare, kind, output), sorted(corpus.iterdir())))


def rates(clock: Callable[[], float], rounds: int, *works: Callable[[], int]) -> np.ndarray:
    """What each work counts a second, in rounds in which they take turns; float64 (rounds, works)."""
    found = np.zeros((rounds, len(works)))
    for turn in found:
        for i, work in enumerate(works):
            start = clock()
            count = work()
            turn[i] = count / (clock() - start)
    return found


def ratio(found: np.ndarray, of: int = 1, to: int = 0) -> float:
    """Median over the rounds, of pairs that were measured one after the other."""
    return round(float(np.median(found[:, of] / found[:, to])), 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "bench")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # that is its name
    corpus = make_corpus(args.dir, SCALES[args.scale])
    run, output = args.dir / "materialize-run", args.dir / "materialize-bare"

    pool = connect(EngineConfig(address="local", workers=args.workers))
    stop, pool.close = pool.close, lambda: None  # type: ignore[method-assign]  # runs come and go, the actors stay
    size = sum(f.stat().st_size for f in corpus.iterdir())
    result: dict[str, Any] = {"bench": "materialize", "gb": round(size / 1e9, 3), "workers": args.workers}
    with multiprocessing.get_context("spawn").Pool(args.workers) as processes:
        spread = partial(processes.map, chunksize=1)
        for kind in COLUMNS:
            works = partial(theirs, kind, corpus, output, spread), partial(ours, kind, corpus, run, pool)
            for work in works:
                work()  # warm
            found = rates(time.perf_counter, args.rounds, *works)
            loop, tamis = np.median(found, axis=0)
            result[kind] = {"bare_rows_s": round(loop), "tamis_rows_s": round(tamis), "ratio": ratio(found)}
    stop()
    for kind in COLUMNS:
        works = partial(theirs, kind, corpus, output, map), partial(ours, kind, corpus, run, InlinePool())
        result[kind]["cpu_ratio"] = ratio(rates(time.process_time, args.rounds, *works))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
