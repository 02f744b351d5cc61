"""The best rows to an exact budget, over any number of rows, with a driver that holds a histogram.

A row's place is one long number: the order-preserving keys of its scores (32 bits each, the first decides), then the
hash of its key (64), then its address (64). All places differ, so "the best rows within the budget" is one threshold.
It is found digit by digit: each pass over the corpus is an `aggregate` that adds up the weights (rows, tokens or
bytes) by the next digit of the rows that share the digits known so far, and tells the bin in which the budget runs
out. Two passes of 16 bits settle most budgets; ties take one more, and only then is a row's key read.

Guarantees: the rows kept are a prefix of the ranking, their weight never exceeds the budget, and the next row would
exceed it. The result depends on neither the order of shards nor how rows fall into them. Integers throughout: no
weight is rounded. Groups (concepts) each have a budget of their own and are searched in the same passes.

Costs: at most 2**22 bins of 24 bytes whatever the corpus, and 65,536 for one group; once no more than 2**16 rows are
in question their whole digits are listed, which ends the search. About 7 ns of a core a row and pass beside reading it,
ten times that with groups, whose bins are found by sorting each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.errors import BudgetTooSmall, TamisError
from pipeline.recipe import State
from pipeline.select.ranking import ONES, Line, Ranking, narrow, numpy_of, of_group

if TYPE_CHECKING:
    from pipeline.run import Run

BINS = 2**22
"""Bins that a pass with groups may fill: 100 MB on the driver when all of them occur."""

LISTED = 2**16
"""Rows still in question that are listed one by one instead of counted by digit."""


@dataclass(frozen=True)
class Level:
    """Which digit a pass counts: bits [shift, shift + width) of a field, of rows whose earlier digits are `prefix`.

    `prefix`: uint64 (fields, groups), zero below `shift`. `active`: bool (groups,), groups still searched.
    """

    number: int
    shift: int
    width: int
    prefix: np.ndarray
    active: np.ndarray

    @property
    def dense(self) -> bool:
        return len(self.active) << self.width <= 2**16


@dataclass(frozen=True)
class Histogram:
    """Statistic: rows and weight by (group, digit), best digit first, of the rows that share the level's prefix.

    State: `count` and, with a unit, `weight` (int64), by bin where bins are few, else beside their `code`. `seen`: rows
    and weight before floors and masks.
    """

    ranking: Ranking
    level: Level

    @property
    def inputs(self) -> tuple[str, ...]:
        r = self.ranking
        named = [*r.references(self.level.number + 1), r.group, r.unit, *r.where, *r.where_not, *r.present]
        named += [name for name, _ in r.floors] + [name for line in r.beyond for name in line.inputs]
        return tuple(dict.fromkeys(name for name in named if name))

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        code, weight, seen = self._digits(batch)
        names = ["count"] if weight is None else ["count", "weight"]
        if not state:
            bins = len(self.level.active) << self.level.width if self.level.dense else 0
            state = {"seen": np.zeros(2, np.int64)} | {name: np.zeros(bins, np.int64) for name in names}
            state |= {} if self.level.dense else {"code": np.zeros(0, np.int64)}
        self._check(state["seen"], seen)
        state["seen"] = state["seen"] + seen
        if self.level.dense:
            np.add.at(state["count"], code, 1)
            if weight is not None:
                np.add.at(state["weight"], code, weight)  # bincount would sum in float64
            return state
        added = _summed({"code": code, "count": np.ones_like(code)} | ({} if weight is None else {"weight": weight}))
        state |= {name: np.concatenate([state[name], added[name]]) for name in added}
        return state | _summed(state) if len(state["code"]) > BINS else state

    def merge(self, states: Sequence[State]) -> State:
        self._check(*(s["seen"] for s in states))
        seen = {"seen": np.sum([s["seen"] for s in states], axis=0)}
        names = [name for name in states[0] if name != "seen"]
        if self.level.dense:
            return seen | {name: np.sum([s[name] for s in states], axis=0) for name in names}
        return seen | _summed({name: np.concatenate([s[name] for s in states]) for name in names})

    def _check(self, *seen: np.ndarray) -> None:
        if sum(float(s[1]) for s in seen) >= 2.0**63:
            raise TamisError(f"the sum of {self.ranking.unit} is above 2**63: count in a larger unit")

    def _digits(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """(code, weight) of the rows that compete and share the prefix, and (rows, weight) of all."""
        ranking, level = self.ranking, self.level
        group = ranking.members(batch)
        seen = np.full(2, batch.num_rows, np.int64)
        weight = numpy_of(batch, ranking.unit) if ranking.unit else None
        if weight is not None:
            if weight.min(initial=0) < 0:
                raise TamisError(f"{ranking.unit} is {weight.min()} in a row: a weight cannot be negative")
            self._check(np.array([0, weight.sum(dtype=np.float64)]))
            seen[1] = weight.sum()
        rows = ranking.competing(batch)
        if group is not None and not level.active.all():
            rows = narrow(rows, level.active[group if rows is None else group[rows]])
        for number in range(level.number + 1):
            value = ranking.value(batch, number, rows)
            open_bits = level.shift + level.width if number == level.number else 0
            if open_bits < ranking.bits(number):
                prefix = of_group(level.prefix[number].astype(value.dtype), group, rows)
                same = (value ^ prefix) >> value.dtype.type(open_bits) == 0
                rows, value = narrow(rows, same), value[same]
        code = (~value >> value.dtype.type(level.shift)).astype(np.int64) & ((1 << level.width) - 1)
        if group is not None:
            code |= (group if rows is None else group[rows]) << level.width
        return code, weight if weight is None or rows is None else weight[rows], seen


@dataclass(frozen=True)
class Totals:
    """What there is: before floors and masks (`seen_*`), and competing, by group (int64 (groups,))."""

    seen_rows: int
    seen_weight: int
    rows: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Cut:
    """The rows to keep: those that any of `lines` keeps. `budget`, `rows` and `weight` are int64 (groups,).

    `next_weight` is the weight of the row that comes next and would exceed the budget; 0 where no row is left.
    """

    lines: tuple[Line, ...]
    budget: np.ndarray
    rows: np.ndarray
    weight: np.ndarray
    next_weight: int
    totals: Totals
    passes: int


Allot = Callable[[Totals], np.ndarray]
"""From what there is to a budget a group, int64 (groups,)."""


@dataclass
class Search:
    """The threshold found so far. `level` says what to count next; `advance` takes the counts; None: it is found."""

    ranking: Ranking
    allot: Allot
    corpus_rows: int
    level: Level | None = field(init=False)
    totals: Totals = field(init=False)
    budget: np.ndarray = field(init=False)
    passes: int = 0

    def __post_init__(self) -> None:
        groups = self.ranking.groups
        self.rows, self.weight, self.next_weight, self.untied = (np.zeros(groups, np.int64) for _ in range(4))
        self.bounds = np.full((self.ranking.fields, groups), ONES)
        self.last = np.zeros((2, groups), np.int64)  # field and shift at which a group's search ended
        self.level = self._level(
            0, self.ranking.bits(0), np.zeros_like(self.bounds), np.ones(groups, bool), self.corpus_rows
        )

    def _level(self, number: int, left: int, prefix: np.ndarray, active: np.ndarray, rows: int) -> Level:
        groups = len(active)
        fitting = 62 - groups.bit_length() if rows <= LISTED else min(16, (BINS // groups).bit_length() - 1)
        width = min(left, max(1, fitting))
        return Level(number, left - width, width, prefix, active)

    def advance(self, state: State) -> None:
        """Fold the histogram of the current level in: in which bin of each group does its budget run out?"""
        assert self.level is not None
        level, self.passes = self.level, self.passes + 1
        code, count, weight = _entries(state)
        group = code >> level.width
        if self.passes == 1:
            self._begin(state, group, count, weight)
        spent = _running(group, weight, len(level.active))
        exceeding = np.flatnonzero(spent + weight > (self.budget - self.weight)[group])
        crossing, first = np.unique(group[exceeding], return_index=True)
        at = exceeding[first]
        self._keep_whole(np.setdiff1d(np.flatnonzero(level.active), crossing))

        self.rows[crossing] += _running(group, count, len(level.active))[at]
        self.weight[crossing] += spent[at]
        digit = (~code[at] & ((1 << level.width) - 1)).astype(np.uint64)
        prefix = level.prefix.copy()
        prefix[level.number, crossing] |= digit << np.uint64(level.shift)
        found = count[at] == 1
        if not self.ranking.unit:
            found |= self.budget[crossing] == self.rows[crossing]
        self._end(crossing[found], weight[at][found] if self.ranking.unit else 1, level, prefix)
        self._descend(crossing[~found], int(count[at][~found].sum()), level, prefix)

    def _keep_whole(self, groups: np.ndarray) -> None:
        """Nothing runs out in these groups: they keep all that they have."""
        self.rows[groups], self.weight[groups] = self.totals.rows[groups], self.totals.weight[groups]
        self.bounds[: 1 if self.ranking.scores else None, groups] = 0  # no score has the key 0, but a hash may be 0

    def _end(self, groups: np.ndarray, next_weight: np.ndarray | int, level: Level, prefix: np.ndarray) -> None:
        """The line is at the last place that shares the prefix: all rows of the bin are below it."""
        self.bounds[: level.number + 1, groups] = prefix[: level.number + 1, groups]
        self.bounds[level.number, groups] |= np.uint64((1 << level.shift) - 1)
        self.next_weight[groups] = next_weight
        self.last[:, groups] = [[level.number], [level.shift]]

    def _descend(self, groups: np.ndarray, rows: int, level: Level, prefix: np.ndarray) -> None:
        active = np.zeros_like(level.active)
        active[groups] = True
        number, left = level.number, level.shift
        if not left:
            number, left = number + 1, self.ranking.bits(number + 1)
            if number == len(self.ranking.scores):
                self.untied[groups] = self.rows[groups]
        self.level = self._level(number, left, prefix, active, rows) if len(groups) else None

    def _begin(self, state: State, group: np.ndarray, count: np.ndarray, weight: np.ndarray) -> None:
        rows, total = np.zeros(self.ranking.groups, np.int64), np.zeros(self.ranking.groups, np.int64)
        np.add.at(rows, group, count)
        np.add.at(total, group, weight)
        self.totals = Totals(int(state["seen"][0]), int(state["seen"][1]), rows, total)
        self.budget = self.allot(self.totals)

    def include_next(self) -> int:
        """Spend what the groups' last rows left over: one more row for the groups that it exceeds least.

        A budget a group, in tokens or bytes, is met to within a row; without this step the total would fall short of
        the sum by half a row a group. It is the rounding by largest remainder for rows of unequal weight: in order of
        the excess (ties by group), as long as the sum fits. Returns the weight of the row at which it stops, or 0.
        """
        waiting = np.flatnonzero(self.next_weight)
        excess = (self.next_weight - (self.budget - self.weight))[waiting]
        waiting = waiting[np.argsort(excess, kind="stable")]
        spare = int(self.budget.sum() - self.weight.sum())
        fitting = int(np.searchsorted(np.cumsum(self.next_weight[waiting]), spare, side="right"))
        chosen = waiting[:fitting]
        self.rows[chosen] += 1
        self.weight[chosen] += self.next_weight[chosen]
        where, shift = self.last[:, chosen]
        for number in reversed(range(self.ranking.fields)):  # the greatest place below the prefix that ended the search
            here = where == number
            start = self.bounds[number, chosen[here]] >> shift[here].astype(np.uint64) << shift[here].astype(np.uint64)
            self.bounds[number, chosen[here]] = start - np.uint64(1)
            where[here] -= start == 0  # borrow from the field before
            shift[here] = 0
        self.bounds[:, chosen[where < 0]] = 0
        return int(self.next_weight[waiting[fitting]]) if fitting < len(waiting) else 0

    def line(self) -> Line:
        entered = self.last[0] >= len(self.ranking.scores)
        return Line(replace(self.ranking, beyond=()), self.bounds, entered & (self.rows > self.untied))


def exact(run: Run, ranking: Ranking, allot: Allot, *, skip: bool = False) -> Cut:
    """Find the best competing rows within a budget a group.

    `skip`: go on with smaller rows after the first that does not fit, in rank order. That fills the budget better but
    is no prefix of the ranking, and costs a search a round, about log2 of a row's weight rounds. Without it and with
    several groups of unequal row weights, the groups' leftovers are spent as `Search.include_next` says.

    Raises TamisError where nothing competes or no row fits, unless the lines of `ranking.beyond` keep some already.
    """
    search = find(run, ranking, allot)
    stopped = int(search.next_weight.max(initial=0))
    if ranking.unit and ranking.groups > 1 and not skip:
        stopped = search.include_next()
    lines: tuple[Line, ...] = (search.line(),)
    rows, weight, passes = search.rows, search.weight, search.passes
    while skip:
        left = search.budget - weight
        lesser = replace(ranking, beyond=(*ranking.beyond, *lines), caps=left)
        more = find(run, lesser, partial(_given, left))
        passes += more.passes
        if not more.totals.rows.any():
            stopped = 0
            break
        lines, rows, weight = (*lines, more.line()), rows + more.rows, weight + more.weight
    if not rows.any() and not ranking.beyond:
        unit, first = ranking.unit.partition(".")[2] or "rows", int(search.next_weight.max(initial=0))
        if not search.totals.rows.any():
            raise TamisError("no row is left to select from: all are below a floor or in quarantine")
        raise BudgetTooSmall(
            f"the first row alone has {first:,} {unit}, more than the budget of {int(search.budget.sum()):,}: "
            f"raise the budget{'; every row is larger' if skip else ' or set `skip: true` to go on with smaller rows'}"
        )
    return Cut(lines, search.budget, rows, weight, stopped, search.totals, passes)


def find(run: Run, ranking: Ranking, allot: Allot) -> Search:
    """Search a line to its end. Raises TamisError where no row has all the values that the ranking reads."""
    while True:
        search = Search(ranking, allot, run.rows)
        while search.level is not None:
            state = run.aggregate(Histogram(ranking, search.level))
            if not state:
                raise TamisError("no row has all the values to select by: every one is in quarantine")
            if search.passes and int(state["seen"][0]) != search.totals.seen_rows:
                break  # a shard was given up between two passes: the digits so far count rows that are gone
            search.advance(state)
        else:
            return search


def _given(budget: np.ndarray, totals: Totals) -> np.ndarray:
    return budget


def _summed(entries: State) -> State:
    """Entries with their counts and weights summed by code, sorted by code."""
    order = np.argsort(entries["code"])
    code = entries["code"][order]
    starts = np.flatnonzero(np.diff(code, prepend=-1))
    return {
        name: code[starts] if name == "code" else np.add.reduceat(values[order], starts) if len(code) else values
        for name, values in entries.items()
        if name != "seen"
    }


def _entries(state: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(code, count, weight) of the bins that occur, sorted by code."""
    if "code" in state:
        state = _summed(state)
        return state["code"], state["count"], state.get("weight", state["count"])
    code = np.flatnonzero(state["count"])
    return code, state["count"][code], state.get("weight", state["count"])[code]


def _running(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """Sum of the values before each entry inside its group; entries are sorted by group."""
    before = np.cumsum(values) - values
    first = np.searchsorted(group, np.arange(groups))
    return np.asarray(before - before[np.minimum(first, max(len(before) - 1, 0))][group] if len(before) else before)
