"""How full sequences are, and what is cut, packed by best fit, end to end and one document a sequence; and how fast.

usage: python bench/packing.py [--corpus ../shared/data/text_corpus/parts] [--length 512 1024 2048 4096] [--vocab 8192]

Every document of the corpus counts, with its end token, by a byte-level BPE trained on 2,000 of them. `padded` is the
naive baseline: one document a sequence, cut at its length. `used` is the share of the sequences that holds tokens,
`cropped` the share of the tokens that is in none, `truncated` the share of the documents that would fit one sequence
and are in several pieces. `place` is to say which document goes where, `lay out` to fill the arrays, in thousands of
documents a second of CPU time, one thread, the best of three rounds; tokenising is given for comparison.

Beside it, `best_fit_decreasing` alone on a million documents of 1 to 1,024 tokens, and the walk of `in_context` on
random vectors of 32 dimensions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from pipeline.models.training import train_tokenizer
from pipeline.output.order._walk import neighbours, walk
from pipeline.output.pack._bins import best_fit_decreasing
from pipeline.output.pack.base import Documents, Pack, Pieces, lay_out
from pipeline.output.pack.best_fit import BestFit
from pipeline.output.pack.concat import Concat

ROUNDS = 3


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Least CPU seconds of some rounds, and the result."""
    best, result = float("inf"), None
    for _ in range(ROUNDS):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result


def padded(lengths: np.ndarray, length: int) -> Pieces:
    """One document a sequence."""
    here = np.arange(len(lengths))
    return Pieces(here, np.zeros_like(lengths), np.minimum(lengths, length), here)


def read(corpus: str, vocab: int) -> tuple[Documents, float]:
    """The tokens of a corpus, and how many are made in a second of CPU time."""
    texts = [t for t in ds.dataset(corpus).to_table(columns=["text"])["text"].to_pylist() if t and t.strip()]
    tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 2000)], vocab)
    start = time.process_time()
    ids = [np.array([*e.ids, 0], np.int32) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    seconds = time.process_time() - start
    lengths, flat = np.array([len(i) for i in ids]), np.concatenate(ids)
    return Documents(flat, np.ones(len(flat), bool), lengths, np.arange(len(ids))), len(flat) / seconds


def report(documents: Documents, kind: str, place: Callable[[], Pieces], length: int) -> None:
    lengths = documents.lengths
    placing, pieces = timed(place)
    laying, _ = timed(lambda: sum(b.num_rows for b in lay_out(documents, pieces, length, 0, None)))
    sequences = int(pieces.sequence.max()) + 1
    used = pieces.length.sum() / (sequences * length)
    cropped = 1 - pieces.length.sum() / lengths.sum()
    short = lengths <= length
    truncated = (short & (np.bincount(pieces.document) > 1)).sum() / short.sum()
    speed = f"{len(lengths) / placing / 1e3:,.0f} k/s | {len(lengths) / laying / 1e3:,.1f} k/s"
    print(f"| {length} | {kind} | {sequences:,} | {used:.2%} | {cropped:.2%} | {truncated:.1%} | {speed} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="../shared/data/text_corpus/parts")
    parser.add_argument("--length", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--vocab", type=int, default=8192)
    asked = parser.parse_args()

    documents, speed = read(asked.corpus, asked.vocab)
    lengths = documents.lengths
    print(f"{len(lengths):,} documents, {lengths.sum():,} tokens, {speed / 1e3:,.0f} k tokens/s tokenised")
    print("| length | packing | sequences | used | cropped | truncated | place | lay out |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for length in asked.length:
        kinds: dict[str, Pack] = {k: made(length=length, ids="-", end_id=0) for k, made in KINDS.items()}
        for kind, pack in kinds.items():
            report(documents, kind, lambda pack=pack: pack.place(lengths, True), length)  # type: ignore[misc]  # a default binds the loop's value
        report(documents, "padded", lambda length=length: padded(lengths, length), length)  # type: ignore[misc]  # a default binds the loop's value

    rng = np.random.default_rng(0)
    many = rng.integers(1, 1025, 1_000_000)
    seconds, _ = timed(lambda: best_fit_decreasing(many, 1024))
    print(f"best fit of 1 M documents of 1 to 1,024 tokens: {seconds:.2f} s")
    vectors = rng.standard_normal((20_000, 32)).astype(np.float32)
    graph = neighbours(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 50, seed=0)
    seconds, _ = timed(lambda: walk(graph))
    edges = len(graph.to) / graph.nodes
    print(f"walk over {graph.nodes:,} nodes of {edges:.0f} edges each: {graph.nodes / seconds:,.0f} a second")


KINDS: dict[str, type[Pack]] = {"best_fit": BestFit, "concat": Concat}

if __name__ == "__main__":
    main()
