"""A corpus of trees and birds, a tiny model that has read both, and a target set of birds: for tests of influence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_lm import BIRDS, sentences, trained

from pipeline.curation import curate
from pipeline.engine.pool import InlinePool

ROWS = 160
MASKED = (40, 90)
"""Rows of one token, which have no gradient."""


@dataclass(frozen=True)
class Domains:
    """Folder of the model, the corpus and its rows, which of them are birds, the target file."""

    folder: Path
    model: Path
    corpus: Path
    texts: list[str]
    birds: np.ndarray
    target: Path

    def run(self, name: str, score: dict[str, Any], rows: int = ROWS // 10, shard_mb: float = 1e-6) -> pa.Table:
        """A whole job that keeps some rows; the score's column with `keep` beside it, in the corpus's order."""
        config = {
            "corpus": {"path": str(self.corpus), "shard_mb": shard_mb},
            "scores": [{"target": str(self.target), "max_tokens": 48} | score],
            "select": {"budget": {"rows": rows}},
            "engine": {"address": "inline", "max_bad_fraction": 1},
            "run": str(self.folder / name),
        }
        assert curate(config, pool=InlinePool, quiet=True).rows_kept == rows
        tables = {}
        for column in (score["kind"], "select"):
            parts = sorted((self.folder / name / "columns" / column).iterdir())
            tables[column] = pa.concat_tables([pq.read_table(part) for part in parts])
        return tables[score["kind"]].append_column("keep", tables["select"]["keep"])


def two_domains(folder: Path) -> Domains:
    half = [sentences(300, seed=2), sentences(300, seed=3, words=BIRDS)]
    model = trained(folder / "lm", [text for pair in zip(*half, strict=True) for text in pair], steps=80)
    birds = np.arange(ROWS) % 2 == 1
    trees_and_birds = (sentences(ROWS, seed=4), sentences(ROWS, seed=5, words=BIRDS))
    texts = [trees_and_birds[int(bird)][i] for i, bird in enumerate(birds)]
    for row in MASKED:
        texts[row] = "x"
    (folder / "corpus").mkdir()
    table = pa.table({"text": texts, "before": ["once upon a time "] * ROWS})
    pq.write_table(table, folder / "corpus/part.parquet", row_group_size=50)
    task = ["one", "two"] * 4
    target = pa.table({"text": sentences(8, seed=6, words=BIRDS), "before": ["so "] * 8, "task": task})
    pq.write_table(target, folder / "target.parquet")
    return Domains(folder, model, folder / "corpus", texts, birds, folder / "target.parquet")
