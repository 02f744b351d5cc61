"""The page as a parser reads it: what it says, and that nothing of the corpus acts on it."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import curate
from pipeline.config import parse
from pipeline.curation import sieve
from pipeline.engine.pool import InlinePool
from pipeline.report.format import HARMLESS, UNSAFE, count, share
from pipeline.report.page import write_report
from pipeline.run import Run

VOID = {"meta"}


class Page(HTMLParser):
    """Tags, attributes, text, and the cells of every table row."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        self.open += [tag] if tag not in VOID else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
            if "tr" in self.open:
                self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(r for r in self.rows if r and r[0] == first)


@pytest.fixture(scope="module")
def page(hostile_run: Path) -> Page:
    return Page(hostile_run / "report" / "index.html")


def test_nothing_of_the_corpus_acts(page: Page) -> None:
    assert page.open == []
    assert not page.tags & {"script", "img", "iframe", "object", "link", "base", "form", "textarea", "button"}
    assert "b" in page.tags  # ours; the source `<b>bold</b>` is text:
    assert "<b>bold</b>" in page.text
    assert "dice" in page.text
    assert "<script>alert(1)</script> page" in page.text or "</textarea><img src=x onerror=alert(1)>" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src") and value)
    assert not [c for c in page.text if unicodedata.category(c) in UNSAFE and c not in HARMLESS and c != "\n"]


def test_the_page_needs_nothing_else(page: Page) -> None:
    policy = [v for n, v in page.attributes if n == "content" and v and "default-src" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]
    style = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)[0]
    assert "url(" not in style
    assert "@import" not in style


def test_it_says_what_the_columns_say(page: Page, hostile_run: Path) -> None:
    select = pa.concat_tables([pq.read_table(p) for p in sorted((hostile_run / "columns" / "select").iterdir())])
    row = pa.concat_tables([pq.read_table(p) for p in sorted((hostile_run / "columns" / "row").iterdir())])
    reasons = pc.value_counts(select["reason"].cast(pa.string()).drop_null()).to_pylist()
    for reason in reasons:
        shown = (
            page.row(reason["values"])
            if reason["values"] != "kept"
            else next(r for r in page.rows if r[0] == "kept" and "set" in r[1])
        )
        assert shown[3:5] == [count(reason["counts"]), share(reason["counts"], 200)]
    assert page.row("quarantined")[3] == "2"
    kept = select["keep"].fill_null(False)
    tokens = pc.sum(row["tokens"].filter(kept)).as_py()
    assert page.row("usable")[2] == "198"
    assert page.row("above the floors")[2] == count(
        198 - sum(r["counts"] for r in reasons if r["values"].startswith("floor"))
    )
    assert page.row("kept")[2:4] == ["60", "30.0 %"]
    assert page.row("kept")[4] == count(tokens)
    assert "Nothing: every file" not in page.text
    assert "b<script>.parquet" in page.text


def test_sources_add_up_with_those_that_are_null(page: Page) -> None:
    start = next(i for i, r in enumerate(page.rows) if r and r[0] == "source")
    rows = {r[0]: (int(r[1]), int(r[2])) for r in page.rows[start + 1 : start + 6]}
    assert set(rows) == {"<b>bold</b>", '"onload="x', "\ufffdturned", "plain", "(null)"}
    assert sum(n for n, _ in rows.values()) == 198
    assert sum(k for _, k in rows.values()) == 60
    assert rows["(null)"][0] == 40


def test_concepts_are_those_of_the_table(page: Page, hostile_run: Path) -> None:
    table = pq.read_table(hostile_run / "artifacts" / "selection" / "concepts.parquet").to_pylist()
    assert table
    for concept in table:
        shown = page.row(str(concept["concept"]))
        assert [shown[2], shown[3]] == [count(concept["n"]), count(concept["kept_rows"])]
        assert shown[6:9] == [f"{concept[name]:.3f}" for name in ("d_intra", "d_inter", "complexity")]
        assert ("id", f"concept-{concept['concept']}") in page.attributes


def test_rows_stand_under_what_became_of_them(page: Page) -> None:
    halves = re.findall(r'<div class="is-kept"><h3>Kept</h3>(.*?)<div><h3>Dropped</h3>(.*?)</details>', page.source)
    assert len(halves) == len(re.findall('id="concept-', page.source)) > 1
    for kept, dropped in halves:
        assert all(why == "kept" for why in re.findall(r"· ([\w:&;]+)</footer>", kept))
        assert not [why for why in re.findall(r"· ([\w:&;]+)</footer>", dropped) if why == "kept"]
    assert sum(kept.count("</footer>") for kept, _ in halves) > 1


def test_rows_of_a_shard_that_was_given_up(hostile_configuration: Callable[..., Any], tmp_path: Path) -> None:
    with Run(parse(hostile_configuration(tmp_path / "run")), InlinePool, quiet=True) as run:
        run.failed[0] = "its worker <died>"
        write_report(run, sieve(run), [])
    page = Page(tmp_path / "run" / "report" / "index.html")
    assert page.row("in shards that could be read")[2] == "136"
    assert page.row("failed")[3] == "64"
    assert not [r for r in page.rows if r[0] == "quarantined"]  # both bad rows are in the shard that is lost
    assert any("its worker <died>" in cell for row in page.rows for cell in row)


def test_a_second_report_passes_over_nothing(hostile_configuration: Callable[..., Any], hostile_run: Path) -> None:
    again = curate(hostile_configuration(hostile_run), quiet=True)
    passes = [p["pass"] for p in json.loads((hostile_run / "manifest.json").read_text())["passes"]]
    assert again.rows_kept == 60
    assert not [p for p in passes if p.startswith("report")]


def test_the_configuration_can_be_used_again(
    page: Page, hostile_configuration: Callable[..., Any], hostile_run: Path
) -> None:
    shown = re.findall(r"<pre>(.*?)</pre>", page.source, re.DOTALL)[0]
    assert parse(yaml.safe_load(html.unescape(shown))) == parse(hostile_configuration(hostile_run))


def test_without_concepts_sources_and_floors(hostile_configuration: Callable[..., Any], tmp_path: Path) -> None:
    changes = {"cluster": None, "embed": None, "scores": ["length"], "select": {"budget": {"fraction": 0.5}}}
    config = hostile_configuration(tmp_path / "run", **changes)
    config["corpus"] |= {"source": None}
    curate(config, quiet=True)
    page = Page(tmp_path / "run" / "report" / "index.html")
    assert not [h for h in ("By source", "By concept", "above the floors") if h in page.text]
    assert ("class", "row") in page.attributes  # rows are shown all the same
    assert page.row("kept")[2] == "99"


def test_the_cut_of_the_corpus_changes_no_figure(hostile_configuration: Callable[..., Any], tmp_path: Path) -> None:
    """One shard instead of four: the same counts, the same bars and the same rows shown."""
    pages = []
    for name, shard_mb in (("fine", 1e-6), ("coarse", 64)):
        config = hostile_configuration(tmp_path / name, cluster=None, embed=None)
        config["corpus"] |= {"shard_mb": shard_mb}
        curate(config, quiet=True)
        source = Page(tmp_path / name / "report" / "index.html").source
        pages.append(source[source.index('id="funnel"') : source.index('id="time"')].replace(name, ""))
    assert pages[0] == pages[1]
