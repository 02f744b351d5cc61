"""The page of a matched comparison: what every arm came to, learning curves, a Pareto plot, the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.compare.ledger import READINGS
from pipeline.corpus.storage import Store
from pipeline.report.charts import curves, scatter
from pipeline.report.format import count
from pipeline.report.html import Html, el
from pipeline.report.parts import document, note, section, table, tile

if TYPE_CHECKING:
    from pipeline.compare.results import Results

DIRECTIONS = {True: "more is better", False: "less is better"}


def write_page(results: Results) -> None:
    """index.html beside the other results."""
    body = [
        _header(results),
        section("arms", "Arms", *_arms(results)),
        *(section(f"axis-{axis}", axis.capitalize(), *_axis(results, axis)) for axis in _axes(results)),
        section("effects", "What made the difference", *_effects(results)),
        section("curves", "Learning curves", *_curves(results)),
        section("cost", "Cost of use", *_cost(results)),
        section("pareto", "Loss against FLOPs of use", _pareto(results)),
        section("ledger", "Ledger", *_ledger(results)),
    ]
    page = document("Compressed and healed: Tamis", body)
    Store(results.directory).write(page.encode(), "index.html")


def _axes(results: Results) -> list[str]:
    return list(dict.fromkeys(axis for _, axis, _ in results.measures()))


def _header(results: Results) -> Html:
    shown = sum(e.shown for e in results.effects if e.axis == "language")
    tiles = [
        tile("FLOPs an arm", f"{results.budget:.3g}", "scoring and importance included", main=True),
        tile("arms", str(len(results.plan.lines)), f"{results.config['seeds']} seeds each"),
        tile("effects on language shown", str(shown), f"of {sum(e.axis == 'language' for e in results.effects)}"),
    ]
    return el(
        "header",
        el("h1", "Compressed and healed at equal FLOPs"),
        el("p", f"Curated data: {results.config['curated']}.", class_="soft"),
        el("div", tiles, class_="tiles"),
        [note(f"Invalid: {why}") for why in results.invalid],
    )


def _arms(results: Results) -> list[Html]:
    planned = {line.arm.name: line for line in results.plan.lines}
    lines = []
    for arm in results.arms.values():
        line = planned.get(arm.name)
        told = ["", ""] if line is None else [count(line.tokens), "; ".join(line.warnings)]
        lines.append([arm.name, arm.about, arm.distance, *told])
    return [table(["arm", "", "KL from the parent", "tokens trained", ""], lines, "lpnnp")]


def _axis(results: Results, axis: str) -> list[Html]:
    names = [(name, up) for name, of, up in results.measures() if of == axis]
    parts = []
    for name, up in names:
        lines = []
        for arm in (a for a in results.arms.values() if name in a.measures):
            measure = arm.measures[name]
            gained = arm.changed.get(name)
            lines.append(
                [
                    arm.name,
                    arm.about,
                    f"{measure.mean:.4g}",
                    f"{measure.spread:.2g}" if len(measure.values) > 1 else "",
                    "" if gained is None else f"{gained[0]:.1f} / {gained[1]:.1f}",
                ]
            )
        parts.append(el("h3", f"{name} ({DIRECTIONS[up]})"))
        parts.append(table(["arm", "", "mean", "± over seeds", "gained / lost"], lines, "lpnnn"))
    return parts


def _effects(results: Results) -> list[Html]:
    about = (
        "Gains, positive where the first arm is better, with 95 % intervals over items and over runs; p over runs, "
        "Holm over the effects of a measure. Shown: both intervals leave out 0, and p < 0.05."
    )
    lines = [effect.cells() for effect in results.effects] + results.interaction_cells()
    return [note(about), table(["effect", "measure", "over items", "over runs", "p", "shown"], lines, "llnnnl")]


def _curves(results: Results) -> list[Html]:
    drawn = {a.name: a.curve for a in results.arms.values() if a.curve}
    told = "Training loss over the share of the arm's own tokens; what it is a loss of differs where a teacher teaches."
    return [note(told), curves(drawn, "share of the budget", "loss")]


def _cost(results: Results) -> list[Html]:
    told = (
        "Speed and memory are those of the arm's shape, medians, each in a process of its own; the size is that of its "
        "safetensors as saved. FLOPs and speed are those of dense matrices: zeros save neither."
    )
    heads, lines = results.used()
    return [note(told), table(heads, lines, "lp" + "n" * (len(heads) - 2))]


def _pareto(results: Results) -> Html:
    found = []
    for name, axis, up in results.measures():
        if axis == "language" and not up:
            arms = (a for a in results.arms.values() if name in a.measures)
            points = {a.name: (a.flops_per_token, a.measures[name].mean) for a in arms}
            found.append(el("div", el("h3", name), scatter(points, "forward FLOPs a token", name), class_="card"))
    return el("div", found, class_="charts")


def _ledger(results: Results) -> list[Html]:
    kinds = list(dict.fromkeys(c.kind for ledger in results.ledgers.values() for c in ledger.charges))
    lines = []
    for ledger in results.ledgers.values():
        of = {k: sum(c.flops for c in ledger.charges if c.kind == k) for k in kinds}
        spent = [f"{ledger.spent(reading):.3g}" for reading in READINGS]
        lines.append([ledger.arm, count(ledger.tokens), *(f"{of[k]:.3g}" if of[k] else "" for k in kinds), *spent])
    heads = ["arm", "tokens", *kinds, *READINGS]
    told = "FLOPs. Marginal: the parent is there anyway; full: its pretraining counts; amortised: runs share scores."
    return [note(told), table(heads, lines, "l" + "n" * (len(heads) - 1))]
