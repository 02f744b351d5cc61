"""Duplicates: MinHash deduplication beside daft, its pairs against exact Jaccard, SemDeDup against bare products.

usage: python bench/dedup.py job PEER_PYTHON [--corpus DIR] [--rounds R] [--workers W]
       python bench/dedup.py signatures [--corpus DIR] [--rounds R]
       python bench/dedup.py pairs [--corpus DIR] [--rows N]
       python bench/dedup.py products [--rows N] [--dims D] [--rounds R]
       python bench/dedup.py memory [--rows N] [--dims D]

`job`: read Parquet, drop all but one of every group (14 x 8, 5-grams), write Parquet; whole processes, start-up
included, in turns, the best and all rounds: Tamis on Ray and in one process on one core (`tamis_inline`), daft in one
process on all cores and on Ray (`daft_on_ray`), grouped by one union-find over Python integers, as its users do.
PEER_PYTHON is the interpreter of an environment with `daft[ray]`. Starting Ray is most of what a small corpus takes.
`signatures`: the pass over the text alone, MB a CPU second on one core, best of all rounds.
`pairs`: the candidates among the first N documents beside all pairs by exact Jaccard of their 5-grams: as many as the
S-curve says? Mean and standard error of 1,000 seeds, because pages of one template are found or missed together.
`products`: `max_products` over N vectors of one concept beside a matrix product of the same blocks, on one core.
`memory`: the most memory that a worker takes for a concept of N rows, beside the bytes of its vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BANDS, ROWS, NGRAM = 14, 8, 5
SEEDS = 1000
EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1)
PAIRS = (("daft", "tamis_inline"), ("daft", "tamis"), ("daft_on_ray", "tamis"))


def daft_side(corpus: str, out: str) -> None:
    """In the peer's interpreter."""
    import daft
    from daft import col

    if os.environ["DAFT_RUNNER"] == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    rows = daft.read_parquet(f"{corpus}/*.parquet").select("id", "text")
    text = col("text").normalize(remove_punct=True, lowercase=True)
    signed = rows.with_column("minima", text.minhash(num_hashes=BANDS * ROWS, ngram_size=NGRAM, seed=42))
    table = signed.select("id", "minima").to_pydict()
    parent: dict[Any, Any] = {}

    def find(a: Any) -> Any:
        while parent.setdefault(a, a) != a:
            parent[a] = a = parent[parent[a]]
        return a

    seen: dict[Any, Any] = {}
    for i, minima in zip(table["id"], table["minima"], strict=True):
        for band in range(BANDS):
            j = seen.setdefault((band, tuple(minima[band * ROWS : (band + 1) * ROWS])), i)
            a, b = find(i), find(j)
            if a != b:
                parent[max(a, b)] = min(a, b)
    kept = daft.from_pydict({"id": [i for i in table["id"] if find(i) == i]})
    rows.join(kept, on="id", how="semi").write_parquet(f"{out}/kept")
    print(json.dumps({"kept": len(kept)}))


def tamis_side(corpus: str, out: str, workers: str) -> None:
    from pipeline.curation import curate

    result = curate(
        {
            "corpus": {"path": corpus, "id": "id"},
            "scores": ["fuzzy_duplicates"],
            "select": {"floors": {"fuzzy_duplicates": 0}, "budget": {"fraction": 1.0}},
            "output": {"scores": False, "file_mb": 16},  # small files, so that all workers write
            "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
            "engine": {"address": "inline"} if workers == "inline" else {"workers": int(workers)},
            "run": f"{out}/run",
        },
        quiet=True,
    )
    manifest = json.loads(Path(out, "run/manifest.json").read_text())
    passes = {p["pass"]: p["seconds"] for p in manifest["passes"]}
    print(json.dumps({"kept": result.rows_kept, "passes": passes}))


