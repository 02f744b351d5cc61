"""What things cost on this machine, measured in a second or two each: the rates that a plan multiplies."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.shards import read_source
from pipeline.engine import threads
from pipeline.engine.materialize import checked, stored_fields, valid_rows
from pipeline.engine.reading import read_shard
from pipeline.recipe import Column
from pipeline.select.keys import order_keys

if TYPE_CHECKING:
    from pipeline.run import Run

LONGEST_S = 2.0
WARM_ROWS = 16
THIN_ROWS = 1 << 21


@dataclass(frozen=True)
class Rate:
    """What one column costs one worker: seconds a row, seconds to open it, and bytes a row as stored."""

    seconds: float
    load: float
    width: float


def column_rate(run: Run, column: Column) -> Rate:
    """Run a column over a run's rows for up to two seconds, after some rows to warm up. The rows are decoded before.

    Strings are counted as they are in memory; parts store them compressed.
    """
    shard = run.live[0]
    batches = list(read_shard(run.layout, shard, column.inputs, column.batch_rows))
    inputs = [b.filter(pa.array(u)) if (u := valid_rows(b, column.inputs)) is not None else b for b in batches]
    inputs = [b.select(list(column.inputs)) for b in inputs if b.num_rows]
    if not inputs:
        return Rate(0.0, 0.0, 0.0)
    with threads.limited(run.config.engine.cpus):
        started = time.perf_counter()
        transform = column.open()
        transform(inputs[0].slice(0, WARM_ROWS))
        load = time.perf_counter() - started
        rows = size = 0
        started = time.perf_counter()
        for batch in inputs:
            out = checked(column, batch, transform(batch))
            rows, size = rows + batch.num_rows, size + out.select(stored_fields(column).names).nbytes
            if time.perf_counter() - started > LONGEST_S:
                break
        return Rate((time.perf_counter() - started) / rows, load, size / rows)


def reading_rate(run: Run, names: Sequence[str]) -> float:
    """Seconds a row to read some source columns."""
    shard = run.live[0]
    started = time.perf_counter()
    for _ in read_source(shard, list(names), 1024):
        pass
    return (time.perf_counter() - started) / shard.rows


def writing_rate(table: pa.Table, file: Path) -> tuple[float, float]:
    """Seconds and bytes a row to write curated Parquet."""
    started = time.perf_counter()
    pq.write_table(table, file, compression="zstd")
    return (time.perf_counter() - started) / table.num_rows, file.stat().st_size / table.num_rows


def thin_rate(directory: Path) -> float:
    """Bytes a second of a pass over thin columns: read two million scores and sizes, and count them by level."""
    file = directory / "thin.parquet"
    scores = np.random.default_rng(0).normal(size=THIN_ROWS).astype(np.float32)
    table = pa.table({"score": scores, "tokens": np.arange(THIN_ROWS)})
    pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False)
    started = time.perf_counter()
    for batch in pq.ParquetFile(file).iter_batches(1 << 16, use_threads=False):
        level = (order_keys(batch.column("score").to_numpy()) >> np.uint32(16)).astype(np.int64)
        np.bincount(level, batch.column("tokens").to_numpy(), 1 << 16)
    return float(table.nbytes / (time.perf_counter() - started))


def matrix_rate(dims: int, cpus: float) -> float:
    """FLOPs a second of a float32 matrix product with an inner dimension of `dims`."""
    x = np.ones((2048, dims), np.float32)
    with threads.limited(cpus):
        x @ x.T
        started = time.perf_counter()
        for _ in range(4):
            x @ x.T
    return 4 * 2 * 2048 * 2048 * dims / (time.perf_counter() - started)


def peak_memory() -> int:
    """The most bytes that this process has held: what one worker with the same recipes needs, about."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)


def machine_memory() -> int | None:
    """Bytes of memory of this machine; None where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
