"""Small curated runs to feed from, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import EngineConfig
from pipeline.curation import curate
from pipeline.engine.pool import InlinePool, Pool
from pipeline.output.feeding import CuratedSet, FedRun, feeding
from pipeline.output.order.base import StoredOrder

TOPICS, DIMS = 6, 16


def inline(engine: EngineConfig) -> Pool:
    return InlinePool(engine.retries)


def opened(run: str) -> FedRun:
    return feeding(run, inline, quiet=True)


def rows(count: int = 240, seed: int = 0) -> pa.Table:
    """Rows `n` 0, 1, ... with texts of 1 to 60 words, a `topic` each, and a unit `vector` near that of the topic."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, TOPICS, count)
    centres = np.linalg.qr(rng.standard_normal((DIMS, DIMS)))[0][:TOPICS]
    vectors = (centres[topic] + 0.15 * rng.standard_normal((count, DIMS))).astype(np.float32)
    words = [" ".join(["word"] * n) for n in rng.integers(0, 60, count)]
    texts = [f"row {i} of {t} {w}" for i, (t, w) in enumerate(zip(topic, words, strict=True))]
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMS)
    return pa.table({"n": np.arange(count), "text": texts, "topic": topic, "vector": vector})


def curated(directory: Path, table: pa.Table | None = None, /, **changes: Any) -> str:
    """A run that keeps 200 of the rows, at random, in files of some kB."""
    table = rows() if table is None else table
    directory.mkdir(parents=True, exist_ok=True)
    half = table.num_rows // 2
    for i, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, directory / f"corpus-{i}.parquet", row_group_size=30)
    config = {
        "corpus": {"path": str(directory / "corpus-*.parquet"), "shard_mb": 0.002},
        "scores": ["random"],
        "select": {"budget": {"rows": 200}},
        "output": {"file_mb": 0.005, "row_group_rows": 16},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(directory / "run"),
    }
    return curate(config | changes, quiet=True).run


def kept(run: str) -> pa.Table:
    """The curated rows as they lie."""
    source = CuratedSet.at(run)
    return pa.Table.from_batches([b for i in range(len(source.files)) for b in source.batches(i)])


def ordinals(run: FedRun, order: StoredOrder) -> np.ndarray:
    """The order as ordinals in the curated set."""
    parts = [order.addresses(i) for i in range(len(order.parts))]
    return np.concatenate([run.curated.edges[p["file"].to_numpy()] + p["row"].to_numpy() for p in parts])


def column(order: StoredOrder, name: str) -> Sequence[int]:
    return np.concatenate([order.addresses(i)[name].to_numpy() for i in range(len(order.parts))])
