"""The selection: scores that are stored once, to the rows that an exact budget keeps. Read `select` first.

It reads scores, concepts and row sizes, never the text, a vector or a model, so another budget or other weights over
stored columns take seconds; but for the proxies of a budget of compute, which are trained once, on a sample. What it
leaves in the run:

    columns/combined        one score out of several, where several rank or the order is drawn
    artifacts/qqt           for a budget of compute with proxies: the law that they gave, and their errors
    artifacts/threshold     the lines above which rows are kept, and every concept's quota
    columns/select          `keep` and `reason` of every row
    artifacts/selection     selection.json (totals, reasons, notes), shards.npz (rows, tokens and bytes kept a shard),
                            concepts.parquet (the concept table with quota and what was kept)

The kept total never exceeds the budget, and the next row in rank order would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, TamisError
from pipeline.recipe import State, fingerprint
from pipeline.sample import needs_fit
from pipeline.select import quotas
from pipeline.select.combine import combined
from pipeline.select.config import Quotas, Select, Unit
from pipeline.select.proxies import fitted_law
from pipeline.select.ranking import Line, Ranking, load_lines, save_lines
from pipeline.select.threshold import Totals, exact, find
from pipeline.select.verdict import AMOUNTS, LINES, Floor, Lowest, Realised, Verdict, verdict_column

if TYPE_CHECKING:
    from pipeline.run import Artifact, Run
    from pipeline.scores.base import Score

VERSION = 1
CONCEPT = "concept.concept"
WEIGHT: dict[Unit, str] = {"rows": "", "tokens": "row.tokens", "bytes": "row.bytes"}


@dataclass(frozen=True)
class Selection:
    """What was kept. `corpus` counts the rows of the shards that take part, `available` those of them that are not in
    quarantine, in the unit of the budget."""

    unit: str
    budget: int
    available: int
    rows: int
    tokens: int
    bytes: int
    corpus: int
    reasons: dict[str, int]
    ranked_by: tuple[str, ...]
    threshold: float
    """Lowest value kept of the first score that ranks."""
    next_row: int
    """Weight of the row that comes next and would exceed the budget; 0 where no row is left that could."""
    tokens_named: str
    notes: tuple[str, ...]
    artifact: Artifact
    training: dict[str, Any] | None = None
    """Of a budget of compute: `tokens_to_see`, `epochs` over what is kept, and what the law predicts."""

    @property
    def kept(self) -> int:
        """What was kept, in the unit of the budget."""
        return int(getattr(self, self.unit))

    def shards(self) -> dict[str, np.ndarray]:
        """int64 arrays `shard`, `rows`, `tokens` and `bytes`: what was kept of each shard that takes part."""
        with np.load(self.artifact.local() / "shards.npz", allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def concepts(self) -> pa.Table | None:
        """The concept table with `quota` (in the budget's unit) and `kept_rows`, `kept_tokens`, `kept_bytes`."""
        file = self.artifact.local() / "concepts.parquet"
        return pq.read_table(file) if file.exists() else None


def select(run: Run, config: Select, scores: Sequence[Score], concepts: pa.Table | None = None) -> Selection:
    """Choose the rows to keep, from the stored columns of `scores`, and write the column `select`.

    `concepts`: the concept table (`concept`, `n`, `complexity`, ...), needed where quotas are; where it is given, a row
    without a concept counts as quarantined. Raises ConfigError for a budget that the corpus cannot fill or that no row
    fits, and TamisError where every row is in quarantine.
    """
    names = [s.column_name for s in scores]
    config.check_scores(names)
    shares = config.quotas_for(scores)
    if shares.grouped and concepts is None:
        raise ConfigError(f"select.quotas: {shares.rule} needs concepts: add `cluster: {{k: auto}}`")
    seed = run.seed if config.seed is None else config.seed
    present = (*(f"{n}.score" for n in names), *((CONCEPT,) if concepts is not None else ()))
    alive = run.identity(*present)

    ranked_by = _ranked_by(run, config, names, present, seed)
    config = with_law(run, config, ranked_by, seed)
    ranking = Ranking(
        scores=ranked_by,
        unit=WEIGHT[config.budget.unit],
        seed=stream(seed, "ties"),
        floors=tuple((f"{n}.score", v) for n, v in config.floors.items()),
        present=present,
    )
    floors = tuple(Floor(n, f"{n}.score", v, _rule_of(run, n)) for n, v in config.floors.items())
    table = None if concepts is None else _in_order(concepts)
    asked = fingerprint(VERSION, config.model_dump(mode="json"), shares.model_dump(mode="json"), seed)
    complexity = _digest(table) if table is not None and shares.grouped else ""
    read = (*present, *ranking.scores, "row.key", *([ranking.unit] if ranking.unit else []))
    found, identity = None, fingerprint("threshold", asked, complexity, run.identity(*read))
    if needs_fit(run, "threshold", identity):
        found = _find(run, config, shares, ranking, floors, table)
        identity = fingerprint("threshold", asked, complexity, run.identity(*read))  # shards may have been given up
    threshold = run.artifact("threshold", identity, partial(_write_found, found), resources=None)

    about = json.loads((threshold.local() / "threshold.json").read_text())
    verdict = Verdict(load_lines(threshold.local() / LINES), floors, present, ranking.scores[0], about["elsewhere"])
    run.materialize([verdict_column(verdict, threshold)])

    realised = Realised(ranking.scores[0], 0 if table is None else table.num_rows)
    identity = fingerprint("selection", VERSION, threshold.fingerprint, run.identity(*realised.inputs))
    state: State = {}
    if needs_fit(run, "selection", identity):
        state = run.aggregate(realised)
        if run.identity(*present) != alive:
            return select(run, config, scores, concepts)  # a shard was given up meanwhile: its rows are not kept
        if int(state["kept"][0]) != about["rows"]:
            raise TamisError(
                f"{about['rows']:,} rows were to be kept, {int(state['kept'][0]):,} were: a score column has a field "
                "that is null where its score is not, or was written anew meanwhile"
            )
    corpus = sum(s.rows for s in run.live)
    build = partial(_write_selection, state, about, corpus, run.tokens_named, ranking.scores, table, threshold)
    artifact = run.artifact("selection", identity, build, resources=None)
    stored = json.loads((artifact.local() / "selection.json").read_text())
    return Selection(**stored | {name: tuple(stored[name]) for name in ("ranked_by", "notes")}, artifact=artifact)


def _ranked_by(run: Run, config: Select, names: Sequence[str], present: tuple[str, ...], seed: int) -> tuple[str, ...]:
    """References of the scores that rank; several become the column `combined`, but for gates."""
    weights = {f"{n}.score": w for n, w in config.ranking(names).items()}
    if config.combine == "gates" or (len(weights) == 1 and not config.temperature):
        return tuple(weights)
    run.materialize([combined(run, config.combine, weights, present, config.temperature, stream(seed, "draw"))])
    return ("combined.score",)


def with_law(run: Run, config: Select, ranked_by: tuple[str, ...], seed: int) -> Select:
    """The same selection, with the law in place of the proxies that it is fitted to."""
    proxies = config.budget.proxies
    if proxies is None:
        return config
    law = fitted_law(run, proxies, ranked_by, stream(seed, "proxies"))
    budget = config.budget.model_copy(update={"law": law, "proxies": None})
    return config.model_copy(update={"budget": budget})


@dataclass(frozen=True)
class Found:
    lines: tuple[Line, ...]
    quota: np.ndarray
    about: dict[str, Any]


def _find(
    run: Run, config: Select, shares: Quotas, ranking: Ranking, floors: tuple[Floor, ...], table: pa.Table | None
) -> Found:
    """Find the lines that keep exactly the budget."""
    unit, notes, budget = config.budget.unit, [], 0

    def amount(totals: Totals) -> int:
        nonlocal budget
        there = totals.seen_weight if ranking.unit else totals.seen_rows
        competing = int(totals.weight.sum())
        budget = config.budget.amount(there)
        if competing < budget and config.strict:
            raise ConfigError(
                f"select.strict: {competing:,} of {there:,} {unit} reach the floors, less than the budget of "
                f"{budget:,}: lower select.floors or the budget, or set strict: false"
            )
        return min(budget, competing)

    def together(totals: Totals) -> np.ndarray:
        return np.array([amount(totals)])

    def shared(totals: Totals) -> np.ndarray:
        assert table is not None
        total, available = amount(totals), totals.weight
        share = _share(shares, available, table)
        least = 1 if shares.rule == "density" else 0
        notes.append(
            f"quotas spread over {quotas.effective(share):.1f} effective concepts of {int((available > 0).sum())}"
        )
        return quotas.allocate(share, available, total, quotas.floors(available, total, shares.least_share, least))

    def balanced(totals: Totals) -> np.ndarray:
        return quotas.floors(totals.weight, amount(totals), shares.least_share)

    first = None
    if shares.grouped and table is not None:
        grouped = replace(ranking, group=CONCEPT, groups=table.num_rows)
        if shares.rule != "none":
            cut = exact(run, grouped, shared, skip=config.skip)
        else:
            first = find(run, grouped, balanced)
            rest = np.array([amount(first.totals) - first.weight.sum()])
            cut = exact(run, replace(ranking, beyond=(first.line(),)), lambda _: rest, skip=config.skip)
            if not first.budget.any():
                notes.append(f"balance has no effect: there are more concepts than {unit} to share among them")
    else:
        cut = exact(run, ranking, together, skip=config.skip)

    lines = (*([first.line()] if first else []), *cut.lines)
    totals = first.totals if first else cut.totals
    elsewhere = None
    if shares.grouped:
        lowest = run.aggregate(Lowest(Verdict(lines, floors, ranking.present, ranking.scores[0])))
        elsewhere = float(lowest["lowest"][0])
    there = totals.seen_weight if ranking.unit else totals.seen_rows
    if there == budget:
        notes.append(f"the budget takes all {there:,} {unit} that there are")
    elif totals.weight.sum() < budget:
        notes.append(f"only {int(totals.weight.sum()):,} {unit} reach the floors, less than the budget: all are kept")
    choice = config.budget.choice(there)
    notes += choice.notes if choice else ()
    about = {
        "unit": unit,
        "budget": budget,
        "available": there,
        "next_row": cut.next_weight,
        "rows": int(cut.rows.sum()) + (int(first.rows.sum()) if first else 0),
        "elsewhere": elsewhere,
        "notes": notes,
        **({"training": choice.described()} if choice else {}),
    }
    return Found(lines, (first or cut).budget, about)


def _share(shares: Quotas, available: np.ndarray, table: pa.Table) -> np.ndarray:
    """Wanted shares of the concepts, which sum to 1; float64 (concepts,). A concept without rows wants none."""
    share, there = np.zeros(len(available)), available > 0
    if shares.rule == "proportional":
        return np.asarray(available / max(int(available.sum()), 1))
    if shares.rule == "equal":
        share[there] = 1 / max(int(there.sum()), 1)
        return share
    complexity = table["complexity"].to_numpy()[there].astype(np.float64)
    tau = shares.tau * (float(complexity.std()) or 1.0) if shares.relative else shares.tau
    share[there] = quotas.softmax(complexity, tau)
    return share


def _in_order(concepts: pa.Table) -> pa.Table:
    concepts = concepts.sort_by("concept")
    if not np.array_equal(concepts["concept"].to_numpy(), np.arange(concepts.num_rows)):
        raise TamisError("the concept table must hold every concept from 0 on, once")
    return concepts


def _digest(table: pa.Table) -> str:
    return hashlib.sha256(np.ascontiguousarray(table["complexity"].to_numpy(), np.float64).tobytes()).hexdigest()


def _rule_of(run: Run, name: str) -> str:
    return f"{name}.rule" if "rule" in run.plans[name].column.fields.names else ""


def stream(seed: int, purpose: str) -> int:
    """A seed of its own for every purpose, so that a draw and the ties behind it are independent."""
    return int(fingerprint(seed, purpose)[:15], 16)


def _write_found(found: Found | None, directory: Path) -> None:
    assert found is not None  # it is there whenever the artifact is not
    save_lines(found.lines, directory / LINES)
    np.save(directory / "quota.npy", found.quota)
    (directory / "threshold.json").write_text(json.dumps(found.about, indent=2))


def _write_selection(
    state: State,
    about: dict[str, Any],
    corpus: int,
    tokens_named: str,
    ranked_by: tuple[str, ...],
    table: pa.Table | None,
    threshold: Artifact,
    directory: Path,
) -> None:
    counts = sorted(zip(state["count"].tolist(), state["reason"].tolist(), strict=True), key=lambda c: (-c[0], c[1]))
    reasons = {str(reason): count for count, reason in counts if count}
    if missing := corpus - sum(reasons.values()):
        reasons["quarantined"] = missing
    kept = {"rows": int(state["kept"][0]), "tokens": int(state["kept"][1]), "bytes": int(state["kept"][2])}
    described = {name: value for name, value in about.items() if name != "elsewhere"} | kept
    described |= {"corpus": corpus, "reasons": reasons, "ranked_by": ranked_by, "threshold": float(state["lowest"][0])}
    (directory / "selection.json").write_text(json.dumps(described | {"tokens_named": tokens_named}, indent=2))
    np.savez(directory / "shards.npz", shard=state["shard"], **dict(zip(AMOUNTS, state["of_shard"].T, strict=True)))
    if table is not None:
        quota = np.load(threshold.local() / "quota.npy")
        if len(quota) == table.num_rows:
            table = table.append_column("quota", pa.array(quota))
        for i, name in enumerate(AMOUNTS):
            table = table.append_column(f"kept_{name}", pa.array(state["of_concept"][:, i]))
        pq.write_table(table, directory / "concepts.parquet")
