"""A sieve over small corpora, in this process: from a configuration to a run that stands before its output stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse
from pipeline.curation import sieve
from pipeline.engine.pool import InlinePool
from pipeline.run import Run
from pipeline.select.stage import Selection

Sieve = Callable[..., tuple[Run, Selection]]
Documents = Callable[[int, int], pa.Table]


def documents(first: int, count: int) -> pa.Table:
    """`count` rows with the columns id and text; a text is 20 to 200 words that no other row has in this order."""
    rng = np.random.default_rng(first)
    words = np.array(["sieve", "corpus", "model", "budget", "token", "concept", "shard", "vector", "quality", "row"])
    texts = [f"{' '.join(rng.choice(words, rng.integers(20, 200)))} {i}" for i in range(first, first + count)]
    return pa.table({"id": [f"row-{i:06d}" for i in range(first, first + count)], "text": texts})


@pytest.fixture(scope="session", name="documents")
def documents_fixture() -> Documents:
    return documents


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 rows in two files of row groups of 250."""
    directory = tmp_path_factory.mktemp("corpus")
    for i in range(2):
        pq.write_table(documents(2000 * i, 2000), directory / f"part-{i}.parquet", row_group_size=250)
    return directory


@pytest.fixture
def sieved(tmp_path: Path) -> Iterator[Sieve]:
    """Opens a run over a corpus and sieves it: by default half of the rows, at random, in shards of 20 kB."""
    with ExitStack() as stack:

        def make(source: Path, run: str = "run", /, **changes: Any) -> tuple[Run, Selection]:
            config: dict[str, Any] = {
                "corpus": {"path": str(source), "id": "id", "shard_mb": 0.02},
                "scores": ["random"],
                "select": {"budget": {"fraction": 0.5}},
                "run": str(tmp_path / run),
            }
            active = stack.enter_context(Run(parse(config | changes), InlinePool, quiet=True))
            return active, sieve(active)

        yield make
