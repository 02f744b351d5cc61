"""The `quality` transform beside fastText's own batched predict, on one core, on the same batches.

usage: python bench/quality.py [--corpus DIR] [--model BIN] [--rows N] [--rounds R]

fastText gets Python strings without line breaks, ready to predict: its best case. The transform gets Arrow batches
with the text as it is in the corpus, and its time includes preparing it. It runs with `exact` (the model as it is) and
without (folded). All run in turns; the ratios are of their best times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.corpus.storage import Store
from pipeline.run import Artifact
from pipeline.scores import quality

ROOT = Path(__file__).parents[1]
BATCH_ROWS = 1024


def train(directory: Path) -> Path:
    """A model of DCLM's dim and a tenth of its bucket (0.1 GB) from the example seeds."""
    parameters = quality.Quality(positives="-", bucket=200_000, exact=True).model_dump()
    sides = [[str(ROOT / f"examples/seeds/{side}.parquet")] for side in ("good", "bad")]
    quality._train(sides[0], sides[1], None, parameters, directory)
    return directory / "model.bin"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    import fasttext

    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", default=str(ROOT / "examples/sample"))
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pa.set_cpu_count(1)
    texts = ds.dataset(options.corpus).to_table(columns=["text"])["text"].combine_chunks()
    texts = texts.take(pa.array(np.arange(options.rows) % len(texts)))
    with tempfile.TemporaryDirectory() as place:
        path = Path(options.model) if options.model else train(Path(place))
        model = fasttext.load_model(str(path))
        transforms = {}
        for exact in (True, False):
            artifact = Store(place).child("exact" if exact else "folded")
            Path(artifact.path).mkdir()
            quality._adopt(str(path), quality.GOOD, quality.FastText(exact=exact), Path(artifact.path))
            transforms[exact] = quality.open_classifier(Artifact("quality", "", artifact))
        batches = pa.table({"text": texts}).to_batches(max_chunksize=BATCH_ROWS)
        lines = [[t.replace("\n", " ") + "\n" for t in b["text"].to_pylist()] for b in batches]

        def bare() -> list[tuple[list[list[str]], list[np.ndarray]]]:
            return [model.f.multilinePredict(batch, 1, 0.0, "strict") for batch in lines]

        def ours(exact: bool) -> np.ndarray:
            return np.concatenate([transforms[exact](batch)["score"].to_numpy() for batch in batches])

        found = bare()
        p = np.array([x[0] for _, given in found for x in given], np.float32)
        labels = np.array([x[0] for batch, _ in found for x in batch])
        expected = np.clip(np.where(labels == quality.GOOD, p, 1 - p), 0, 1)
        assert ours(True).tobytes() == expected.tobytes(), "exact scores differ from fastText's"
        folded = ours(False)
        works = (bare, lambda: ours(True), lambda: ours(False))
        times = np.array([[seconds(work) for work in works] for _ in range(options.rounds)])
    raw, exact, fold = len(texts) / times.min(axis=0)
    result = {"rows": len(texts), "mb": round(texts.nbytes / 1e6, 1), "fasttext_rows_s": round(raw)}
    result |= {"exact_ratio": round(exact / raw, 3), "folded_ratio": round(fold / raw, 3)}
    result |= {"kept_at_0.5": int((expected >= 0.5).sum()), "kept_folded": int((folded >= 0.5).sum())}
    result |= {"largest_difference": float(np.abs(folded - expected).max())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
