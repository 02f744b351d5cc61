"""Does a cut model run faster? The dense model and models cut by 25 %, in turns, on one thread.

usage: python -m bench.compress_speed --model FOLDER [--ratio R] [--rounds N] [--prompt N]

Prefill is a forward pass over a prompt, decoding a step of one token behind it with the cache. Every round times each
model once, one after the other, so what else the machine does falls on all; the ratio of a round is the dense model's
processor seconds to the other's, and the median over the rounds stands with its quartiles. `multiple: 64` keeps neurons
in multiples of 64; the mask keeps shapes as they are, and says what zeros alone buy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def variants(ratio: float) -> dict[str, dict[str, Any]]:
    """What is cut, by name, as steps of `tamis compress`."""
    return {
        "heads and neurons": {"method": "minitron", "ratio": ratio},
        "heads and neurons, multiple: 64": {"method": "minitron", "ratio": ratio, "multiple": 64},
        "blocks": {"method": "shortgpt", "ratio": ratio},
        "mask": {"method": "wanda", "ratio": ratio},
    }


def decoder(model: Any, ids: Any) -> Callable[[], None]:
    """A function that decodes one token behind a prompt, and goes on from there each time."""
    cache = model(input_ids=ids, use_cache=True).past_key_values

    def step() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)

    return step


def main() -> None:
    import torch

    from pipeline.compress import folder
    from pipeline.compress.compression import shrink
    from pipeline.compress.config import Compress
    from pipeline.config import parse_as

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense, _ = folder.load(Path(options.model))
    ids = torch.randint(int(dense.config.vocab_size), (1, options.prompt), generator=torch.Generator().manual_seed(0))
    calibration = ids.repeat(2, 1).numpy()
    models, flops = {"dense": dense.eval()}, {}
    for name, step in variants(options.ratio).items():
        steps = parse_as(Compress, {"model": options.model, "data": "", "run": "", "steps": [step]}).steps
        smaller = shrink(folder.load(Path(options.model))[0], steps, calibration, 2)
        models[name] = smaller.model.eval()
        flops[name] = folder.ratios(folder.count(dense), folder.count(smaller.model))["flops_per_token"]
    with torch.inference_mode():
        runs = {
            "prefill": {n: partial(m, input_ids=ids, use_cache=False) for n, m in models.items()},
            "decode": {n: decoder(m, ids) for n, m in models.items()},
        }
        print(f"| cut by {options.ratio:.0%} | FLOPs less | " + " | ".join(f"{kind}, times" for kind in runs) + " |")
        print("|" + " --- |" * (2 + len(runs)))
        ratios = {kind: in_turns(each, options.rounds) for kind, each in runs.items()}
    for name in flops:
        cells = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in (ratios[k][name] for k in runs)]
        print(f"| {name} | {flops[name]:.1%} | " + " | ".join(cells) + " |")


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of dense seconds to a model's own, by model."""
    seconds = {name: np.empty(rounds) for name in runs}
    for round_ in range(-2, rounds):  # two rounds warm up
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name][round_] = time.process_time() - started
    found = {name: np.quantile(seconds["dense"] / own, [0.5, 0.25, 0.75]) for name, own in seconds.items()}
    return {name: (float(m), float(low), float(high)) for name, (m, low, high) in found.items()}


if __name__ == "__main__":
    main()
