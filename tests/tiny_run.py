"""A small curated run of a made-up language, for tests of what reads curated runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curation import curate
from tests.tiny_lm import BIRDS, sentences


def make_run(directory: Path) -> str:
    """Curate the longer half of 400 texts, half of them of trees and half of birds (the column `source`)."""
    trees, birds = sentences(200), sentences(200, seed=1, words=BIRDS)
    table = pa.table({"text": [*trees, *birds], "source": ["trees"] * 200 + ["birds"] * 200})
    pq.write_table(table, directory / "corpus.parquet")
    return _curated(directory, {"source": "source"})


def make_chat_run(directory: Path, template: str | None = None) -> str:
    """Curate the longer half of 400 conversations, in which trees answer to birds (`source`: which of two halves)."""
    trees, birds = sentences(400), sentences(400, seed=1, words=BIRDS)
    table = pa.table({"asked": birds, "said": trees, "source": ["first"] * 200 + ["second"] * 200})
    pq.write_table(table, directory / "corpus.parquet")
    return _curated(directory, {"source": "source", "prompt": "asked", "response": "said", "template": template})


def _curated(directory: Path, corpus: dict[str, Any]) -> str:
    config = {
        "corpus": {"path": str(directory / "corpus.parquet"), **corpus},
        "scores": [{"kind": "length"}],
        "select": {"budget": {"rows": 200}},
        "handoff": {"calibration_rows": 20, "recovery_tokens": 100_000},
        "engine": {"address": "inline"},
        "run": str(directory / "run"),
    }
    return curate(config, quiet=True).run
