"""What the pages are made of: the document with its policy, sections, tables, tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files

from pipeline.report.html import Child, Html, el

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: Iterable[Child]) -> str:
    """A page that loads nothing and runs no script."""
    style = files("pipeline.report").joinpath("page.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(style)),
    )
    return f"<!doctype html>\n{el('html', head, el('body', body), lang='en')}\n"


def section(anchor: str, title: str, *content: Child) -> Html:
    return el("section", el("h2", title, id=anchor), content)


def note(*content: Child) -> Html:
    return el("p", content, class_="note")


def tile(label: str, value: str, detail: str, main: bool = False) -> Html:
    return el("div", el("span", label), el("b", value), el("span", detail), class_="tile main" if main else "tile")


def table(heads: Sequence[Child], lines: Sequence[Sequence[Child]], columns: str) -> Html:
    """`columns` has a letter each: `n` number, `b` bar, `l` label, `p` text, `t` text cut to a line."""
    classes = [{"n": "n", "b": "bar", "l": "label", "t": "text", "p": None}[c] for c in columns]
    head = el("tr", [el("th", h, class_=c) for h, c in zip(heads, classes, strict=True)])
    body = [el("tr", [el("td", v, class_=c) for v, c in zip(line, classes, strict=True)]) for line in lines]
    return el("div", el("table", el("thead", head), el("tbody", body)), class_="scroll")
