"""`report/index.html`: one self-contained page on what a run kept, what it dropped and why.

It runs no script and loads nothing: a content security policy in the page forbids both. Every string of the corpus is
neutralised (`format.visible`) and escaped (`html.el`). What it costs, and what bounds it, is told in `facts`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from pipeline import __version__
from pipeline.concepts.spread import measure
from pipeline.report.charts import concept_scatter, histogram
from pipeline.report.counts import level_values
from pipeline.report.facts import CONCEPTS_LISTED, Facts, Sampled, gather
from pipeline.report.format import count, duration, explain, number, plural, share, short, size, trouble, visible
from pipeline.report.html import Html, el
from pipeline.report.parts import document, note, section, table, tile
from pipeline.report.stored import quarantined
from pipeline.run import Run
from pipeline.select.stage import Selection

SOURCES_SHOWN, CONCEPTS_DRAWN = 25, 500
REASONS_SHOWN, FAILURES_SHOWN, QUARANTINE_SHOWN = 40, 100, 20
TEXT_CHARACTERS, EXAMPLE_CHARACTERS, PATH_CHARACTERS = 600, 120, 200


def write_report(run: Run, selection: Selection, curated_files: Sequence[dict[str, Any]]) -> str:
    """Write the page of a finished selection; returns where it is."""
    facts = gather(run, selection, curated_files)
    sections = [
        section("funnel", "From corpus to curated set", *funnel(facts)),
        section("reasons", "What became of every row", *reasons(facts)),
        section("scores", "Scores", *scores(facts)),
        facts.sources is not None and section("sources", "By source", *sources(facts)),
        facts.concepts is not None and section("concepts", "By concept", *concepts(facts, facts.concepts)),
        section("rows", "Rows", *rows(facts)),
        section("time", "Time", *timings(facts)),
        section("missing", "What is missing", *missing(facts)),
        section("configuration", "Configuration", *configuration(facts)),
    ]
    page = document(f"{_name(run)}: Tamis", [header(facts), *sections])
    run.store.write(page.encode(), "report", "index.html")
    return run.store.locate("report", "index.html")


# ---- sections


def header(facts: Facts) -> Html:
    run, chosen = facts.run, facts.selection
    usable, kept = facts.usable, facts.kept
    tiles = [
        tile("rows kept", short(kept[0]), f"{share(kept[0], run.rows)} of {count(run.rows)}", main=True),
        tile(f"tokens ({run.tokens_named})", short(kept[1]), f"{share(kept[1], usable[1])} of {short(usable[1])}"),
        tile(f"bytes of {run.content}", size(kept[2]), f"{share(kept[2], usable[2])} of {size(usable[2])}"),
        tile("budget used", share(chosen.kept, chosen.budget), f"of {count(chosen.budget)} {chosen.unit}"),
    ]
    where = _path(str(run.manifest.get("curated", {}).get("path", run.store.locate("curated"))))
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    about = f"Tamis {__version__}, {when}. {plural(len(facts.files), 'Parquet file')} in {where}."
    anchors = ["funnel", "reasons", "scores", "sources", "concepts", "rows", "time", "missing", "configuration"]
    absent = {"sources": facts.sources is None, "concepts": facts.concepts is None}
    return el(
        "header",
        el("h1", _name(run)),
        el("p", about, class_="soft"),
        el("div", tiles, class_="tiles"),
        [note(f"{told[:1].upper()}{told[1:]}.") for told in [*chosen.notes, *_spread(run), *_caveats(run)]],
        el("nav", [el("a", a.capitalize(), href=f"#{a}") for a in anchors if not absent.get(a)]),
    )


def _spread(run: Run) -> list[str]:
    """How diverse the kept rows are, where that is measured; before the page is written, so this reads it."""
    if not run.config.output.spread:
        return []
    whole = measure(run).whole
    ranks = [whole[f"erank{which}"] for which in ("_kept", "", "_drawn")]
    return ["the kept vectors have an effective rank of {:.1f}, all have {:.1f}, as many drawn {:.1f}".format(*ranks)]


def _caveats(run: Run) -> list[str]:
    return [caveat.rstrip(".") for score in run.config.scores for caveat in score.caveats(run)]


def funnel(facts: Facts) -> list[Html]:
    run = facts.run
    stages: list[tuple[str, int, np.ndarray | None]] = [("in the corpus", run.rows, None)]
    if facts.lost:
        stages.append(("in shards that could be read", run.rows - facts.lost, None))
    stages.append(("usable", int(facts.usable[0]), facts.usable))
    if run.config.select.floors:
        stages.append(("above the floors", int(facts.above_floors[0]), facts.above_floors))
    stages.append(("kept", int(facts.kept[0]), facts.kept))
    lines = [
        [
            name,
            _bar(there, run.rows, name == "kept"),
            count(there),
            share(there, run.rows),
            "" if amount is None else short(amount[1]),
            "" if amount is None else size(amount[2]),
        ]
        for name, there, amount in stages
    ]
    return [table(["", "", "rows", "share", f"tokens ({run.tokens_named})", run.content], lines, "lbnnnn")]


def reasons(facts: Facts) -> list[Html]:
    total = facts.run.rows
    listed = [(reason, int(a[0]), explain(reason), short(a[1])) for reason, a in facts.reasons]
    if bad := total - int(facts.usable[0]) - facts.lost:
        listed.append(("quarantined", bad, explain("quarantined"), ""))
    if facts.lost:
        listed.append(("failed", facts.lost, "in shards that could not be read", ""))
    lines = [
        [
            visible(reason, 80),
            visible(why, 160),
            _bar(there, total, reason == "kept"),
            count(there),
            share(there, total),
            t,
        ]
        for reason, there, why, t in listed[:REASONS_SHOWN]
    ]
    shown = table(["reason", "", "", "rows", "share", "tokens"], lines, "ltbnnn")
    rest = len(listed) - REASONS_SHOWN
    return [shown, *([note(f"{count(rest)} more in artifacts/selection/selection.json.")] if rest > 0 else [])]


def scores(facts: Facts) -> list[Html]:
    config, chosen = facts.run.config, facts.selection
    kinds = {s.column_name: s.kind for s in config.scores}
    grouped = config.select.quotas_for(config.scores).grouped
    cards = []
    for name, shown, levels in zip(facts.scores, facts.bins, facts.levels, strict=True):
        told = [f"median {number(_median(levels.sum(axis=0)))} of all, {number(_median(levels[1]))} of the kept"]
        if kinds.get(name, "several scores in one") != name:
            told.insert(0, kinds.get(name, "several scores in one"))
        lines = [("floor", config.select.floors[name])] if name in config.select.floors else []
        if chosen.ranked_by[:1] == (f"{name}.score",) and not grouped:
            lines.append(("lowest score kept", chosen.threshold))
        if shown and (shown.below or shown.above):
            told.append("the end bars hold the rows beyond them")
        chart = histogram(shown, lines) if shown else note("No row has a finite score.")
        cards.append(el("div", el("h3", name), el("p", "; ".join(told)), chart, class_="card"))
    legend = [_key("all"), "usable rows", _key("kept"), "kept", _key("mark"), "floor, lowest score kept"]
    return [
        note(*legend, ". The stronger the strip below, the more of a bin is kept."),
        el("div", cards, class_="charts"),
    ]


def sources(facts: Facts) -> list[Html]:
    full = max(a[2] / a[0] for _, a in facts.sources or [])
    lines = [
        [
            visible(name, 60),
            count(a[0]),
            count(a[2]),
            share(a[2], a[0]),
            _bar(a[2] / a[0], full, True, facts.overall),
            short(a[1]),
            short(a[3]),
        ]
        for name, a in facts.sources or []
    ]
    heads = ["source", "rows", "kept", "share kept", _scale(full), "tokens", "tokens kept"]
    columns = "lnnnbnn"
    shown = [_overall(facts), table(heads, lines[:SOURCES_SHOWN], columns)]
    if more := lines[SOURCES_SHOWN:]:
        summary = el("summary", plural(len(more), "smaller source"))
        shown.append(el("details", summary, table(heads, more, columns), class_="plain"))
    return shown


def concepts(facts: Facts, every: pa.Table) -> list[Html]:
    every = every.take(np.argsort(-every["n"].to_numpy(), kind="stable"))
    drawn = every.slice(0, CONCEPTS_DRAWN)
    concept, there, kept = (drawn[name].to_numpy() for name in ("concept", "n", "kept_rows"))
    full = float((kept / np.maximum(there, 1)).max())
    told = [n for n in ("d_intra", "d_inter", "complexity", "quota") if n in every.column_names]
    lines = [
        [
            el("a", c["concept"], href=f"#concept-{c['concept']}"),
            _example(facts.sampled.get(c["concept"], [])),
            count(c["n"]),
            count(c["kept_rows"]),
            share(c["kept_rows"], c["n"]),
            _bar(c["kept_rows"] / max(c["n"], 1), full, True, facts.overall),
            *(count(c[name]) if name == "quota" else f"{c[name]:.3f}" for name in told),
        ]
        for c in every.slice(0, CONCEPTS_LISTED).to_pylist()
    ]
    heads = ["concept", "a row of it", "rows", "kept", "share kept", _scale(full), *told]
    number_of = f"The {CONCEPTS_LISTED} largest of" if every.num_rows > CONCEPTS_LISTED else "All"
    about = f"{number_of} {plural(every.num_rows, 'concept')}; artifacts/selection/concepts.parquet holds the table."
    quota = f" A quota counts {facts.selection.unit}." if "quota" in told else ""
    return [
        _overall(facts, "A point is a concept. "),
        concept_scatter(concept, there, kept, facts.overall),
        table(heads, lines, "ltnnnb" + "n" * len(told)),
        note(about, quota),
    ]


def rows(facts: Facts) -> list[Html]:
    run, found_concepts = facts.run, facts.concepts
    about = "Random rows"
    shown = []
    if found_concepts is None:
        shown = [_pair(found) for found in facts.sampled.values()]
    else:
        about = "Random rows of the largest concepts, and of those of which the most and the least is kept"
        known = {
            c["concept"]: (c["n"], c["kept_rows"])
            for c in found_concepts.select(["concept", "n", "kept_rows"]).to_pylist()
        }
        for concept, found in sorted(facts.sampled.items(), key=lambda item: (-known[item[0]][0], item[0])):
            there, kept = known[concept]
            about_it = el("span", f"{count(there)} rows, {share(kept, there)} kept")
            summary = el("summary", f"Concept {concept}", about_it, el("span", _example(found)))
            shown.append(el("details", summary, _pair(found), open=not shown, id=f"concept-{concept}"))
    if facts.sampled_shards < len(run.live):
        about += f", out of {facts.sampled_shards} of {count(len(run.live))} shards"
    command = el(
        "code",
        f"tamis show {_path(run.store.uri)} --dropped --by {facts.selection.ranked_by[0].removesuffix('.score')}",
    )
    return [note(about, ". See more with ", command), *shown]


def timings(facts: Facts) -> list[Html]:
    passes = facts.run.manifest["passes"]
    total = sum(p["seconds"] for p in passes)
    lines = [
        [
            visible(p["pass"], 60),
            duration(p["seconds"]),
            _bar(p["seconds"], total, False),
            count(p["units"]),
            count(p["rows"]) if p["rows"] else "",
            short(p["rows"] / max(p["seconds"], 1e-3)) if p["rows"] else "",
            size(p["bytes"]) if p["bytes"] else "",
            el("span", trouble(p), class_="bad"),
        ]
        for p in passes
    ]
    told = f"{duration(total)} in {plural(len(passes), 'pass', 'passes')}. What an earlier call had done is not in it."
    return [note(told), table(["pass", "time", "", "units", "rows", "rows/s", "read", ""], lines, "lnbnnnnl")]


def missing(facts: Facts) -> list[Html]:
    run, failures = facts.run, facts.run.failures
    shown = []
    if failures:
        lines = [
            [
                _path(f["file"]),
                visible(f.get("row_groups", "all"), 40),
                el("span", visible(f["reason"], 300), class_="bad"),
            ]
            for f in failures[:FAILURES_SHOWN]
        ]
        first = f"; the first {FAILURES_SHOWN}, manifest.json has all" if len(failures) > FAILURES_SHOWN else ""
        shown.append(
            el("p", f"{plural(len(failures), 'file or part of a file', 'files or parts of files')} left out{first}:")
        )
        shown.append(table(["file", "row groups", "reason"], lines, "plp"))
    stored = run.manifest.get("columns", {})
    bad = {name: stored[name]["quarantined"] for name in run.plans if stored.get(name, {}).get("quarantined")}
    if bad:
        told = ", ".join(f"{count(n)} for the column {name}" for name, n in bad.items())
        shown.append(
            el("p", f"Rows in quarantine: {told}. Never kept; {_path(run.store.locate('quarantine'))} lists them.")
        )
        lines = [
            [visible(q["reason"], 120), q["column"], _path(q["file"]), count(q["row_group"]), count(q["row"])]
            for q in quarantined(run.store, list(bad)).slice(0, QUARANTINE_SHOWN).to_pylist()
        ]
        shown.append(table(["reason", "column", "file", "row group", "row"], lines, "plpnn"))
    return shown or [el("p", "Nothing: every file was read and every row was usable.")]


def configuration(facts: Facts) -> list[Html]:
    """As it was written, so that it can be used again; what it leaves to defaults is in the manifest."""
    described = facts.run.config.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True, width=100)
    lines = [" " * (len(line) - len(line.lstrip())) + visible(line, 400) for line in text.splitlines()]
    mark = facts.run.plans["select"].fingerprint
    return [el("pre", "\n".join(lines)), note(f"Selection {mark}. manifest.json holds all defaults too.")]


# ---- pieces


def _key(kind: str) -> Html:
    return el("i", class_=f"key {kind}")


def _overall(facts: Facts, before: str = "") -> Html:
    return note(before, _key("mark"), f"{share(facts.overall, 1)}, the share kept of all usable rows")


def _bar(part: float, full: float, kept: bool, mark: float | None = None) -> Html:
    """A bar as long as its cell where `part` is `full`, with a mark at another value."""
    filled = el("i", class_="kept" if kept else None, style=_percent("width", part, full))
    return el("div", filled, mark is not None and el("u", style=_percent("left", mark or 0, full)))


def _percent(name: str, part: float, full: float) -> str:
    return f"{name}:{100 * min(1.0, part / max(full, 1e-9)):.2f}%"


def _scale(full: float) -> str:
    return f"0 to {share(full, 1)}"


def _pair(found: Sequence[Sampled]) -> Html:
    halves = [("Kept", [r for r in found if r.kept]), ("Dropped", [r for r in found if not r.kept])]
    return el("div", [_half(title, part) for title, part in halves], class_="pair")


def _half(title: str, found: Sequence[Sampled]) -> Html:
    shown = [el("div", el("p", visible(r.text, TEXT_CHARACTERS), dir="auto"), _about(r), class_="row") for r in found]
    return el("div", el("h3", title), shown or note("none drawn"), class_="is-kept" if title == "Kept" else None)


def _about(row: Sampled) -> Html:
    scores = [[el("b", name), f" {number(value)} · "] for name, value in row.scores.items()]
    source = row.source and [el("bdi", visible(row.source, 60)), " · "]
    return el("footer", scores, source, visible(row.reason, 80), title=_path(row.where))


def _example(found: Sequence[Sampled]) -> str:
    return visible(max(found, key=lambda r: r.kept).text, EXAMPLE_CHARACTERS) if found else ""


def _median(there: np.ndarray) -> float:
    """Median of rows by level, to within a level."""
    running = np.cumsum(there)
    return float(level_values()[np.searchsorted(running, (running[-1] + 1) // 2)])


def _name(run: Run) -> str:
    return visible(run.store.uri.rstrip("/").rsplit("/", 1)[-1], 80)


def _path(path: str) -> str:
    return visible(path, PATH_CHARACTERS)
