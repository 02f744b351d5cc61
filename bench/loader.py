"""The trainer's loader: tokens beside what a model consumes in training, and rows beside other loaders.

usage: python bench/loader.py tokens [--rows N] [--threads T]
       python bench/loader.py rows [--rows N] [--rounds R] [--workers 0 2]

`tokens`: a curated run packed at 1,024 tokens; a Llama of 10 M parameters trains on its batches (forward, backward,
AdamW, float32), and the loader is then read alone, at the same batch size. The ratio is the loader's tokens/s over the
training's.

`rows`: one curated set, made of rows of the sample, read shuffled in batches of 32 with texts and ids by our loader, by
`datasets` (load_dataset(..., streaming=True).shuffle, torch's DataLoader) and by MosaicML streaming (the same rows
written as MDS, StreamingDataset with its shuffle, its StreamingDataLoader). They run in turns, whole epochs with
everything that an epoch starts; the ratio is of the best rates. MosaicML streaming does not fit beside this project's
versions: give it an environment of its own that sees ours, see bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from pipeline import curate
from pipeline.engine.pool import InlinePool
from pipeline.models.training import END, Shape, new_lm, train_tokenizer
from pipeline.output.feeding import feeding
from pipeline.output.loader import CuratedDataset, CuratedLoader
from pipeline.output.pack.base import write_packed
from pipeline.output.pack.best_fit import BestFit

SAMPLE = Path(__file__).parents[1] / "examples/sample"
LENGTH, SEQUENCES = 1024, 4
TEN_MILLION = Shape(hidden=256, layers=9, heads=4, kv_heads=4, mlp=768, vocab=8192, context=LENGTH)
BATCH = 32
BUFFER = 10_000
"""Rows of the shuffle buffer of `datasets`; ours and that of MosaicML are larger by default."""


def curated(place: Path, rows: int) -> str:
    """A curated run of `rows` rows of the sample, all kept, in files of 16 MiB and row groups of 2,500."""
    table = ds.dataset(SAMPLE).to_table(columns=["id", "text"])
    table = table.take(pa.array(np.random.default_rng(0).integers(0, len(table), rows)))
    place.mkdir(exist_ok=True)
    pq.write_table(table, place / "corpus.parquet", row_group_size=5000)
    config = {
        "corpus": {"path": str(place / "corpus.parquet")},
        "scores": ["random"],
        "select": {"budget": {"fraction": 1.0}},
        "output": {"file_mb": 16, "row_group_rows": 2500, "scores": False},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(place / "run"),
    }
    curate(config, quiet=True)
    return str(place / "run")


def tokens(place: Path, rows: int, threads: int) -> dict[str, Any]:
    run = curated(place, rows)
    texts = ds.dataset(SAMPLE).to_table(columns=["text"])["text"].to_pylist()
    tokenizer = train_tokenizer(texts[:1000], TEN_MILLION.vocab)
    tokenizer.save(str(place / "tokenizer.json"))
    with feeding(run, lambda _: InlinePool(), quiet=True) as fed:
        pack = BestFit(length=LENGTH, tokenizer=str(place / "tokenizer.json"), end=END)
        packed = write_packed(fed, pack, None)
    torch.set_num_threads(threads)
    model = new_lm(TEN_MILLION, 0).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = CuratedLoader(CuratedDataset(run, SEQUENCES, packed=packed["name"]))
    batches = iter(loader)

    def step() -> int:
        batch = next(batches)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return int(batch["input_ids"].numel())

    step()  # the first allocates
    training = Rate.of(step, 2)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    result |= {"training_tokens_s": int(training.wall), "training_tokens_cpu_s": int(training.cpu)}
    for workers in (0, 1):
        loader = CuratedLoader(CuratedDataset(run, SEQUENCES, packed=packed["name"]), workers)
        rate = Rate.of(lambda loader=loader: sum(batch["input_ids"].numel() for batch in loader), 3)
        result[f"workers_{workers}_tokens_s"] = int(rate.wall)
        result[f"workers_{workers}_ratio"] = round(rate.wall / training.wall, 1)
        if not workers:
            result["cpu_ratio"] = round(rate.cpu / training.cpu, 1)
    return result | {"sequences": packed["sequences"]}


def rows(place: Path, count: int, rounds: int, workers: list[int]) -> Iterator[dict[str, Any]]:
    run = curated(place, count)
    files = sorted(str(p) for p in Path(run, "curated").iterdir())
    mds = write_mds(place / "mds", files)
    for processes in workers:
        readers: dict[str, Callable[[int], int]] = {
            "tamis": lambda epoch, n=processes: tamis(run, epoch, n),
            "datasets": lambda epoch, n=processes: hugging_face(files, epoch, n),
        }
        if mds:
            readers["mosaicml"] = mosaicml(str(mds), processes)
        best = dict.fromkeys(readers, Rate(0, 0))
        for epoch in range(rounds):
            for name, read in readers.items():
                rate = Rate.of(lambda read=read, epoch=epoch: read(epoch), 1)
                best[name] = best[name].better(rate)
        result = {"workers": processes, "rows": count, "batch": BATCH}
        for name, rate in best.items():
            result |= {f"{name}_rows_s": int(rate.wall)} | ({} if processes else {f"{name}_rows_cpu_s": int(rate.cpu)})
        for name in best.keys() - {"tamis"}:
            result[f"over_{name}"] = round(best["tamis"].wall / best[name].wall, 2)
            if not processes:
                result[f"cpu_over_{name}"] = round(best["tamis"].cpu / best[name].cpu, 2)
        yield result


@dataclass(frozen=True)
class Rate:
    """What is done a second, and a CPU second of this process, which tells more beside other work."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, work: Callable[[], int], rounds: int) -> Rate:
        best = cls(0, 0)
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            done = work()
            best = best.better(cls(done / (time.perf_counter() - wall), done / (time.process_time() - cpu)))
        return best

    def better(self, other: Rate) -> Rate:
        return Rate(max(self.wall, other.wall), max(self.cpu, other.cpu))


def tamis(run: str, epoch: int, workers: int) -> int:
    data = CuratedDataset(run, BATCH)
    data.set_epoch(epoch)
    return sum(len(batch["text"]) for batch in CuratedLoader(data, workers))


def hugging_face(files: list[str], epoch: int, workers: int) -> int:
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=files, split="train", streaming=True)
    loader = DataLoader(data.shuffle(seed=epoch, buffer_size=BUFFER), batch_size=BATCH, num_workers=workers)
    return sum(len(batch["text"]) for batch in loader)


def write_mds(place: Path, files: list[str]) -> Path | None:
    try:
        from streaming import MDSWriter
    except ImportError as error:
        print(f"MosaicML streaming is left out: {error}")
        return None
    with MDSWriter(out=str(place), columns={"id": "str", "text": "str"}, compression="zstd") as out:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    out.write(row)
    return place


def mosaicml(place: str, workers: int) -> Callable[[int], int]:
    """Keeps its data set, which unpacks its shards in the first epoch and keeps them."""
    from streaming import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(remote=place, local=f"{place}-cache-{workers}", shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)
    return lambda _: sum(len(batch["text"]) for batch in loader)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["tokens", "rows"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.what == "tokens":
            print(json.dumps(tokens(Path(name), options.rows or 3000, options.threads)))
        else:
            for result in rows(Path(name), options.rows or 40_000, options.rounds, options.workers):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
