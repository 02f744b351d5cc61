"""The fastText job end to end (read, classify, keep P >= 0.5, write) beside other tools: whole processes, two cores.

usage: python bench/fasttext_job.py DATA [--times N] [--rounds R] [--drivers DIR] [--peer NAME=PYTHON ...]

DATA holds parquet/*.parquet (id, text) and quality.bin with the label __label__hq, as ../shared/peers/gen_real.py makes
them. With --times 4 the job runs on four times the rows: copies under other ids, made once beside DATA. A peer is a
name of `PEERS` and the interpreter of the environment that has it; its driver comes from --drivers. `bare` is a loop of
pyarrow and fastText in two processes: the same files and no Ray, no run directory, nothing that can be resumed.

Every tool runs once a round, one after the other. What counts is the wall time of the whole process, from the start of
its interpreter to its end, and the rows in the files that it wrote, which must be equal. datatrove may keep a row more
whose probability is within 1e-5 of a half: it asks for all labels, and fastText adds 1e-5 to each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
CPUS = 2
BATCH_ROWS = 1024
PEERS = {"datatrove": "peer_datatrove.py", "nemo-curator": "peer_nemo_curator.py", "ray-data": "peer_ray_data.py"}
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"}
"""Every tool that uses Ray starts one of its own, whatever else runs on the machine."""


def enlarge(data: Path, times: int) -> Path:
    """A directory like DATA with so many times the rows, every copy under ids of its own."""
    target = data.with_name(f"{data.name}-x{times}")
    if not (target / "quality.bin").exists():
        (target / "parquet").mkdir(parents=True, exist_ok=True)
        for copy in range(times):
            for file in sorted((data / "parquet").glob("*.parquet")):
                table = pq.read_table(file)
                ids = pc.binary_join_element_wise(str(copy), table["id"].cast(pa.string()), "-")
                table = table.set_column(table.schema.get_field_index("id"), "id", ids)
                pq.write_table(
                    table, target / "parquet" / f"{copy}-{file.name}", compression="zstd", row_group_size=4000
                )
        os.symlink(data / "quality.bin", target / "quality.bin")
    return target


def bare(data: Path, out: Path) -> None:
    """The least that does the job: two processes, a file at a time."""
    (out / "kept").mkdir(parents=True)
    files = sorted((data / "parquet").glob("*.parquet"))
    with ProcessPoolExecutor(CPUS, get_context("spawn"), _load, (str(data / "quality.bin"),)) as processes:
        list(processes.map(_sieve_file, files, [out / "kept" / file.name for file in files]))


def _load(path: str) -> None:
    global _model
    import fasttext

    pa.set_cpu_count(1)
    _model = fasttext.load_model(path)


def _sieve_file(source: Path, target: Path) -> None:
    table = pq.read_table(source, use_threads=False)
    texts, keep = table["text"].to_pylist(), []
    for start in range(0, len(texts), BATCH_ROWS):
        lines = [text.replace("\n", " ") + "\n" for text in texts[start : start + BATCH_ROWS]]
        labels, values = _model.f.multilinePredict(lines, 1, 0.0, "strict")
        p = np.array([value[0] for value in values], np.float32)
        keep.append(np.where(np.array([label[0] for label in labels]) == "__label__hq", p, 1 - p) >= 0.5)
    pq.write_table(table.filter(pa.array(np.concatenate(keep))), target, compression="zstd")


def command(tool: str, interpreters: dict[str, str], drivers: Path, data: Path, out: Path) -> list[str]:
    if tool == "tamis":
        settings = {"corpus.path": data / "parquet", "scores.0.model": data / "quality.bin", "engine.workers": CPUS}
        changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        config = str(ROOT / "configs/fasttext.yaml")
        return [sys.executable, "-m", "pipeline.cli", "curate", config, "--run", str(out), *changes]
    if tool == "bare":
        return [sys.executable, __file__, str(data), "--bare", str(out)]
    return [interpreters[tool], str(drivers / PEERS[tool]), "fasttext", str(data), str(out), str(CPUS)]


def measure(words: list[str], out: Path) -> tuple[float, int]:
    """Wall seconds of the whole process and the rows in the files that it wrote."""
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    files = [file for name in ("curated", "kept") for file in (out / name).rglob("*.parquet")]
    return seconds, sum(pq.read_metadata(file).num_rows for file in files)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drivers", type=Path, default=ROOT.parent / "shared/peers")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        return bare(options.data, options.bare)
    data = options.data.resolve()
    data = enlarge(data, options.times) if options.times > 1 else data
    interpreters = dict(peer.split("=", 1) for peer in options.peer)
    tools = ["tamis", "bare", *interpreters]
    times: dict[str, list[float]] = {tool: [] for tool in tools}
    kept: dict[str, int] = {}
    for round_ in range(options.rounds):
        for tool in tools if round_ % 2 == 0 else reversed(tools):
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "out"
                words = command(tool, interpreters, options.drivers, data, out)
                seconds, kept[tool] = measure(words, out)
            times[tool].append(seconds)
            print(json.dumps({"round": round_, "tool": tool, "seconds": round(seconds, 2), "kept": kept[tool]}))
    best = {tool: min(values) for tool, values in times.items()}
    middle = {tool: statistics.median(values) for tool, values in times.items()}
    rows = sum(pq.read_metadata(file).num_rows for file in (data / "parquet").glob("*.parquet"))
    result = {"rows": rows, "load": os.getloadavg()[1], "kept": kept}
    result |= {name: {t: round(v, 2) for t, v in of.items()} for name, of in (("best_s", best), ("median_s", middle))}
    for name, of in (("times_as_fast_best", best), ("times_as_fast_median", middle)):
        result[name] = {tool: round(of[tool] / of["tamis"], 2) for tool in tools if tool != "tamis"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
