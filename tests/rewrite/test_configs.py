"""The published configurations of rewrites, from file to curated set, on real pages and real code."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.curation import curate

ROOT = Path(__file__).parents[2]


def curated(config: str, corpus: Path, directory: Path) -> list[dict[str, Any]]:
    """Rows that a file of configs/ leaves of a corpus."""
    asked = [f"corpus.path={corpus}", f"run={directory}", "engine.address=inline"]
    found: list[dict[str, Any]] = pq.read_table(
        curate(str(ROOT / "configs" / config), asked, quiet=True).path
    ).to_pylist()
    card = (directory / "README.md").read_text()
    assert f"`output.rewrite` then went over {len(found)}" in card
    return found


def test_html_blocks_leave_the_text_of_real_pages(shared_data: Path, tmp_path: Path) -> None:
    pages = pq.read_table(shared_data / "html_extraction/pages.parquet", columns=["html", "text"])
    pages = pages.filter(pc.is_valid(pages["text"])).slice(0, 40)
    sources = [page.decode("utf-8", "replace") for page in pages["html"].to_pylist()]
    truth = dict(zip(sources, pages["text"].to_pylist(), strict=True))
    pq.write_table(pa.table({"html": sources, "page": sources}), tmp_path / "pages.parquet", row_group_size=15)
    rows = curated("html_blocks.yaml", tmp_path / "pages.parquet", tmp_path / "run")
    assert 10 < len(rows) < 40
    scores = []
    for row in rows:
        assert not re.search(r"<(script|style|div|p|a)\b", row["html"])
        spans, removed = row["tamis"]["kept"], row["tamis"]["removed"]
        assert sum(s["end"] - s["start"] for s in [*spans, *removed]) == len(row["page"])
        found, wanted = (Counter(text.split()) for text in (row["html"], truth[row["page"]]))
        scores.append(2 * (found & wanted).total() / max(1, found.total() + wanted.total()))
    assert sum(scores) / len(scores) > 0.8


def test_longcodezip_like_halves_real_code_that_still_parses(tmp_path: Path) -> None:
    files = [path.read_text() for path in sorted((ROOT / "pipeline").rglob("*.py")) if path.stat().st_size > 2000]
    pq.write_table(pa.table({"content": files, "file": files}), tmp_path / "code.parquet", row_group_size=30)
    rows = curated("longcodezip_like.yaml", tmp_path / "code.parquet", tmp_path / "run")
    assert len(rows) > len(files) / 3
    shorter = 0
    for row in rows:
        tree, whole = ast.parse(row["content"]), ast.parse(row["file"])
        assert ast.get_docstring(tree) == ast.get_docstring(whole)  # the skeleton stays
        assert "".join(row["file"][s["start"] : s["end"]] for s in row["tamis"]["kept"]) == row["content"]
        shorter += len(row["content"]) <= 0.51 * len(row["file"])
    assert shorter > len(rows) / 2  # the others have a longer skeleton