def job(options: argparse.Namespace) -> None:
    sides = {
        "tamis": [sys.executable, __file__, "side", "tamis", options.corpus],
        "tamis_inline": [sys.executable, __file__, "side", "tamis", options.corpus],
        "daft": [options.peer, __file__, "side", "daft", options.corpus],
        "daft_on_ray": [options.peer, __file__, "side", "daft", options.corpus],
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "true", "RAY_ADDRESS": "local"}
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, command in sides.items():
            with tempfile.TemporaryDirectory() as out:
                before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                extra = {"tamis": [str(options.workers)], "tamis_inline": ["inline"]}.get(side, [])
                runner = {"DAFT_RUNNER": "ray" if side == "daft_on_ray" else "native"}
                done = subprocess.run([*command, out, *extra], env=environment | runner, stdout=-1, check=True)
                seconds = time.perf_counter() - started
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
            told = json.loads(done.stdout.splitlines()[-1])
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            rounds[side].append(told | {"seconds": round(seconds, 2), "cpu_s": round(cpu, 2)})
    best = {side: min(rounds[side], key=lambda r: r["seconds"]) for side in sides}
    print(json.dumps({side: {k: v for k, v in best[side].items() if k != "passes"} for side in sides}))
    print(
        json.dumps({"all": {side: [r["seconds"] for r in rounds[side]] for side in sides}, **best["tamis"]["passes"]})
    )
    ratio = {f"{a} / {b}": round(best[a]["seconds"] / best[b]["seconds"], 2) for a, b in PAIRS}
    print(json.dumps(ratio | {"load": os.getloadavg()}))


def signatures(options: argparse.Namespace) -> None:
    import pyarrow.dataset as ds

    from pipeline.scores.fuzzy_duplicates import FuzzyDuplicates

    table = ds.dataset(options.corpus, format="parquet").to_table(columns=["text"])
    batches = table.combine_chunks().to_batches(max_chunksize=1024)
    sign = FuzzyDuplicates.model_validate({}).bands_column.open()
    seconds = []
    for _ in range(options.rounds + 1):  # the first warms up
        started = time.process_time()
        for batch in batches:
            sign(batch)
        seconds.append(time.process_time() - started)
    rate = table.nbytes / min(seconds[1:]) / 1e6
    print(json.dumps({"rows": len(table), "mb_a_cpu_second": round(rate, 1), "load": os.getloadavg()[0]}))


