"""What the three criteria for duplicates have in common: a group, its representative, and how the groups are reported.

A column of duplicates has five fields:

| field | values |
| --- | --- |
| `score` | float32; what is kept has 0 (`select.floors: {<name>: 0}`), a duplicate less |
| `group` | int64, the same for all members: address of the first (`engine.components.pack`); -1 for a lone row |
| `representative` | whether the row stands for its group; true for a lone row |
| `size` | int32, rows of the group |
| `rule` | the kind of duplicate that it is, "" for a representative |

Several criteria must not drop each other's representatives: a row that a criterion for duplicates dropped stands for a
group of a later one only where the whole group was dropped. The same holds for other floors only if asked for: `keep:
best` with `by: quality` leaves the row that has the best chance to pass a floor of `quality`.

`artifacts/<name>-groups/groups.json` counts the groups and names the largest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.engine.components import pack
from pipeline.engine.regroup import ROW, SHARD, unopened
from pipeline.errors import ConfigError
from pipeline.recipe import Column, State, fingerprint
from pipeline.sample import needs_fit
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run

log = logging.getLogger(__name__)

FIELDS = pa.schema(
    [
        ("score", pa.float32()),
        ("group", pa.int64()),
        ("representative", pa.bool_()),
        ("size", pa.int32()),
        ("rule", pa.string()),
    ]
)
LARGEST = 20
"""Groups that groups.json names."""
ALARM = 0.01
"""A group that holds more than this share of all rows is worth a warning."""


class Duplicates(Score):
    """A criterion that keeps one row of every group of equal keys."""

    keep: Literal["first", "longest", "best"] = Field(
        "first", description="which row of a group stays: the first by address, the longest, or the best `by` a score"
    )
    by: str | None = Field(None, description="keep: best: name of the score that decides; it stands before this one")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.keep == "best") != (self.by is not None):
            raise ValueError("keep: best needs `by`, the name of a score, and nothing else takes it")
        return self

    def column(self, run: Run) -> Column:
        if self.by is not None and self.by not in run.plans:
            there = ", ".join(s.column_name for s in run.config.scores if s.column_name in run.plans) or "none"
            raise ConfigError(f"{self.column_name}.by: no score {self.by!r} is filled before it; there are {there}")
        decides = {"first": (), "longest": ("row.bytes",), "best": (f"{self.by}.score",)}[self.keep]
        inputs = (*decides, *survivors(run, self.column_name))
        return filled(self.column_name, inputs, FIELDS, fingerprint("duplicates", 1, self.kind, self.keep))

    def settle(self, run: Run, key: str) -> None:
        """Fill the column, where rows with the same key are duplicates of one another."""
        column = self.column(run)
        decides = None if self.keep == "first" else column.inputs[0]
        run.regroup(column, key, partial(keep_one, key, decides, rule_of(self.kind)))
        report_groups(run, self.column_name)


def rule_of(kind: str) -> str:
    """Reason that a dropped row shows: `exact_duplicate` of `exact_duplicates`."""
    return kind.removesuffix("s")


def survivors(run: Run, name: str) -> tuple[str, ...]:
    """References that are true for the rows that the criteria for duplicates before the one of this name left."""
    names = [s.column_name for s in run.config.scores]
    before = [run.plans[n].column for n in names[: names.index(name)] if n in run.plans]
    return tuple(f"{c.name}.representative" for c in before if c.fields == FIELDS)


def dropped(table: pa.Table) -> np.ndarray:
    """Rows of a table that an earlier criterion dropped, where `survivors` travel; bool (n,)."""
    left = [table[c].to_numpy() for c in table.column_names if c.endswith(".representative")]
    return ~np.logical_and.reduce(left) if left else np.zeros(len(table), bool)


def filled(name: str, inputs: tuple[str, ...], fields: pa.Schema, identity: str) -> Column:
    """A column that `Run.regroup` or `Run.connect_rows` fills."""
    return Column(name, inputs, fields, unopened, identity)


def keep_one(key: str, decides: str | None, rule: str, table: pa.Table) -> pa.Table:
    """Reduce of `Run.regroup`: of every key the row with the greatest `decides` stays, the first where they tie; a
    row that an earlier criterion dropped only where there is no other."""
    keys = table[key].combine_chunks()
    number = np.zeros(len(keys), np.int64)
    number[1:] = np.cumsum(pc.not_equal(keys.slice(1), keys.slice(0, max(len(keys) - 1, 0))))
    value = table[decides].to_numpy() if decides else number
    ranked = np.lexsort((-value, dropped(table), number))  # stable, so ties stay in the order of addresses
    representative = np.zeros(len(keys), bool)
    representative[ranked[np.unique(number, return_index=True)[1]]] = True
    return describe(table, number, representative, np.where(representative, 0, -1), rule)


def describe(table: pa.Table, number: np.ndarray, representative: np.ndarray, score: np.ndarray, rule: str) -> pa.Table:
    """The fields of n rows in the order of addresses, with the `number` of their group; arrays (n,)."""
    _, first, of, size = np.unique(number, return_index=True, return_inverse=True, return_counts=True)
    group = np.where(size > 1, pack(table[SHARD].to_numpy()[first], table[ROW].to_numpy()[first]), -1)
    values = {
        "score": pa.array(score, pa.float32()),
        "group": pa.array(group[of]),
        "representative": pa.array(representative),
        "size": pa.array(size[of], pa.int32()),
        "rule": pc.if_else(pa.array(representative), "", rule),
    }
    return pa.table({SHARD: table[SHARD], ROW: table[ROW]} | values)


@dataclass(frozen=True)
class Groups:
    """Statistic: how many groups there are. State: `count` (3,) int64, rows, groups of two rows and more, and rows in
    those; of the `LARGEST` largest groups `size` and `group` (m,) int64, the largest first."""

    name: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.{f}" for f in ("size", "group", "representative"))

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        size, group, representative = (batch.column(r).to_numpy(zero_copy_only=False) for r in self.inputs)
        own = representative & (size > 1)
        new = {
            "count": np.array([len(size), own.sum(), (size > 1).sum()]),
            "size": size[own].astype(np.int64),
            "group": group[own],
        }
        return self.merge([state, new] if state else [new])

    def merge(self, states: Sequence[State]) -> State:
        size, group = (np.concatenate([s[name] for s in states]) for name in ("size", "group"))
        order = np.lexsort((group, -size))[:LARGEST]
        return {"count": np.sum([s["count"] for s in states], axis=0), "size": size[order], "group": group[order]}


def report_groups(run: Run, name: str) -> None:
    """Write the artifact `<name>-groups`, and warn of a group that is suspiciously large."""
    statistic = Groups(name)
    identity = fingerprint("groups", 1, run.identity(*statistic.inputs))
    if not needs_fit(run, f"{name}-groups", identity):
        return
    state = run.aggregate(statistic)
    rows, groups, inside = state["count"].tolist() if state else (0, 0, 0)
    largest = (
        [
            {"group": int(g), "shard": int(g >> 32), "row": int(g & 0xFFFFFFFF), "size": int(n)}
            for g, n in zip(state["group"], state["size"], strict=True)
        ]
        if state
        else []
    )
    about = {"rows": rows, "groups": groups, "rows_in_groups": inside, "dropped": inside - groups, "largest": largest}
    run.artifact(f"{name}-groups", identity, partial(_write_groups, about), resources=None)
    if largest and largest[0]["size"] > max(ALARM * rows, 100):
        said = "%s: one group holds %s of %s rows: look at it before dropping them (boilerplate joins unlike documents)"
        log.warning(said, name, f"{largest[0]['size']:,}", f"{rows:,}")


def _write_groups(about: dict[str, Any], directory: Path) -> None:
    (directory / "groups.json").write_text(json.dumps(about, indent=2))
