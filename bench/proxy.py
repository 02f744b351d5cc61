"""What a small language model learns from the selection of each criterion, on real text: `tamis compare --proxy`.

usage: python -m bench.proxy [--corpus DIR] [--source NAME] [--at 0.1 0.25] [--steps N] [--keep DIR] [--dry]

The corpus is ../shared/data/text_corpus (real text of many sources, 33 MB), the target the domain of one source: 200 of
its documents are what the criteria of configs/proxy.yaml learn from, 300 others what the models are measured on, and
the rest stay in the corpus. Everything else is the command's own. Writes the table between the markers of
bench/planted/README.md, unless --dry; with --keep, a run that was broken off continues.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.planted.run import commit, write
from pipeline.compare.proxy import compare_proxy, settings
from pipeline.compare.verdict import print_comparison, table
from pipeline.config import load

ROOT = Path(__file__).parents[1]
LEARN, MEASURE = 200, 300


def prepare(corpus: Path, source: str, directory: Path) -> None:
    """Write `corpus/`, `target.parquet` (to learn from) and `unseen.parquet` (to measure on)."""
    rows = pq.read_table(corpus, columns=["id", "text", "source"])
    of_target = np.flatnonzero(np.array(rows["source"].to_pylist()) == source)
    drawn = np.random.default_rng(0).permutation(of_target)[: LEARN + MEASURE]
    if len(drawn) < LEARN + MEASURE:
        raise SystemExit(f"source {source!r} has {len(of_target)} documents, {LEARN + MEASURE} are needed")
    (directory / "corpus").mkdir(parents=True, exist_ok=True)
    left = np.setdiff1d(np.arange(len(rows)), drawn)
    pq.write_table(rows.take(pa.array(left)), directory / "corpus" / "part-0.parquet", row_group_size=1000)
    pq.write_table(rows.take(pa.array(drawn[:LEARN])), directory / "target.parquet")
    pq.write_table(rows.take(pa.array(drawn[LEARN:])), directory / "unseen.parquet")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared" / "data" / "text_corpus" / "parts")
    parser.add_argument("--source", default="wikipedia_passage")
    parser.add_argument("--at", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--with", dest="options", nargs="*", default=[], metavar="A.B=C")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="A.B=C")
    parser.add_argument("--keep", type=Path, help="where the corpus and the run go, and stay")
    parser.add_argument("--dry", action="store_true", help="print the table, leave README.md alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (options.keep or Path(temporary)).resolve()
        if not (directory / "unseen.parquet").exists():
            prepare(options.corpus, options.source, directory)
        os.chdir(directory)  # where the paths of the configuration lie
        config = load(str(ROOT / "configs" / "proxy.yaml"), options.overrides)
        asked = [f"steps={options.steps}", *options.options]
        done = compare_proxy(config, settings(config, asked, target=["unseen.parquet"], at=options.at))
    print_comparison(done)
    if not options.dry:
        told = f"python -m bench.proxy --at {' '.join(map(str, options.at))} --steps {options.steps}"
        told += f" --with {' '.join(options.options)}" if options.options else ""
        told += f" --set {' '.join(options.overrides)}" if options.overrides else ""
        said = f"`{told}` at commit {commit()}; the target is `{options.source}`. {done.setting}"
        write(f"{said}\n\n{table(done.lines, done.measure)}", "proxy")


if __name__ == "__main__":
    main()