def pairs(options: argparse.Namespace) -> None:
    """Exact Jaccard of all pairs through one sparse product, and what LSH makes of them."""
    import numpy as np
    import pyarrow.dataset as ds
    from scipy.sparse import csr_array

    from pipeline.scores._minhash import band_keys, shingles

    texts = ds.dataset(options.corpus, format="parquet").head(options.rows, columns=["text"])["text"].drop_null()
    cut = [shingles(texts.slice(i, 200).combine_chunks(), NGRAM) for i in range(0, len(texts), 200)]
    owner = np.repeat(np.arange(len(texts)), np.concatenate([np.diff(o.astype(np.int64)) for _, o in cut]))
    both = np.unique(np.stack([owner.astype(np.uint64), np.concatenate([h for h, _ in cut])], axis=1), axis=0)
    gram, number, count = np.unique(both[:, 1], return_inverse=True, return_counts=True)
    doc = both[:, 0].astype(np.int64)
    size = np.bincount(doc, minlength=len(texts))
    shared = count[number] > 1
    matrix = csr_array((np.ones(shared.sum(), np.int32), (doc[shared], number[shared])), (len(texts), len(gram)))
    common = (matrix @ matrix.T).tocoo()
    above = common.row < common.col
    a, b, overlap = common.row[above], common.col[above], common.data[above]
    s = overlap / (size[a] + size[b] - overlap)

    def keys_of(docs: np.ndarray, seed: int) -> np.ndarray:
        offsets = np.concatenate([[0], np.cumsum(size[docs])]).astype(np.uint64)
        return band_keys(both[np.isin(doc, docs), 1], offsets, BANDS, ROWS, seed)

    keys = keys_of(np.arange(len(texts)), 1)
    found = (keys[a] == keys[b]).any(axis=1)
    told = {"documents": len(texts), "mb": round(texts.nbytes / 1e6, 1), "pairs": len(s), "found": int(found.sum())}
    # Texts that share no n-gram can be candidates by a collision of keys alone.
    equal = [np.unique(keys[:, band], return_counts=True)[1] for band in range(BANDS)]
    unexplained = sum(int(c @ (c - 1)) // 2 for c in equal) - int((keys[a] == keys[b]).sum())
    print(json.dumps(told | {"found_below_0.3": int(found[s < 0.3].sum()), "found_without_ngram": unexplained}))
    for least in (0.8, 0.85, 0.9):
        print(json.dumps({"at_least": least, "jaccard_of_pair_sets": round(float(found[s >= least].mean()), 4)}))

    near = s >= 0.3
    docs, at = np.unique(np.append(a[near], b[near]), return_inverse=True)
    a, b, s, chance = at[: near.sum()], at[near.sum() :], s[near], 1 - (1 - s[near] ** ROWS) ** BANDS
    bins = np.digitize(s, EDGES)
    each = []
    for seed in range(1, 1 + SEEDS):
        keys = keys_of(docs, seed)
        each.append(np.bincount(bins, (keys[a] == keys[b]).any(axis=1), len(EDGES) + 1))
    mean, error = np.mean(each, axis=0), np.std(each, axis=0) / np.sqrt(SEEDS)
    for i, low in enumerate((0.3, *EDGES)):
        told = {"jaccard_from": low, "pairs": int((bins == i).sum()), "expected": chance[bins == i].sum()}
        told |= {"mean": mean[i], "error": error[i], "first_seed": each[0][i]}
        print(json.dumps({k: round(float(v), 1) for k, v in told.items()}))


def products(options: argparse.Namespace) -> None:
    import numpy as np

    from pipeline.engine import threads
    from pipeline.scores.semantic_duplicates import BLOCK, max_products

    rng = np.random.default_rng(0)
    x = rng.standard_normal((options.rows, options.dims)).astype(np.float32)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    block = x[:BLOCK].astype(np.float32)
    out = np.empty((BLOCK, BLOCK), np.float32)
    rates: dict[str, list[float]] = {"bare": [], "max_products": []}
    with threads.limited(1):
        for _ in range(options.rounds):
            started = time.process_time()
            for _ in range(40):
                np.matmul(block, block.T, out=out)
            rates["bare"].append(40 * 2 * BLOCK * BLOCK * options.dims / (time.process_time() - started) / 1e9)
            started = time.process_time()
            max_products(x, np.arange(options.rows))
            rates["max_products"].append(options.rows**2 * options.dims / (time.process_time() - started) / 1e9)
    best = {name: round(max(values), 1) for name, values in rates.items()}
    told = {"rows": options.rows, "dims": options.dims, "gflops": best}
    print(json.dumps(told | {"ratio": round(best["max_products"] / best["bare"], 3), "load": os.getloadavg()[0]}))


def memory(options: argparse.Namespace) -> None:
    """One concept, gathered from disk as a worker does it; products are few, since the concept is cut small."""
    import numpy as np
    import pyarrow as pa

    from pipeline.corpus.shards import Shard
    from pipeline.corpus.storage import Store
    from pipeline.engine.regroup import GatherTask, Regroup, write_groups
    from pipeline.scores.semantic_duplicates import nearest_earlier
    from pipeline.vectors import load_faiss

    load_faiss()
    with tempfile.TemporaryDirectory() as directory:
        job_ = Regroup(Store(directory), "x", (), "concept.concept", 1, ((0, (Shard(0, ()),)),), "f")
        writer = os.fork()
        if not writer:
            rng, n = np.random.default_rng(0), options.rows
            flat = pa.array(rng.standard_normal(n * options.dims, np.float32).astype(np.float16))
            table = pa.table(
                {
                    "embed.vector": pa.FixedSizeListArray.from_arrays(flat, options.dims),
                    "concept.distance": pa.array(rng.random(n, np.float32)),
                    "concept.concept": pa.array(np.zeros(n, np.int32)),
                    "address.shard": pa.array(np.zeros(n, np.int32)),
                    "address.row": pa.array(np.arange(n)),
                }
            )
            write_groups(job_, "split", 0, table, np.zeros(n, np.int64), 1)
            os._exit(0)
        os.waitpid(writer, 0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        GatherTask(job_, partial(nearest_earlier, "hard", 0, 20_000))(0, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stored = options.rows * options.dims * 2
        told = {"rows": options.rows, "vectors_mb": stored >> 20, "peak_above_start_mb": (peak - before) >> 10}
        print(json.dumps(told | {"times_vectors": round((peak - before) * 1024 / stored, 2)}))


def main() -> None:
    if sys.argv[1] == "side":
        {"daft": daft_side, "tamis": tamis_side}[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for function in (job, signatures, pairs, products, memory):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        command.add_argument("--corpus", default=str(ROOT / "examples/sample"), help="folder of Parquet: id, text")
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--rows", type=int, default=20_000)
        command.add_argument("--dims", type=int, default=384)
        command.add_argument("--workers", type=int, default=2)
        if function is job:
            command.add_argument("peer", help="interpreter with daft[ray]")
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
