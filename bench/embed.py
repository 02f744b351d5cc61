"""Embeddings beside the obvious way to make them, on the same texts, on the same threads.

usage: python bench/embed.py [--corpus DIR] [--rows 4000] [--threads 1] [--model FOLDER] [--model-rows 96] [--rounds 3]

`lsa`: the transform, beside scikit-learn's HashingVectorizer with the same words, damping and projection.
`sentence_transformer` (with --model): the encoder, beside a loop that takes 32 texts at a time as they come and pads
them to the longest; both read the first 256 tokens of a text. Best of the rounds, in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.artifact import Artifact
from pipeline.corpus.storage import Store
from pipeline.embed import lsa
from pipeline.engine import threads

ROOT = Path(__file__).parents[1]
SPACELESS = r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = rf"[{SPACELESS}]|[^\W{SPACELESS}]+"
"""`pipeline.words.WORD` in Python's syntax, but for marks."""


def best(rounds: int, works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    seconds = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def bench_lsa(texts: pa.Array, rounds: int) -> dict[str, float]:
    from sklearn.feature_extraction.text import HashingVectorizer

    recipe = lsa.Lsa()
    with tempfile.TemporaryDirectory() as name:
        counts = lsa.word_counts(texts.slice(0, 2000), recipe.features, recipe.max_chars)
        weights = lsa.projection(counts, recipe.dims, 0)
        np.save(Path(name) / lsa.PROJECTION, weights)
        transform = lsa._open(Artifact("lsa", "", Store(name)), recipe.max_chars)
        batches = pa.table({"text": texts}).to_batches(1024)
        strings = [t[: recipe.max_chars] for t in texts.to_pylist()]
        hashing = HashingVectorizer(
            n_features=recipe.features, token_pattern=WORD, norm=None, alternate_sign=False, dtype=np.float32
        )

        def peer() -> None:
            for i in range(0, len(strings), 1024):
                found = hashing.transform(strings[i : i + 1024])
                found.data = 1 + np.log(found.data)
                x = found @ weights
                (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float16)

        seconds = best(rounds, {"ours": lambda: [transform(b) for b in batches], "sklearn": peer})
    size = pc.sum(pc.binary_length(texts)).as_py() / 1e6
    return {
        "megabytes_a_second": round(size / seconds["ours"], 1),
        "sklearn_megabytes_a_second": round(size / seconds["sklearn"], 1),
        "ratio": round(seconds["sklearn"] / seconds["ours"], 2),
    }


def bench_encoder(texts: list[str], folder: Path, rounds: int, count: int) -> dict[str, float]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from pipeline.embed.sentence_transformer import Encoder

    torch.set_num_threads(count)
    encoder = Encoder(folder, "mean", "float32", 256)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def peer() -> None:
        for i in range(0, len(texts), 32):
            tokens = tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                hidden, mask = model(**tokens).last_hidden_state, tokens.attention_mask[..., None]
                torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()

    seconds = best(rounds, {"ours": lambda: encoder(texts, 1, 16384), "loop": peer})
    rates = {name: round(len(texts) / s, 2) for name, s in seconds.items()}
    return {
        "texts_a_second": rates["ours"],
        "loop_texts_a_second": rates["loop"],
        "ratio": round(seconds["loop"] / seconds["ours"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", default=str(ROOT / "examples/sample"))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--model-rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = ds.dataset(options.corpus).to_table(columns=["text"])["text"].combine_chunks()
    texts = texts.filter(pc.is_valid(texts)).slice(0, options.rows)
    with threads.limited(options.threads):
        result: dict[str, Any] = {
            "rows": len(texts),
            "threads": options.threads,
            "lsa": bench_lsa(texts, options.rounds),
        }
        if options.model:
            few = texts.slice(0, options.model_rows).to_pylist()
            found = bench_encoder(few, options.model, options.rounds, options.threads)
            result["sentence_transformer"] = {"rows": len(few), **found}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
