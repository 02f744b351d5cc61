"""Every method of compression on one model at one ratio: perplexity before and after healing, seconds, memory.

usage: python -m bench.compress --model FOLDER [--ratio R] [--rows N] [--tokens N] [--only METHOD...] [--dry]

Calibration, recovery and held-out blocks come from ../shared/data/text_corpus (real text), each from documents of its
own. All methods get the same calibration rows, the same held-out blocks and, after the cut, the same healing: all
weights, the same blocks in the same order. `random` stands first; a method earns its place by beating it before
healing. `seconds` are CPU seconds of the step alone, `MiB` the largest memory of the process while it ran beyond what
it had with the model loaded. Methods run in processes of their own. Writes the table between the `<!-- compress -->`
markers of bench/README.md, unless --dry.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench.planted.run import commit

ROOT = Path(__file__).parents[1]
CORPUS = ROOT.parent / "shared" / "data" / "text_corpus" / "parts"
README = ROOT / "bench" / "README.md"
METHODS = (
    "random", "magnitude", "maw", "wanda_sp", "flap", "llm_pruner", "minitron", "cfsp", "nirvana", "tyr_local",
    "shortgpt", "finercut", "laptop", "wanda", "sparsegpt", "owl",
)  # fmt: skip


def blocks_of(model: str, rows: int, length: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibration, recovery and held-out blocks (n, length)."""
    from transformers import AutoTokenizer

    from pipeline.compress.data import pack_blocks, parquet, set_apart

    tokenizer = AutoTokenizer.from_pretrained(model)
    held, rest = set_apart(parquet([str(CORPUS)], "text").texts(), 0.02, 0)
    apart, recovery = set_apart(iter([rest]), 0.2, 1)
    wanted = ((apart, rows * length), (recovery, tokens), (held, 16 * length))
    calibration, heal, unseen = (pack_blocks(texts, tokenizer, length, n) for texts, n in wanted)
    return calibration, heal, unseen


def one(method: str, options: argparse.Namespace) -> None:
    """Run a method and print its line as JSON."""
    import tempfile

    import torch

    from pipeline.compress import folder
    from pipeline.compress.compression import shrink
    from pipeline.compress.config import Compress
    from pipeline.compress.healing import heal
    from pipeline.compress.recover.full import Full
    from pipeline.config import parse_as
    from pipeline.models.training import lm_loss

    torch.set_num_threads(options.threads)
    data = {"model": options.model, "data": "", "run": "", "steps": [{"method": method, "ratio": options.ratio}]}
    steps = parse_as(Compress, data).steps
    calibration, recovery, unseen = blocks_of(options.model, options.rows, options.length, options.tokens)
    model, _ = folder.load(Path(options.model))
    before, had = folder.count(model), memory()
    started = time.process_time()
    smaller = shrink(model, steps, calibration, 4)
    seconds, used = time.process_time() - started, memory() - had
    line = {
        "method": method,
        "removed": folder.ratios(before, folder.count(smaller.model, smaller.masks)),
        "cut": math.exp(lm_loss(smaller.model, unseen, 4)),
        "seconds": seconds,
        "memory": used,
        "passes": dict(smaller.passes),
    }
    if options.tokens:
        with tempfile.TemporaryDirectory() as directory:
            recipe = Full(lr=options.lr, batch=2)
            done = heal(smaller.model, recipe, recovery, options.tokens, masks=smaller.masks, directory=Path(directory))
        line["healed"] = math.exp(lm_loss(done.model, unseen, 4))
    print(json.dumps(line))


def memory() -> float:
    """Largest resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096, help="to heal on; 0: no healing")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(METHODS))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        one(options.one, options)
        return
    lines = []
    for method in options.only:
        command = [sys.executable, "-m", "bench.compress", "--one", method, "--model", options.model]
        for name in ("ratio", "rows", "length", "tokens", "lr", "threads"):
            command += [f"--{name}", str(getattr(options, name))]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if ran.returncode:
            print(f"{method}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        lines.append(json.loads(ran.stdout.strip().splitlines()[-1]))
        print(json.dumps(lines[-1]), flush=True)
    from pipeline.compress import folder
    from pipeline.models.training import lm_loss

    dense = math.exp(lm_loss(folder.load(Path(options.model))[0], blocks_of(options.model, 1, options.length, 1)[2], 4))
    table = written(lines, dense, options)
    print(table)
    if not options.dry:
        text = README.read_text(encoding="utf-8")
        start, end = "<!-- compress -->\n", "<!-- /compress -->"
        README.write_text(text[: text.index(start) + len(start)] + table + text[text.index(end) :], encoding="utf-8")


def written(lines: list[dict[str, object]], dense: float, options: argparse.Namespace) -> str:
    """The table, with what made it."""
    told = " ".join(f"--{n} {getattr(options, n)}" for n in ("ratio", "rows", "length", "tokens", "lr", "threads"))
    name = Path(options.model).name
    text = (
        f"`python -m bench.compress --model {name} {told}` at commit {commit()}; the dense model has {dense:.2f}.\n\n"
    )
    heads = ["method", "of the layers' matrices", "of all FLOPs", "perplexity, cut", "healed", "CPU s", "MiB"]
    text += f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n"
    for line in lines:
        removed: dict[str, float] = line["removed"]  # type: ignore[assignment]  # parsed JSON
        cells = [
            line["method"], f"{removed['prunable']:.1%}", f"{removed['flops_per_token']:.1%}", f"{line['cut']:.2f}",
            f"{line['healed']:.2f}" if "healed" in line else "", f"{line['seconds']:.1f}", f"{line['memory']:.0f}",
        ]  # fmt: skip
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text


if __name__ == "__main__":
    main()
