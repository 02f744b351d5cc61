"""Targets that stand in the corpus are counted, named by row id and warned of, whatever the shards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.run import Run
from pipeline.scores._contamination import LISTED, warn_contained

OpenRun = Callable[..., Run]


def rows_of(file: int, rows: int) -> dict[str, Any]:
    texts = [f"Row {i} of file {file}, on its own." for i in range(rows)]
    texts[3] = "What is  the capital\nof France? PARIS!"
    return {"id": [f"{file}-{i}" for i in range(rows)], "text": texts}


@pytest.mark.parametrize("shard_mb", [1e-6, 8])
def test_rows_that_are_targets_are_named_and_warned_of(
    write_corpus: Callable[..., Path], open_run: OpenRun, caplog: pytest.LogCaptureFixture, shard_mb: float
) -> None:
    corpus = write_corpus(files=2, rows=8, rows_of=rows_of)
    targets = ["what is the capital of France - Paris", "row 5 of file 1 on its own", "of file 1", "!?", ""]
    with open_run(corpus, corpus_options={"id": "id", "shard_mb": shard_mb}) as run:
        with caplog.at_level(logging.WARNING):
            found = warn_contained(run, targets, "betr.targets")
    assert (found.rows, found.ids) == (3, ["0-3", "1-3", "1-5"])
    assert "betr.targets: 3 rows of the corpus are target texts" in caplog.text
    assert "0-3, 1-3, 1-5" in caplog.text


def test_nothing_found_says_nothing(
    write_corpus: Callable[..., Path], open_run: OpenRun, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run(write_corpus(rows_of=rows_of)) as run:
        found = warn_contained(run, pa.array(["the capital of France"]), "dsir.targets")
    assert (found.rows, found.ids, caplog.text) == (0, [], "")


def test_ids_are_bounded_and_without_an_id_column_they_are_those_of_the_text(
    write_corpus: Callable[..., Path], open_run: OpenRun
) -> None:
    corpus = write_corpus(files=3, rows=70, rows_of=lambda file, rows: {"text": ["The same."] * rows})
    with open_run(corpus) as run:
        found = warn_contained(run, ["the same"], "x")
    assert found.rows == 210
    assert len(found.ids) == LISTED
    assert set(map(len, found.ids)) == {32}
