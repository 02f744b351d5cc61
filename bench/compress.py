"""Every method of compression and of healing on one model: perplexity before and after, seconds, memory.

usage: python -m bench.compress --model FOLDER [--ratio R] [--sparsity S] [--rows N] [--tokens N] [--draws N]
           [--only METHOD...] [--results FILE] [--dry]

Calibration, recovery and held-out blocks come from ../shared/data/text_corpus (real text), each from documents of its
own. All methods get the same calibration rows, the same held-out blocks and, after the cut, the same healing: all
weights, the same blocks in the same order. What may be removed decides what chance can do, so every family of methods
has its own control: `random`, the mean of some draws before healing (their range in brackets; the first draw is
healed). A method earns its place by beating all draws of its family's control before healing. Ways to heal have one
family for each cut that they heal, and one for what cuts while it heals; they see the same tokens. `CPU s` are
processor seconds of what the family compares, the cut or the healing, `MiB` the largest memory of the process while it
ran beyond what it had before. Every line runs in a process of its own and is kept in --results, from which a broken-off
bench goes on. Writes the table between the `<!-- compress -->` markers of bench/README.md, unless --dry.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.planted.run import commit

ROOT = Path(__file__).parents[1]
CORPUS = ROOT.parent / "shared" / "data" / "text_corpus" / "parts"
README = ROOT / "bench" / "README.md"
BLOCKS = ("calibration", "recovery", "held_out")
HELD_OUT = 32
"""Blocks that perplexity is measured on."""
Fields = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Methods that can be compared: they remove, or heal, the same.

    `methods`: fields of each beside what all get. `control`: the step by chance, of kind and fields. `given`: what
    every step gets instead of the ratio that is asked for. `heals`: the method whose cut they heal, `""` where they cut
    while they heal; None: they cut.
    """

    methods: dict[str, Fields]
    control: Fields | None = None
    given: Fields = field(default_factory=dict)
    heals: str | None = None


RANDOM: Fields = {"kind": "random"}
WIDTH: Fields = {
    "kind": "width",
    "units": ["kv_group", "neuron"],
    "importance": RANDOM,
    "allocation": {"kind": "uniform"},
}
INNER: Fields = {"ratio": 0.25, "layers": [4, 28]}
"""Where LLM-Pruner's authors cut; 25 % there are 20 % of all layers."""
SEARCH: Fields = {
    "kind": "tyr",
    "rounds": 3,
    "offspring": 16,
    "generations": 8,
    "halving": [[512, 4], [2048, 2]],
    "top": 1024,
}
"""Týr's search at a size for CPUs."""
FAMILIES: dict[str, Family] = {
    "heads and neurons": Family(
        {
            **{m: {} for m in ("magnitude", "wanda_sp", "flap", "llm_pruner", "minitron", "nirvana", "tyr_local")},
            "tyr": {"allocation": SEARCH},
        },
        WIDTH,
    ),
    "the same, layers 4 to 27": Family({"llm_pruner": {}, "minitron": {}}, WIDTH, INNER),
    "neurons": Family({"maw": {}, "cfsp": {}}, WIDTH | {"units": ["neuron"]}),
    "blocks": Family({"shortgpt": {}}, {"kind": "depth", "method": "random"}),
    "branches": Family(
        {m: {"rows": 2} for m in ("finercut", "laptop")}, {"kind": "depth", "units": "branch", "method": "random"}
    ),
    "weights": Family(
        {m: {} for m in ("wanda", "sparsegpt", "owl", "gblm", "slim")}, {"kind": "sparse", "method": RANDOM}
    ),
    "weights, 2 of 4": Family(
        {"wanda": {}, "armor": {"kind": "sparse", "method": {"kind": "armor", "iterations": 100}}},
        {"kind": "sparse", "method": RANDOM},
        {"pattern": {"keep": 2, "of": 4}},
    ),
    "minitron's cut": Family(
        {
            "full": {},
            "last_layers": {},
            "lora": {},
            "lora, ranks by importance": {"kind": "lora", "ranks": "importance"},
            "distill": {},
            "distill, hidden states": {"kind": "distill", "hidden": "cosine"},
        },
        heals="minitron",
    ),
    "wanda's zeros": Family(
        {
            "full": {},
            "perp": {},
            "perp, scalelora": {"kind": "perp", "adapter": "scalelora"},
            "perp, no adapter": {"kind": "perp", "adapter": None},
            "perp, reconstruct": {"kind": "perp", "reconstruct": True},
        },
        heals="wanda",
    ),
    "while it heals": Family(
        {
            "gradual": {"step": WIDTH | {"ratio": 0.2, "importance": {"kind": "minitron"}}, "rows": 8},
            "adapt_pruner": {
                "step": WIDTH | {"ratio": 0.2, "importance": {"kind": "taylor"}, "allocation": {"kind": "adapt"}},
                "rounds": 8,
                "rows": 8,
            },
            "continuous": {"ratio": 0.2, "every": 2},
            "lora_prune": {"ratio": 0.2, "every": 2},
            "gradual_magnitude": {"ratio": 0.5},
            "soft_shrinkage": {"ratio": 0.5},
        },
        heals="",
    ),
}


