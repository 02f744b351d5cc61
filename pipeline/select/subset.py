"""A random subset of rows that are kept already: to calibrate on, to recover on, to validate with.

Rows are drawn by the hash of their key, so the draw is the same on any machine and a larger one contains the smaller
ones. With concepts every concept gets an equal quota, at least one row each while there are enough to go round, and
none more than it has. Disjoint subsets are made by naming the earlier ones in `without`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.recipe import Column, Transform, fingerprint
from pipeline.sample import needs_fit
from pipeline.select import quotas
from pipeline.select.ranking import Ranking, load_lines, numpy_of, save_lines
from pipeline.select.stage import CONCEPT, WEIGHT, stream
from pipeline.select.threshold import Cut, Totals, exact
from pipeline.select.verdict import LINES

if TYPE_CHECKING:
    from pipeline.run import Artifact, Run

FIELDS = pa.schema([("keep", pa.bool_())])


@dataclass(frozen=True)
class Drawn:
    """A subset that was drawn: the column `name` has its flag `keep`, which is null where `of` is."""

    name: str
    rows: int
    amount: int
    """What was drawn in the unit of the budget."""


def subset(
    run: Run,
    name: str,
    *,
    rows: int = 0,
    tokens: int = 0,
    bytes: int = 0,  # the units have the same names everywhere
    seed: int = 0,
    of: str = "select",
    without: tuple[str, ...] = (),
    concepts: int = 0,
) -> Drawn:
    """Draw at most so many rows, tokens or bytes (one of them) of the rows with `<of>.keep` into a new column.

    `without`: columns whose kept rows are left out. `concepts`: how many there are, for equal quotas; 0 draws from all
    rows alike. Raises TamisError where no row is left, or the first row drawn is larger than the budget alone.
    """
    budget = {"rows": rows, "tokens": tokens, "bytes": bytes}
    (unit, total), *more = [(u, n) for u, n in budget.items() if n] or [("rows", 0)]
    if more or total < 1:
        raise ValueError(f"a subset needs one of rows, tokens and bytes, not {budget}")
    ranking = Ranking(
        unit=WEIGHT[unit],  # type: ignore[index]  # the keys of `budget` are its keys
        seed=stream(seed, name),
        group=CONCEPT if concepts else "",
        groups=concepts or 1,
        where=(f"{of}.keep",),
        where_not=tuple(f"{w}.keep" for w in without),
    )

    def allot(totals: Totals) -> np.ndarray:
        available, amount = totals.weight, min(total, int(totals.weight.sum()))
        if not concepts:
            return np.array([amount])
        there = available > 0
        return quotas.allocate(there / max(there.sum(), 1), available, amount, quotas.floors(available, amount, 0, 1))

    references = (*ranking.where, *ranking.where_not, "row.key", *(r for r in (ranking.unit, ranking.group) if r))
    asked = fingerprint("subset", 1, name, unit, total, seed, concepts)
    cut, identity = None, fingerprint(asked, run.identity(*references))
    if needs_fit(run, f"subset-{name}", identity):
        cut = exact(run, ranking, allot)
        identity = fingerprint(asked, run.identity(*references))  # shards may have been given up
    artifact = run.artifact(f"subset-{name}", identity, partial(_write, cut), resources=None)
    lines = load_lines(artifact.local() / LINES)
    inputs = tuple(dict.fromkeys([*ranking.where, *ranking.where_not, *(r for line in lines for r in line.inputs)]))
    opened = partial(_open, artifact, ranking.where, ranking.where_not)
    run.materialize([Column(name, inputs, FIELDS, opened, artifact.fingerprint, batch_rows=2**16)])
    return Drawn(name, **json.loads((artifact.local() / "drawn.json").read_text()))


def _write(cut: Cut | None, directory: Path) -> None:
    assert cut is not None  # it is there whenever the artifact is not
    save_lines(cut.lines, directory / LINES)
    drawn = {"rows": int(cut.rows.sum()), "amount": int(cut.weight.sum())}
    (directory / "drawn.json").write_text(json.dumps(drawn))


def _open(artifact: Artifact, where: tuple[str, ...], where_not: tuple[str, ...]) -> Transform:
    lines = load_lines(artifact.local() / LINES)

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        keep = np.logical_or.reduce([line.keeps(batch) for line in lines])
        for name in where:
            keep &= numpy_of(batch, name)
        for name in where_not:
            keep &= ~numpy_of(batch, name)
        return pa.record_batch([pa.array(keep)], schema=FIELDS)

    return transform
