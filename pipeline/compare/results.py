"""What came out of a matched comparison: measures of every arm, effects between arms, and their intervals.

An effect is a difference of two arms on the same items, turned so that more is better. Two intervals tell whether it
would hold: on other items (paired bootstrap) and for other seeds and draws (Student's t); it is *shown* where both
leave out 0 and the p-value over runs, adjusted by Holm over all effects of its measure, is below 0.05. The interaction
(C - B) - (F - E) says whether curated data do more for a cut model than for one from scratch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare.arms import CUT, DESIGNS, EFFECTS, PARENT
from pipeline.compare.ledger import Ledger, Plan, markdown, table
from pipeline.compare.statistics import Estimate, flips, holm, interaction, over_items, over_runs
from pipeline.corpus.storage import Store
from pipeline.report.format import count, number, short

if TYPE_CHECKING:
    from pipeline.compare.matched import Unit

SIGNIFICANT = 0.05
HEADLINE = ("bits_per_byte.pool", "bits_per_byte.curated")
"""Language as a whole; single sources are on the page."""
INTERACTION = "interaction (C - B) - (F - E)"


@dataclass(frozen=True)
class Measure:
    """Values of one measure for one arm: (seeds, items), the items the same for all arms."""

    name: str
    axis: str
    higher_is_better: bool
    values: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def graded(self) -> bool:
        """Whether all items are right (1) or wrong (0), so that flips can be counted."""
        return bool(np.isin(self.values, (0, 1)).all())

    @property
    def spread(self) -> float:
        """Standard deviation over seeds."""
        return float(self.values.mean(axis=1).std(ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Effect:
    """What an arm gains over another on one measure, positive where it is better."""

    about: str
    arm: str
    over: str
    measure: str
    axis: str
    items: Estimate
    runs: Estimate
    adjusted: float
    """p-value over runs after Holm, over the effects of this measure."""

    @property
    def shown(self) -> bool:
        return self.items.shown and self.runs.shown and self.adjusted < SIGNIFICANT

    def cells(self) -> list[str]:
        """What it is, its measure, the two intervals, p, whether it is shown."""
        said = f"{self.about} ({self.arm} - {self.over})"
        return [said, self.measure, str(self.items), str(self.runs), f"{self.adjusted:.3f}", _said(self.shown)]


@dataclass(frozen=True)
class ArmResult:
    """One arm: its measures, how far it is from the parent (`kl`, nats a token; None where it speaks in other tokens),
    items that it gained and lost against the parent by measure, and the mean training loss by share of its tokens.

    `zeros`: share of the parameters that masks hold at 0. `cost`: of use, by measure: tokens/s of prefill, ms a token
    of decoding, peak memory and file size in MB.
    """

    name: str
    about: str
    measures: dict[str, Measure]
    kl: float | None
    changed: dict[str, tuple[float, float]]
    curve: list[tuple[float, float]]
    flops_per_token: float
    parameters: int
    zeros: float
    cost: dict[str, float]

    @property
    def distance(self) -> str:
        """`kl` as text."""
        return "" if self.kl is None else f"{self.kl:.4f}"


@dataclass
class Results:
    """The whole comparison; what is not there yet is empty."""

    config: dict[str, Any]
    budget: float
    plan: Plan
    directory: str
    arms: dict[str, ArmResult] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    interactions: dict[str, tuple[Estimate, Estimate]] = field(default_factory=dict)
    """By measure: over items, and over runs."""
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    invalid: list[str] = field(default_factory=list)

    @property
    def page(self) -> str:
        return str(Path(self.directory) / "index.html")

    def markdown(self) -> str:
        """The tables: an axis each, never one mean over them."""
        axes = dict.fromkeys(axis for _, axis, _ in self.measures())
        parts = [f"**{axis.capitalize()}**\n\n{markdown(*self.measured(axis))}" for axis in axes]
        parts += [f"**Cost of use**\n\n{markdown(*self.used())}", markdown(*self.told()), markdown(*self.churned())]
        parts.append(table(list(self.ledgers.values())))
        return "\n\n".join([*(f"**Invalid**: {line}" for line in self.invalid), *parts]) + "\n"

    def measured(self, axis: str) -> tuple[list[str], list[list[str]]]:
        """Heads and lines: mean and standard deviation over seeds of the measures of an axis, an arm each."""
        names = [(name, up) for name, of, up in self.measures() if of == axis]
        heads = ["arm", "", *(f"{name} {'↑' if up else '↓'}" for name, up in names)]
        lines = [
            [a.name, a.about, *(_mean(a.measures[n]) if n in a.measures else "" for n, _ in names)]
            for a in self.arms.values()
        ]
        return heads, lines

    def language(self) -> tuple[list[str], list[list[str]]]:
        """Heads and lines: what every arm came to on pool and curated set, and its distance to the parent."""
        heads = ["arm", "", "bits per byte, pool", "curated", "KL from the parent"]
        lines = []
        for arm in self.arms.values():
            told = [_mean(arm.measures[name]) if name in arm.measures else "" for name in HEADLINE]
            lines.append([arm.name, arm.about, *told, arm.distance])
        return heads, lines

    def used(self) -> tuple[list[str], list[list[str]]]:
        """Heads and lines: what every arm takes to store and to run, and what of it is 0, which saves none of that."""
        names = list(dict.fromkeys(name for arm in self.arms.values() for name in arm.cost))
        units = {"prefill": "tokens/s", "decode": "ms a token", "peak_memory": "MB", "file_size": "MB"}
        heads = ["arm", "", "parameters", "of them 0", "FLOPs a token"]
        heads += [f"{name}, {units[name.partition('@')[0]]}" for name in names]
        lines = []
        for arm in self.arms.values():
            cost = [number(arm.cost[name]) if name in arm.cost else "" for name in names]
            zeros = f"{100 * arm.zeros:.1f} %" if arm.zeros else ""
            lines.append([arm.name, arm.about, count(arm.parameters), zeros, short(arm.flops_per_token), *cost])
        return heads, lines

    def measures(self) -> list[tuple[str, str, bool]]:
        """Name, axis and direction of all measures, by axis."""
        found = {m.name: (m.name, m.axis, m.higher_is_better) for a in self.arms.values() for m in a.measures.values()}
        return sorted(found.values(), key=lambda m: (m[1], m[0]))

    def told(self) -> tuple[list[str], list[list[str]]]:
        """Heads and lines: effects on language, and the interactions; those on the rest are on the page."""
        heads = ["effect", "measure", "gain over items", "gain over runs", "p, Holm", "shown"]
        lines = [e.cells() for e in self.effects if e.measure in HEADLINE]
        return heads, [*lines, *(line for line in self.interaction_cells() if line[1] in HEADLINE)]

    def interaction_cells(self) -> list[list[str]]:
        """Of every interaction, as `Effect.cells`; its p-value stands alone."""
        return [
            [INTERACTION, measure, str(items), str(runs), f"{runs.p:.3f}", _said(items.shown and runs.shown)]
            for measure, (items, runs) in self.interactions.items()
        ]

    def churned(self) -> tuple[list[str], list[list[str]]]:
        """Heads and lines: how far every arm is from the parent: KL, and items gained and lost."""
        names = sorted({name for arm in self.arms.values() for name in arm.changed})
        heads = ["arm", "KL(parent, arm) nats", *(f"{name}: gained / lost" for name in names)]
        lines = []
        for arm in self.arms.values():
            own = [arm.changed.get(name) for name in names]
            lines.append([arm.name, arm.distance, *("" if c is None else f"{c[0]:.1f} / {c[1]:.1f}" for c in own)])
        return heads, lines

    def as_json(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "budget": self.budget,
            "plan": self.plan.as_json(),
            "arms": {name: _arm_json(arm) for name, arm in self.arms.items()},
            "effects": [asdict(e) | {"shown": e.shown} for e in self.effects],
            "interactions": {m: {"items": asdict(i), "runs": asdict(r)} for m, (i, r) in self.interactions.items()},
            "ledgers": {name: ledger.as_json() for name, ledger in self.ledgers.items()},
            "invalid": self.invalid,
        }

    def write(self) -> None:
        """matched.json, matched.md and index.html."""
        from pipeline.report.comparison import write_page

        store = Store(self.directory)
        store.write(json.dumps(self.as_json(), indent=2).encode(), "matched.json")
        store.write(self.markdown().encode(), "matched.md")
        write_page(self)


def judge(
    results: Results, units: Sequence[Unit], ledgers: Mapping[str, Ledger], costs: Mapping[str, dict[str, float]]
) -> None:
    """Fill in what the trainings left on disk, and what follows from it. `costs`: speed and memory of `dense` and of
    `student`, the one shape of all others."""
    by_arm: dict[str, list[Unit]] = {}
    for unit in units:
        by_arm.setdefault(unit.design.name, []).append(unit)
    for name, own in by_arm.items():
        dense = own[0].design.start == "dense"
        results.arms[name] = _arm(name, own, results.arms.get(PARENT), costs["dense" if dense else "student"])
    results.ledgers = dict(ledgers)
    results.invalid = [why for ledger in ledgers.values() if (why := ledger.invalid(results.budget))]
    for name, axis, up in results.measures():
        found = []
        for about, (arm, over) in EFFECTS.items():
            if all(n in results.arms and name in results.arms[n].measures for n in (arm, over)):
                a, b = (results.arms[n].measures[name].values * (1 if up else -1) for n in (arm, over))
                found.append((about, arm, over, over_items(a, b), over_runs((a - b).mean(axis=1))))
        adjusted = holm([runs.p for *_, runs in found])
        results.effects += [
            Effect(about, arm, over, name, axis, items, runs, float(p))
            for (about, arm, over, items, runs), p in zip(found, adjusted, strict=True)
        ]
        if axis == "language" and all(n in results.arms and name in results.arms[n].measures for n in "CBFE"):
            c, b, f, e = (results.arms[n].measures[name].values * (1 if up else -1) for n in "CBFE")
            runs = over_runs(((c - b) - (f - e)).mean(axis=1))
            results.interactions[name] = (interaction(c, b, f, e), runs)


def _arm(name: str, units: Sequence[Unit], parent: ArmResult | None, cost: dict[str, float]) -> ArmResult:
    folders = [Path(u.result.store.path) for u in sorted(units, key=lambda u: u.seed)]
    facts = [json.loads((f / "result.json").read_text()) for f in folders]
    measures = {}
    for measure, about in facts[0]["measures"].items():
        values = []
        for place in folders:
            with np.load(place / "values.npz", allow_pickle=False) as arrays:
                values.append(arrays[measure])
        measures[measure] = Measure(measure, about["axis"], about["higher_is_better"], np.stack(values))
    cost = cost | {n: float(np.median(m.values)) for n, m in measures.items() if m.axis == "cost"}
    measures = {n: m for n, m in measures.items() if m.axis != "cost"}
    changed = {}
    for measure, own in measures.items():
        if parent and own.graded and parent.measures[measure].graded:
            each = [flips(parent.measures[measure].values[0], values) for values in own.values]
            changed[measure] = (float(np.mean([c.gained for c in each])), float(np.mean([c.lost for c in each])))
    about = DESIGNS[name].about if name in DESIGNS else {PARENT: "untouched", CUT: "as C, not healed"}[name]
    return ArmResult(
        name,
        about,
        measures,
        measures["kl"].mean if "kl" in measures else None,
        changed,
        _curve([f / "metrics.jsonl" for f in folders]),
        facts[0]["flops_per_token"],
        facts[0]["parameters"],
        float(np.mean([f["zeros"] for f in facts])),
        cost,
    )


def _curve(files: Sequence[Path], points: int = 60) -> list[tuple[float, float]]:
    """Mean training loss of the seeds over shares of the tokens, smoothed to `points`."""
    curves = []
    for file in files:
        if not file.exists():
            return []
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        losses = np.array([line["loss"] for line in lines if "loss" in line])
        pieces = np.array_split(losses, min(points, len(losses)))
        curves.append([float(p.mean()) for p in pieces])
    if not curves or not curves[0]:
        return []
    mean = np.mean([c[: min(map(len, curves))] for c in curves], axis=0)
    return [((i + 1) / len(mean), float(value)) for i, value in enumerate(mean)]


def _arm_json(arm: ArmResult) -> dict[str, Any]:
    told = {k: v for k, v in vars(arm).items() if k != "measures"}
    own = {
        m.name: {"axis": m.axis, "higher_is_better": m.higher_is_better, "seeds": m.values.mean(axis=1).tolist()}
        for m in arm.measures.values()
    }
    return told | {"measures": own}


def _mean(measure: Measure) -> str:
    return f"{measure.mean:.4g}" + (f" ± {measure.spread:.2g}" if len(measure.values) > 1 else "")


def _said(shown: bool) -> str:
    return "yes" if shown else "no"
