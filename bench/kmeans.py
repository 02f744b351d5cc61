"""Fitting the centroids beside a bare faiss.Kmeans on the same vectors, on the same threads.

usage: python bench/kmeans.py [--rows 256000] [--dims 384] [--k 1000] [--iterations 20] [--threads 2] [--rounds 2]

What is measured is what a run's worker does with the sample that it is given: float16 vectors to the artifact on disk.
The peer is `faiss.Kmeans(d, k, niter, spherical=True).train(x)` on float32 in memory: as the wheel comes, and again
with the BLAS kernels that `pipeline.vectors.load_faiss` picks for this CPU (`tuned`). Parts run in turns, each in a
process of its own, since BLAS picks its kernels once; the best round counts. Losses are the mean 1 - cosine to the
nearest centroid over all rows.
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

from pipeline.concepts import kmeans
from pipeline.engine import threads
from pipeline.vectors import load_faiss

PARTS = ("bare", "tuned", "fit")


def measure(part: str, directory: Path, k: int, iterations: int, count: int) -> dict[str, float]:
    half = np.load(directory / "x.npy")
    with threads.limited(count):
        if part == "fit":
            state = {"hash": np.arange(len(half)), "embed.vector": half}
            start = time.perf_counter()
            kmeans._fit(state, k, iterations, 0, directory)
            seconds = time.perf_counter() - start
            points = np.load(directory / kmeans.CENTROIDS)
        else:
            if part == "tuned":
                load_faiss()
            import faiss

            faiss.omp_set_num_threads(count)
            x = half.astype(np.float32)
            start = time.perf_counter()
            peer = faiss.Kmeans(x.shape[1], k, niter=iterations, spherical=True, seed=0, max_points_per_centroid=len(x))
            peer.train(x)
            seconds = time.perf_counter() - start
            points = peer.centroids
        loss = float(kmeans.lloyd_step(half, points)["distance"][0]) / len(half)
    return {"seconds": round(seconds, 2), "loss": round(loss, 5)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=256_000)
    parser.add_argument("--dims", type=int, default=384)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measure(options.part, options.directory, options.k, options.iterations, options.threads)))
        return
    with tempfile.TemporaryDirectory() as name:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((options.k, options.dims), np.float32)
        x = rng.standard_normal((options.rows, options.dims), np.float32)
        x += centres[rng.integers(0, options.k, options.rows)]
        np.save(Path(name) / "x.npy", (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
        found: dict[str, dict[str, float]] = {}
        flags = [
            "--directory",
            name,
            "--k",
            options.k,
            "--iterations",
            options.iterations,
            "--threads",
            options.threads,
        ]
        for part in PARTS * options.rounds:
            command = [sys.executable, __file__, "--part", part, *map(str, flags)]
            out = subprocess.run(command, check=True, capture_output=True, text=True)
            once = json.loads(out.stdout.splitlines()[-1])
            found[part] = min(once, found.get(part, once), key=lambda measured: measured["seconds"])
    result = {
        "rows": options.rows,
        "dims": options.dims,
        "k": options.k,
        "iterations": options.iterations,
        "threads": options.threads,
        **found,
        "ratio_to_bare": round(found["bare"]["seconds"] / found["fit"]["seconds"], 2),
        "ratio_to_tuned": round(found["tuned"]["seconds"] / found["fit"]["seconds"], 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
