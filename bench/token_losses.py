"""The column of token log-probabilities beside the bare forward of its model, on the same length-sorted batches.

usage: python bench/token_losses.py [--corpus DIR] [--rows 600] [--model FOLDER] [--max-tokens 1024] [--threads 1]
       [--shape hidden=128,layers=4,heads=4,kv_heads=2,mlp=384,vocab=4096] [--rounds 3]

`column` is all that a worker does: texts to tokens, batches, logits, log-probabilities, Arrow. `forward` only calls the
model on the padded batches, made beforehand. Both count the tokens of the texts, without padding. Without --model, a
model of --shape with weights as they are drawn, and a tokenizer trained on the texts. Medians over rounds in which they
take turns; `cpu_ratio` compares processor seconds, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from materialize import rates, ratio

from pipeline.engine import threads
from pipeline.models.causal import Scorer, groups, token_batch
from pipeline.models.training import Shape, new_lm, save_lm, train_tokenizer

ROOT = Path(__file__).parents[1]


def measure(folder: Path, texts: pa.Array, max_tokens: int, batch_rows: int, rounds: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads.cpus())
    scorer = Scorer(folder, max_tokens)
    rows = [texts.slice(i, batch_rows) for i in range(0, len(texts), batch_rows)]
    blocks, tokens = [], 0
    for batch in rows:
        ids, offsets = scorer.tokenize(batch)
        tokens += len(ids)
        for members, width in groups(np.diff(offsets), scorer.group_tokens):
            block = np.zeros((len(members), width), np.int64)
            for i, row in enumerate(members):
                block[i, : offsets[row + 1] - offsets[row]] = ids[offsets[row] : offsets[row + 1]]
            blocks.append(torch.from_numpy(block))

    def column() -> int:
        for batch in rows:
            ids, offsets = scorer.tokenize(batch)
            token_batch(ids, offsets, scorer(ids, offsets))
        return tokens

    def forward() -> int:
        with torch.inference_mode():
            for block in blocks:
                scorer.model(input_ids=block, use_cache=False)
        return tokens

    found = rates(time.perf_counter, rounds, forward, column)
    bare, ours = np.median(found, axis=0)
    return {
        "parameters": scorer.model.num_parameters(),
        "vocabulary": scorer.model.config.vocab_size,
        "tokens": tokens,
        "batches": len(blocks),
        "widths": len({block.shape[1] for block in blocks}),
        "padding": round(1 - tokens / sum(block.numel() for block in blocks), 4),
        "tokens_a_second": round(ours),
        "forward_tokens_a_second": round(bare),
        "ratio": ratio(found),
        "cpu_ratio": ratio(rates(time.process_time, rounds, forward, column)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", default=str(ROOT / "examples/sample"))
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = ds.dataset(options.corpus).to_table(columns=["text"])["text"].combine_chunks()
    texts = texts.filter(pc.fill_null(pc.greater(pc.utf8_length(texts), 16), False)).slice(0, options.rows)
    changes = dict(part.split("=") for part in options.shape.split(",") if part)
    shape = Shape(**{"context": options.max_tokens} | {name: int(value) for name, value in changes.items()})
    with threads.limited(options.threads), tempfile.TemporaryDirectory() as directory:
        folder = options.model or Path(directory)
        if options.model is None:
            save_lm(new_lm(shape, 0), train_tokenizer(texts.to_pylist(), min(shape.vocab, 8192)), folder)
        found = measure(folder, texts, options.max_tokens, options.batch_rows, options.rounds)
    print(json.dumps({"rows": len(texts), "threads": options.threads, **found}, indent=2))


if __name__ == "__main__":
    main()
