"""The column `concept` beside a bare FAISS IndexFlatIP search of the same vectors, on the same threads.

usage: python bench/assign.py [--rows 1000000] [--dims 384] [--k 1000] [--threads 2] [--rounds 2]

FAISS gets all rows at once, as float32 in memory: its best case. The column gets Arrow batches of float16, as a run
stores them, and gives Arrow batches of concept and distance. FAISS is measured as its wheel comes, and again with the
BLAS kernels that `pipeline.vectors.load_faiss` picks for this CPU (`tuned`); on a CPU that the wheel knows both are the
same. Every part runs in a process of its own, since BLAS picks its kernels once. Best of the rounds, parts in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifact import Artifact
from pipeline.concepts import assign
from pipeline.concepts.kmeans import CENTROIDS
from pipeline.corpus.storage import Store
from pipeline.engine import threads
from pipeline.vectors import load_faiss

PARTS = ("bare", "tuned", "column")


def make(directory: Path, rows: int, dims: int, k: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((k, dims), np.float32)
    x = np.lib.format.open_memmap(directory / "x.npy", "w+", np.float16, (rows, dims))
    for start in range(0, rows, 1 << 16):
        part = rng.standard_normal((min(1 << 16, rows - start), dims), np.float32)
        part += points[rng.integers(0, k, len(part))]
        x[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    np.save(directory / CENTROIDS, points / np.linalg.norm(points, axis=1, keepdims=True))


def measure(part: str, directory: Path, count: int) -> float:
    """Seconds of one part; its concepts go to a file."""
    half = np.load(directory / "x.npy")
    points = np.load(directory / CENTROIDS)
    with threads.limited(count):
        if part == "column":
            flat = pa.array(half.ravel())
            vectors = pa.FixedSizeListArray.from_arrays(flat, half.shape[1])
            table = pa.table({"embed.vector": vectors}).to_batches(assign.BATCH_ROWS)
            transform = assign._open(Artifact("centroids", "", Store(str(directory))))
            start = time.perf_counter()
            found = [transform(batch) for batch in table]
            seconds = time.perf_counter() - start
            concept = np.concatenate([b["concept"].to_numpy() for b in found])
        else:
            if part == "tuned":
                load_faiss()
            import faiss

            faiss.omp_set_num_threads(count)
            x = half.astype(np.float32)
            index = faiss.IndexFlatIP(x.shape[1])
            index.add(points)
            start = time.perf_counter()
            _, near = index.search(x, 1)
            seconds = time.perf_counter() - start
            concept = near[:, 0]
    np.save(directory / f"{part}.npy", concept.astype(np.int32))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dims", type=int, default=384)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    if options.part:
        print(measure(options.part, options.directory, options.threads))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make(directory, options.rows, options.dims, options.k)
        best = dict.fromkeys(PARTS, float("inf"))
        for _ in range(options.rounds):
            for part in PARTS:
                flags = ["--part", part, "--directory", name, "--threads", str(options.threads)]
                out = subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True)
                best[part] = min(best[part], float(out.stdout.split()[-1]))
        found = {part: np.load(directory / f"{part}.npy") for part in PARTS}
    result = {
        "rows": options.rows,
        "dims": options.dims,
        "k": options.k,
        "threads": options.threads,
        "seconds": {part: round(seconds, 2) for part, seconds in best.items()},
        "ratio_to_bare": round(best["bare"] / best["column"], 2),
        "ratio_to_tuned": round(best["tuned"] / best["column"], 2),
        "same_concept_as_bare": float((found["column"] == found["bare"]).mean()),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
