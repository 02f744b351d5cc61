"""Filter-and-write beside a bare pyarrow loop that reads, filters and writes the same files, on one core.

usage: python bench/filter_write.py [--corpus DIR] [--keep SHARE] [--rounds R] [--rows N]

Both read every file, keep the same rows (a random share) and write them as zstd Parquet with row groups of one size.
The bare loop is `read_table`, `filter`, `write_table`, file by file; ours is `write_subset` over stored flags in this
process, with its counting, planning and fingerprints. They run in turns; the ratio is of their best times. Without
--corpus a corpus of N rows is made from the example sample.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.corpus.shards import MIB
from pipeline.engine.parts import part_name
from pipeline.engine.pool import InlinePool
from pipeline.output.write import Subset, write_subset
from pipeline.run import Run
from pipeline.select.stage import select

SAMPLE = Path(__file__).parents[1] / "examples/sample"
GROUP_ROWS = 10_000
FILE_MIB = 16.0


def make_corpus(directory: Path, rows: int) -> Path:
    """`rows` rows of the sample over four files, as another writer would leave them."""
    sample = ds.dataset(SAMPLE).to_table()
    table = sample.take(pa.array(np.random.default_rng(0).integers(0, len(sample), rows)))
    directory.mkdir()
    for i in range(4):
        piece = table.slice(i * rows // 4, (i + 1) * rows // 4 - i * rows // 4)
        pq.write_table(piece, directory / f"part-{i}.parquet", row_group_size=4000, compression="zstd")
    return directory


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        corpus = options.corpus or make_corpus(place / "corpus", options.rows)
        config = {"corpus": {"path": str(corpus)}, "scores": ["random"], "run": str(place / "run")}
        with Run(parse(config | {"select": {"budget": {"fraction": options.keep}}}), InlinePool, quiet=True) as run:
            run.materialize([row_column(False, None)])
            run.materialize([s.column(run) for s in run.config.scores])
            select(run, run.config.select, run.config.scores)
            columns = tuple(run.schema.names)
            subset = Subset("select", run.store.child("out"), "part-{:05d}.parquet", columns, row_group_rows=GROUP_ROWS)
            flags = [pq.read_table(run.store.at("columns", "select", part_name(s.index)))["keep"] for s in run.shards]
            keep = pa.chunked_array([chunk for flag in flags for chunk in flag.chunks])
            files = sorted(corpus.glob("**/*.parquet"))
            edges = np.cumsum([0, *(pq.read_metadata(f).num_rows for f in files)])

            def bare() -> None:
                shutil.rmtree(place / "bare", ignore_errors=True)
                (place / "bare").mkdir()
                for file, start, end in zip(files, edges, edges[1:], strict=False):
                    table = pq.read_table(file, use_threads=False).filter(keep.slice(start, end - start))
                    pq.write_table(table, place / "bare" / file.name, row_group_size=GROUP_ROWS, compression="zstd")

            def ours() -> None:
                run.store.remove("out")
                write_subset(run, subset, FILE_MIB * MIB, "write")

            bare(), ours()
            expected, got = (ds.dataset(d).to_table() for d in (place / "bare", run.store.at("out")))
            assert got.replace_schema_metadata(None).equals(expected.replace_schema_metadata(None)), "rows differ"
            times = np.array([(seconds(bare), seconds(ours)) for _ in range(options.rounds)])
            size = [sum(f.stat().st_size for f in d.iterdir()) for d in (place / "bare", Path(run.store.at("out")))]
        read = ds.dataset(corpus).to_table().nbytes / 1e6
    raw, tamis = read / times.min(axis=0)
    result = {"rows": int(edges[-1]), "mb": round(read, 1), "kept": len(expected), "rounds": options.rounds}
    result |= {"bare_mb_s": round(raw, 1), "tamis_mb_s": round(tamis, 1), "ratio": round(tamis / raw, 3)}
    print(
        json.dumps(result | {"bare_written_mb": round(size[0] / 1e6, 1), "tamis_written_mb": round(size[1] / 1e6, 1)})
    )


if __name__ == "__main__":
    main()