@dataclass(frozen=True)
class Plan:
    """What a line does: steps, the recovery behind them (None: the default) and schedules."""

    steps: list[Fields] = field(default_factory=list)
    recover: Fields | None = None
    schedules: list[Fields] = field(default_factory=list)


def plan(family: str, method: str, draw: int, options: argparse.Namespace) -> Plan:
    """Of a method of a family; `random` is the family's draw of that number."""
    of = FAMILIES[family]
    fields = of.methods.get(method, {})
    if of.heals is None:
        given = of.given or {"ratio": options.sparsity if family == "weights" else options.ratio}
        if method != "random":
            return Plan([({} if "kind" in fields else {"method": method}) | given | fields])
        assert of.control is not None
        by_chance: Fields = {"importance": RANDOM | {"seed": draw}}
        if of.control["kind"] != "width":
            by_chance = {"method": RANDOM | {"seed": draw}} if of.control["kind"] == "sparse" else {"seed": draw}
        return Plan([of.control | given | by_chance])
    if of.heals:
        ratio = options.sparsity if of.heals == "wanda" else options.ratio
        full = {"lr": options.lr} if method == "full" else {}
        return Plan([{"method": of.heals, "ratio": ratio}], {"kind": method, "batch": 2} | full | fields)
    recover = {"kind": "lora", "batch": 2} if method == "lora_prune" else None
    return Plan([], recover, [{"kind": method} | fields])


