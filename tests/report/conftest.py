"""A run over text that is out to harm whoever looks at it, with a bad file, quarantined rows and concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import curate

HOSTILE = (
    "<script>alert(1)</script> page text",
    "</style></pre></textarea><img src=x onerror=alert(1)>",
    "bidi \u202e turned \u2066 around \u2069 text",
    "nul \0 and \x1b[31mred\x1b[0m \x07 bell \x9b31m \x1b]8;;http://evil\x1b\\ link",
    "tags \U000e0041\U000e0042 and \ufeff marks",
    "[bold red]markup[/] :smile: [link=http://evil]here[/link]",
    "&lt;b&gt; &amp; 'single' \"double\" `tick` ${x} {{7*7}}",
    "line\u2028separator\u2029and\r\nlines",
)
SOURCES = ("<b>bold</b>", '"onload="x', "\u202eturned", "plain", None)


def hostile_table(rows: int) -> pa.Table:
    rng = np.random.default_rng(0)
    texts: list[str | None] = [
        f"{HOSTILE[i % len(HOSTILE)]} {' '.join(['word'] * int(rng.integers(1, 40)))} {i}" for i in range(rows)
    ]
    texts[5], texts[17] = None, " \n "
    return pa.table({"text": texts, "source": [SOURCES[i % len(SOURCES)] for i in range(rows)]})


def configuration(corpus: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "source": "source", "shard_mb": 1e-6},
        "embed": {"kind": "lsa", "dims": 8},
        "cluster": {"k": 4},
        "scores": [{"kind": "length"}, {"kind": "random", "name": "dice"}],
        "select": {"budget": {"rows": 60}, "weights": {"length": 1}, "floors": {"dice": 0.2}},
        "engine": {"address": "inline"},
        "run": str(run),
    } | changes


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    corpus = place / "corpus"
    corpus.mkdir()
    pq.write_table(hostile_table(200), corpus / "a.parquet", row_group_size=64)
    (corpus / "b<script>.parquet").write_bytes(b"PAR1 cut off")
    curate(configuration(corpus, place / "run"), quiet=True)
    return place / "run"


@pytest.fixture
def hostile_configuration(hostile_run: Path) -> Any:
    """`hostile_configuration(run, select=...)`: the configuration of `hostile_run` with changes."""
    return lambda run, **changes: configuration(hostile_run.parent / "corpus", run, **changes)
