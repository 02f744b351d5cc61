"""Scoring units for width pruning beside the bare pass over the same batches: what a criterion costs on top.

usage: python bench/compress_scoring.py [--model FOLDER] [--rows 16] [--length 128] [--batch 8] [--rounds 5]
       [--threads 1] [--only NAME ...]

A criterion's time is all of it: hooks, sums, scores of every neuron and key/value group. Those of one forward pass
stand beside the model's forward, those of gradients beside forward and backward of the same loss; `taylor second` goes
row by row and stands beside that. `obs` has Gram matrices and inverts them once, whatever the number of tokens.
Processor seconds, medians over rounds in which all take turns. `peak_mb` is the largest resident set of one pass,
`resident_mb` that before the first. Without --model, a Llama of 14 M parameters (hidden 384, 8 layers, MLP 1,024, 4,096
pieces) with weights as they are drawn.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import Calibration, token_loss
from pipeline.compress.importance.base import Importance
from pipeline.compress.importance.cfsp import Cfsp
from pipeline.compress.importance.minitron import Minitron
from pipeline.compress.importance.obs import Obs
from pipeline.compress.importance.taylor import Taylor
from pipeline.compress.importance.wifv import Wifv
from pipeline.engine import threads
from pipeline.models.causal import load_causal
from pipeline.models.training import Shape, new_lm

SHAPE = Shape(hidden=384, layers=8, heads=6, kv_heads=2, mlp=1024, vocab=4096, context=1024)
CRITERIA: dict[str, tuple[Importance, str]] = {
    "wifv (FLAP)": (Wifv(), "forward"),
    "wifn (Wanda-sp)": (Wifv(metric="wifn"), "forward"),
    "cfsp": (Cfsp(), "forward"),
    "minitron": (Minitron(), "forward"),
    "obs": (Obs(), "forward"),
    "taylor": (Taylor(), "backward"),
    "taylor max_logit": (Taylor(objective="max_logit"), "backward"),
    "taylor second": (Taylor(order="second"), "backward of rows"),
}


def peak(work: Callable[[], None]) -> tuple[float, float]:
    """Resident set before some work and its peak during it, MB: Linux forgets the peak on demand."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident()
    work()
    return before, _resident()


def _resident() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(model: Any, blocks: np.ndarray, batch: int, rounds: int, only: list[str]) -> dict[str, Any]:
    import torch

    body = anatomy(model)
    batches, rows = (Calibration.of_blocks(model, blocks, size).batches for size in (batch, 1))

    def forward() -> None:
        with torch.inference_mode():
            for part in batches:
                model(**part, use_cache=False)

    def backward(parts: Any) -> None:
        model.zero_grad(set_to_none=True)
        for part in parts:
            token_loss(model, part).sum().backward()

    def score(importance: Importance) -> None:
        model.zero_grad(set_to_none=True)
        kinds = ("neuron",) if importance.kind == "cfsp" else ("kv_group", "neuron")
        importance.scores(body, body.units(*kinds), Calibration(model, batches))

    chosen = {n: c for n, c in CRITERIA.items() if not only or n in only}
    bare = {"forward": forward, "backward": lambda: backward(batches), "backward of rows": lambda: backward(rows)}
    work: dict[str, Callable[[], None]] = {n: w for n, w in bare.items() if n in {b for _, b in chosen.values()}}
    beside = list(work)
    work |= {n: lambda importance=importance: score(importance) for n, (importance, _) in chosen.items()}
    memory = {}
    for name, run in work.items():
        model.zero_grad(set_to_none=True)
        memory[name] = peak(run)  # and warms up
    spent: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            started = time.process_time()
            run()
            spent[name].append(time.process_time() - started)
    cost = {n: {"cpu_seconds": round(float(np.median(s)), 3), "peak_mb": round(memory[n][1])} for n, s in spent.items()}
    ratio = {n: float(np.median(np.array(spent[n]) / np.array(spent[base]))) for n, (_, base) in chosen.items()}
    return {
        "parameters": model.num_parameters(),
        "tokens": int(blocks.size),
        "resident_mb": round(memory[beside[0]][0]),
        "bare": {n: cost[n] for n in beside},
        "criteria": {n: {"beside": chosen[n][1], "ratio": round(r, 3), **cost[n]} for n, r in ratio.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=CRITERIA, default=[])
    options = parser.parse_args()
    with threads.limited(options.threads):
        import torch

        torch.set_num_threads(options.threads)
        model = load_causal(options.model)[0] if options.model else new_lm(SHAPE, 0).eval()
        blocks = np.random.default_rng(0).integers(0, model.config.vocab_size, (options.rows, options.length))
        found = measure(model, blocks, options.batch, options.rounds, options.only)
    print(json.dumps({"threads": options.threads, **found}, indent=2))


if __name__ == "__main__":
    main()