def blocks_of(model: str, rows: int, length: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibration, recovery and held-out blocks (n, length)."""
    from transformers import AutoTokenizer

    from pipeline.compress.data import pack_blocks, parquet, set_apart

    tokenizer = AutoTokenizer.from_pretrained(model)
    held, rest = set_apart(parquet([str(CORPUS)], "text").documents(), 0.02, 0)
    apart, recovery = set_apart(iter([rest]), 0.2, 1)
    wanted = ((apart, rows * length), (recovery, tokens), (held, HELD_OUT * length))
    calibration, heal, unseen = (pack_blocks(texts, tokenizer, length, n) for texts, n in wanted)
    return calibration, heal, unseen


def one(family: str, method: str, draw: int, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run a method on the blocks in a directory."""
    import torch

    from pipeline.compress import folder
    from pipeline.compress.compression import shrink
    from pipeline.compress.config import Compress
    from pipeline.compress.healing import heal
    from pipeline.config import parse_as
    from pipeline.models.training import lm_loss

    torch.set_num_threads(options.threads)
    planned = plan(family, method, draw, options)
    recover = planned.recover or {"kind": "full", "lr": options.lr, "batch": 2}
    made = {"steps": planned.steps, "recover": recover, "schedules": planned.schedules}
    config = parse_as(Compress, {"model": options.model, "data": "", "run": ""} | made)
    assert config.recover is not None
    calibration, recovery, unseen = (np.load(directory / f"{name}.npy") for name in BLOCKS)
    model, _ = folder.load(Path(options.model))
    dense = folder.load(Path(options.model))[0] if config.recover.needs_teacher else None
    before, had = folder.count(model), memory()
    started = time.process_time()
    smaller = shrink(model, config.steps, calibration, 4)
    line: dict[str, Any] = {}
    if FAMILIES[family].heals is None:
        line |= {"seconds": time.process_time() - started, "memory": memory() - had}
    if config.steps:
        line["cut"] = math.exp(lm_loss(smaller.model, unseen, 4))
    model, masks = smaller.model, smaller.masks
    if options.tokens and draw == 0:
        had, started = memory(), time.process_time()
        done = heal(
            model, config.recover, recovery, options.tokens, teacher=dense, masks=masks,
            directory=directory / "healing", callbacks=config.schedules,
        )  # fmt: skip
        model, masks = done.model, done.masks
        if FAMILIES[family].heals is not None:
            line |= {"seconds": time.process_time() - started, "memory": memory() - had}
        line["healed"] = math.exp(lm_loss(model, unseen, 4))
    return line | {"removed": folder.ratios(before, folder.count(model, masks))}


def memory() -> float:
    """Largest resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ratio", type=float, default=0.2, help="of the parameters that a structured method may touch")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the weights that a mask covers")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096, help="to heal on; 0: no healing")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draws", type=int, default=3, help="of every control")
    parser.add_argument("--only", nargs="+", help="methods, `random` among them (default: all)")
    parser.add_argument("--results", type=Path, help="file of lines that goes on from run to run")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--one", nargs=4, metavar=("FAMILY", "METHOD", "DRAW", "DIRECTORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        family, method, draw, directory = options.one
        print(json.dumps(one(family, method, int(draw), options, Path(directory))))
        return
    with tempfile.TemporaryDirectory() as directory:
        compare(options, Path(directory))


def asked(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Family, method and draw of every line, in the order of the table."""
    lines = []
    for family, of in FAMILIES.items():
        if of.heals is not None and not options.tokens:
            continue
        methods = (*(["random"] if of.control else []), *of.methods)
        wanted = [m for m in methods if options.only is None or m in options.only]
        lines += [(family, m, draw) for m in wanted for draw in range(options.draws if m == "random" else 1)]
    return lines


def settings(options: argparse.Namespace) -> list[str]:
    """What the numbers depend on, as arguments."""
    names = ("ratio", "sparsity", "rows", "length", "tokens", "lr", "threads")
    return [part for n in names for part in (f"--{n}", str(getattr(options, n)))]


def compare(options: argparse.Namespace, directory: Path) -> None:
    """Run every line in a process of its own, and write the table."""
    from pipeline.compress import folder
    from pipeline.models.training import lm_loss

    blocks = blocks_of(options.model, options.rows, options.length, options.tokens)
    for name, rows in zip(BLOCKS, blocks, strict=True):
        np.save(directory / f"{name}.npy", rows)
    known = {}
    if options.results and options.results.exists():
        kept = [json.loads(line) for line in options.results.read_text().splitlines()]
        known = {tuple(k["line"]): k for k in kept if k["settings"] == settings(options)}
    lines = []
    for line in asked(options):
        if line not in known:
            command = [sys.executable, "-m", "bench.compress", "--model", options.model, *settings(options)]
            command += ["--one", *map(str, line), str(directory)]
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
            shutil.rmtree(directory / "healing", ignore_errors=True)
            if ran.returncode:
                raise SystemExit(f"{line}: {ran.stderr}")
            known[line] = {"line": line, "settings": settings(options)} | json.loads(ran.stdout.splitlines()[-1])
            print(json.dumps(known[line]), flush=True)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(known[line]) + "\n")
        lines.append(known[line])
    dense = math.exp(lm_loss(folder.load(Path(options.model))[0], blocks[2], 4))
    table = written(lines, dense, options)
    print(table)
    if not options.dry:
        text = README.read_text(encoding="utf-8")
        start, end = "<!-- compress -->\n", "<!-- /compress -->"
        README.write_text(text[: text.index(start) + len(start)] + table + text[text.index(end) :], encoding="utf-8")


def written(lines: list[dict[str, Any]], dense: float, options: argparse.Namespace) -> str:
    """The table, with what made it."""
    command = f"python -m bench.compress --model {Path(options.model).name} {' '.join(settings(options))}"
    text = f"`{command}` at commit {commit()}; the dense model has {dense:.2f}.\n\n"
    heads = [
        "removed",
        "method",
        "of the layers' matrices",
        "of all FLOPs",
        "perplexity, cut",
        "healed",
        "CPU s",
        "MiB",
    ]
    text += f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n"
    for line in lines:
        family, method, draw = line["line"]
        if draw:
            continue  # told with the first draw
        draws = [other["cut"] for other in lines if other["line"][:2] == line["line"][:2] and "cut" in other]
        cut = (f"{np.mean(draws):.2f}" if draws else "") + (
            f" ({min(draws):.2f} to {max(draws):.2f})" if len(draws) > 1 else ""
        )
        cells = [
            family, method, f"{line['removed']['prunable']:.1%}", f"{line['removed']['flops_per_token']:.1%}", cut,
            f"{line['healed']:.2f}" if "healed" in line else "", f"{line['seconds']:.1f}", f"{line['memory']:.0f}",
        ]  # fmt: skip
        text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    main()
