"""Every criterion on a corpus of known truth: does it find what it claims to find, and at which cost?

usage: python -m bench.planted.run [--rows 2400] [--seed 0] [--only KIND ...] [--real DIR] [--keep DIR] [--dry]

Makes the corpora (`bench.planted.generator`, `bench.planted.corpora`), trains small models for those that need one, and
runs every seat (`bench.planted.seats`) as the main job does, inline, in a process of its own on one thread. CPU seconds
and peak memory are that process's, fits and reading included, so `random` shows what the engine takes. Influence is
also compared with leave-one-out retraining (`bench.planted.exact`). Writes the tables between the markers of README.md,
unless --dry. With --only it trains what those kinds need, replaces their lines in the tables and leaves all else.
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
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bench.planted import corpora, exact, pair_models
from bench.planted.generator import ROOT, generate
from bench.planted.seats import (
    FORGOTTEN,
    REWRITES,
    SEATS,
    SMALL_LM,
    TRUTHS,
    Seat,
    characters,
    judge,
    missing,
    resolved,
)

README = Path(__file__).with_name("README.md")
STEPS, EARLY = 800, 200
LANGUAGE_MODELS, PAIR_MODELS = ("early", "model", "pruned"), ("clip", "vision", "reader", "judge")


def train_models(corpus: Path, directory: Path, seed: int) -> dict[str, Any]:
    """A model of the corpus after 200 and after 800 steps, and one that lost two concepts' words, as folders.

    `pruned` is `model` with the mean embedding in the place of every token that is of these words alone.
    """
    import torch

    from pipeline.models.training import Shape, new_lm, pack, save_lm, train_lm, train_tokenizer

    torch.set_num_threads(1)
    texts = pq.read_table(corpus, columns=["text"])["text"].to_pylist()
    shape = Shape(**SMALL_LM["shape"])
    tokenizer = train_tokenizer(texts, shape.vocab)
    encoded = [e.ids for e in tokenizer.encode_batch_fast(texts)]
    blocks, model = pack(encoded, shape.context, 0), new_lm(shape, seed)

    def early(step: int) -> bool:
        if step == EARLY:
            save_lm(model, tokenizer, directory / "early")
        return False

    losses = train_lm(model, blocks, STEPS, SMALL_LM["batch"], 3e-3, seed, stop=early)
    save_lm(model, tokenizer, directory / "model")

    words = pq.read_table(corpus.with_name("words.parquet")).to_pylist()
    spoken: dict[bool, set[int]] = {True: set(), False: set()}
    for entry in words:
        forms = (f" {entry['word']}", f" {entry['word'].capitalize()}", entry["word"].capitalize())
        for form in forms:
            spoken[entry["concept"] in FORGOTTEN].update(tokenizer.encode(form).ids)
    lost = sorted(spoken[True] - spoken[False])
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[lost] = weight.mean(dim=0)
    save_lm(model, tokenizer, directory / "pruned")
    return {
        "parameters": model.num_parameters(),
        "tokens": float(np.mean([len(ids) for ids in encoded])),
        "loss": float(losses[-20:].mean()),
        "lost": len(lost),
    }


def run_seat(number: int, places: dict[str, str], directory: Path) -> dict[str, Any]:
    """Run one seat in this process and judge its scores."""
    from pipeline.config import parse
    from pipeline.curation import sieve
    from pipeline.engine.pool import InlinePool
    from pipeline.run import Run

    seat = SEATS[number]
    corpus = places[seat.corpus]
    config = {
        "corpus": {"path": corpus, "id": "id", **seat.columns},
        "scores": [{"kind": seat.kind, "name": "found", **resolved(seat.fields, places)}],
        "select": {"budget": {"fraction": 0.5}},
        "engine": {"address": "inline", "max_bad_fraction": 1.0},
        "run": str(directory / f"seat-{number}"),
        **resolved(seat.config, places),
    }
    with Run(parse(config), InlinePool, quiet=True) as run:
        before, started = _cpu(), time.monotonic()
        sieve(run)
        spent, wall = _cpu() - before, time.monotonic() - started
        parts = sorted(Path(run.store.path, "columns", "found").glob("*.parquet"))
        score = np.concatenate([pq.read_table(p)["score"].to_numpy(zero_copy_only=False) for p in parts])
    table = pq.read_table(corpus)
    found = [asdict(judge(TRUTHS[truth], table, score.astype(np.float64))) for truth in seat.truths]
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count what the parent process held
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {"found": found, "cpu": spent, "wall": wall, "peak": peak, "corpus": len(table)}


def run_rewrite(number: int, places: dict[str, str], directory: Path) -> dict[str, Any]:
    """Rewrite texts with foreign pieces as the main job does: the share of these that goes, of the rest that stays."""
    from pipeline.curation import curate

    _, form, rewrite = REWRITES[number]
    table = pq.read_table(places[form])
    pq.write_table(table.append_column("source", table["text"]), directory / "mixed.parquet")
    config = {
        "corpus": {"path": str(directory / "mixed.parquet")},
        "scores": ["random"],
        "select": {"budget": {"fraction": 1.0}},
        "output": {"rewrite": resolved(rewrite, places)},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(directory / f"rewrite-{number}"),
    }
    before = _cpu()
    written = pq.read_table(curate(config, quiet=True).path)
    gone, left = characters(table, written)
    return {"gone": gone, "left": left, "cpu": _cpu() - before, "rows": len(table)}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def in_process(arguments: list[str]) -> dict[str, Any]:
    """A part of the benchmark in a process of its own, on one thread; its JSON, or `{"error": ...}`."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-m", "bench.planted.run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | one | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def lines_of(seat: Seat, result: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """The rows of the table of one seat, one a truth."""
    if "error" in result:
        return [f"| {seat.name} | failed: {result['error'][:150]} | | | | | | |"]
    flops = f"{seat.flops(about['parameters'], about['tokens']) / 1e6:,.0f} M" if seat.flops else ""
    costs = (f"{1000 * result['cpu'] / result['corpus']:.2f}", flops, f"{result['peak']:,.0f}")
    lines = []
    for name, found in zip(seat.truths, result["found"], strict=True):
        truth, values = TRUTHS[name], ("", "", "")
        if found["marked"]:
            values = (
                f"{100 * found['marked'] / found['rows']:.1f} %",
                f"{found['precision']:.2f}",
                f"{found['auroc']:.3f}",
            )
        says = f"{truth.says} ({truth.end})" if found["marked"] else truth.says
        lines.append(f"| {' | '.join([seat.name, says, *values, *costs])} |")
    return lines


COLUMNS = (
    "criterion",
    "looks for (end of the scores)",
    "marked",
    "precision at the budget",
    "AUROC",
    "CPU ms a row",
    "FLOPs a row",
    "peak MiB",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


REWRITTEN = """| rewrite | texts | foreign characters removed | others kept | CPU ms a text |
| --- | --- | --- | --- | --- |"""
EXACT = "| influence of a row on a held-out loss by | Spearman with leave-one-out retraining |\n| --- | --- |"
TRAINED = "| ten steps of the small model on rows of role | change of its loss on unseen target texts |\n| --- | --- |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--real", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--keep", type=Path, help="where the corpus, models and runs go, and stay")
    parser.add_argument("--dry", action="store_true", help="print the table, leave README.md alone")
    parser.add_argument("--seat", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rewrite", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train", choices=("language", "pairs"), help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.exact:
        print(exact.main(options.keep, options.seed))
        return
    if options.train == "pairs":
        import torch

        torch.set_num_threads(1)
        pair_models.train(options.keep / "planted", options.keep, options.seed)
        print("{}")
        return
    if options.train:
        print(json.dumps(train_models(options.keep / "planted" / "corpus.parquet", options.keep, options.seed)))
        return
    if options.rewrite is not None:
        places = json.loads((options.keep / "places.json").read_text())
        print(json.dumps(run_rewrite(options.rewrite, places, options.keep)))
        return
    if options.seat is not None:
        places = json.loads((options.keep / "places.json").read_text())
        print(json.dumps(run_seat(options.seat, places, options.keep)))
        return
    if (forgotten := missing()) and not options.only:
        sys.exit(f"criteria without a seat in bench/planted/seats.py: {', '.join(forgotten)}")
    with tempfile.TemporaryDirectory() as temporary:
        tables(options, options.keep or Path(temporary))


def tables(options: argparse.Namespace, directory: Path) -> None:
    """Run all seats, or those of `--only`, and write what they found."""
    corpus = generate(directory / "planted", options.rows, options.seed)
    corpora.generate(directory / "planted", options.seed)
    places = {p.stem: str(p) for p in corpus.parent.glob("*.parquet")}
    places |= {name: str(directory / name) for name in (*LANGUAGE_MODELS, *PAIR_MODELS)}
    labels = options.real / "quality_labels" / "dclm_human_labels.parquet"
    if labels.exists():
        places["real"] = str(labels)
    (directory / "places.json").write_text(json.dumps(places))
    chosen = [
        (number, seat)
        for number, seat in enumerate(SEATS)
        if (not options.only or seat.kind in options.only) and seat.corpus in places
    ]
    about: dict[str, Any] = {}
    asked = {name for _, seat in chosen for name in seat.asks | ({"model"} if seat.flops else set())}
    for models, names in (("language", LANGUAGE_MODELS), ("pairs", PAIR_MODELS)):
        if options.only and asked.isdisjoint(names):
            continue
        told = in_process(["--train", models, "--keep", str(directory), "--seed", str(options.seed)])
        if "error" in told:
            sys.exit(f"no {models} models: {told['error']}")
        about |= told
    print(about, flush=True)
    lines = []
    for number, seat in chosen:
        result = in_process(["--seat", str(number), "--keep", str(directory)])
        new = lines_of(seat, result, about)
        print("\n".join(new), flush=True)
        lines += new
    rewritten = []
    for number, (name, form, rewrite) in enumerate(REWRITES):
        if options.only and rewrite["kind"] not in options.only:
            continue
        done = in_process(["--rewrite", str(number), "--keep", str(directory)])
        values = (
            [done["error"][:150], "", ""]
            if "error" in done
            else [
                f"{100 * done['gone']:.1f} %",
                f"{100 * done['left']:.1f} %",
                f"{1000 * done['cpu'] / done['rows']:.2f}",
            ]
        )
        rewritten.append(f"| {' | '.join([name, form, *values])} |")
        print(rewritten[-1], flush=True)
    if options.only:
        if not options.dry:
            write(merged(written_before(), lines, rewritten, f"{_command(options)} at commit {commit()}: its lines."))
        return
    said = (
        f"{_command(options)} at commit {commit()}: "
        f"{pq.ParquetFile(corpus).metadata.num_rows:,} rows, seed {options.seed}; models of "
        f"{about['parameters'] / 1e6:.2f} M parameters, {about['tokens']:.0f} tokens a row."
    )
    answers = in_process(["--exact", "--keep", str(directory), "--seed", str(options.seed)])
    if "error" in answers:
        sys.exit(f"no exact answers: {answers['error']}")
    left_out = [f"| {name} | {value:+.2f} |" for name, value in answers["influence"]]
    trained = [f"| {role} | {change:+.4f} |" for role, change in answers["trained"]]
    written = [
        said,
        "\n".join([HEAD, *lines]),
        "\n".join([REWRITTEN, *rewritten]),
        "\n".join([EXACT, *left_out]),
        "\n".join([TRAINED, *trained]),
    ]
    print("\n\n".join(written[2:]))
    if not options.dry:
        write("\n\n".join(written))


def merged(before: str, lines: Iterable[str], rewritten: Iterable[str], said: str) -> str:
    """The tables as they were written, with lines of some seats and rewrites in place of theirs, or at their seat.

    `said`, how these came about, stands below what the tables say of themselves; a later run of the same command
    replaces it. Raises ValueError where a line tells of a failure: what stood there before is worth more.
    """
    about, scores, rewrites, *others = before.split("\n\n")
    told = [line for line in about.splitlines() if _run_of(line) != _run_of(said)]
    seats = [(seat.name, TRUTHS[truth].says) for seat in SEATS for truth in seat.truths]
    tables = [_replaced(scores, lines, seats), _replaced(rewrites, rewritten, [(r[0], r[1]) for r in REWRITES])]
    return "\n\n".join(["\n".join([*told, said]), *tables, *others])


def _replaced(table: str, lines: Iterable[str], order: list[tuple[str, str]]) -> str:
    head, rows = table.splitlines()[:2], table.splitlines()[2:]
    new = {_key(line): line for line in lines}
    if failed := [line for key, line in new.items() if key not in order]:
        raise ValueError(f"lines that no seat has: {failed}")
    known = {_key(line): line for line in rows} | new
    return "\n".join([*head, *(known[key] for key in order if key in known)])


def _key(line: str) -> tuple[str, str]:
    """What tells a line of a table from the others: its first two cells, without the end of the scores."""
    _, name, says, *_ = (cell.strip() for cell in line.split("|"))
    return name, says.removesuffix(" (top)").removesuffix(" (bottom)")


def _run_of(said: str) -> str:
    return said.partition("` at commit")[0]


def _command(options: argparse.Namespace) -> str:
    told = [
        f"--{name} {getattr(options, name)}"
        for name, default in (("rows", 2400), ("seed", 0))
        if getattr(options, name) != default
    ]
    told += [f"--only {' '.join(options.only)}"] if options.only else []
    return f"`{' '.join(['python -m bench.planted.run', *told])}`"


def commit() -> str:
    """The commit that is checked out, and whether the code differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "pipeline", "bench/*.py")
    return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")


def written_before(name: str = "table") -> str:
    """What stands between the markers of a name in README.md."""
    return README.read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def write(content: str, name: str = "table") -> None:
    """Put something between the markers of a name in README.md."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = README.read_text()
    before, rest = text.split(begin)
    README.write_text(f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
