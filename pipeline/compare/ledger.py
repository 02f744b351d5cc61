"""What arms of a comparison spend, and what they can afford: the ledger, and the plan before anything runs.

All arms spend the same budget C of FLOPs. What is done before training (importance, search, scoring the pool,
evaluations to choose a model by) is charged, so `tokens = (C - fixed) / per_token`, and a scorer that eats the budget
shows before it does. A model that is cut while it trains costs at every moment what its shape of then does: `stages`
say from which share of the tokens on. Three readings, always side by side: `marginal` (the parent is there anyway),
`full` (its pretraining counts) and `amortised` (scores are shared by R runs). An arm whose spending misses C by more
than 1 % is invalid.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pipeline.errors import ConfigError
from pipeline.report.format import count, short, visible

Kind = Literal[
    "importance",
    "search",
    "scoring",
    "teacher",
    "training",
    "selection",
    "deduplication",
    "final evaluation",
    "pretraining",
]
"""What FLOPs went into. `selection`: evaluations that a model is chosen or stopped by; `teacher`: logits made once."""

LISTED: frozenset[Kind] = frozenset({"deduplication", "final evaluation"})
"""Written down, charged to nobody: integer operations, and what is the same for all arms."""

Reading = Literal["marginal", "full", "amortised"]
READINGS: tuple[Reading, ...] = get_args(Reading)

TOLERANCE = 0.01
ROUNDING = 1e-9
"""By how much a share of the budget, a quotient of whole numbers, may fall short of the moment that it stands for."""
EPOCHS = 4.0
"""Repetition of curated data up to which it is worth about what new data are (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class Charge:
    """One activity: how many tokens it ran over, and the FLOPs in all."""

    kind: Kind
    tokens: float
    flops: float
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"{self.kind!r} is no kind of charge: {', '.join(get_args(Kind))}")
        if not (0 <= self.tokens < float("inf") and 0 <= self.flops < float("inf")):
            raise ValueError(f"{self.kind}: {self.tokens:g} tokens and {self.flops:g} FLOPs cannot be charged")


@dataclass
class Ledger:
    """Of one arm. `reuse`: runs that share its scores (R of the amortised reading)."""

    arm: str
    reuse: int = 1
    charges: list[Charge] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.reuse < 1:
            raise ValueError(f"scores are used by one run at least, not by {self.reuse}")

    def charge(self, kind: Kind, tokens: float, flops: float, note: str = "") -> None:
        self.charges.append(Charge(kind, tokens, flops, note))

    def spent(self, reading: Reading = "marginal") -> float:
        """FLOPs in all."""
        return sum(c.flops * self._weight(c.kind, reading) for c in self.charges)

    def _weight(self, kind: Kind, reading: Reading) -> float:
        if kind in LISTED or (kind == "pretraining" and reading != "full"):
            return 0.0
        return 1 / self.reuse if kind == "scoring" and reading == "amortised" else 1.0

    @property
    def tokens(self) -> float:
        """Tokens that were trained on."""
        return sum(c.tokens for c in self.charges if c.kind == "training")

    def invalid(self, budget: float) -> str:
        """Why an arm that spent this does not belong into a comparison at `budget`; empty where it does."""
        off = (self.spent() - budget) / budget
        if abs(off) <= TOLERANCE:
            return ""
        return f"{self.arm} spent {self.spent():.4g} FLOPs of {budget:.4g}: off by {100 * off:+.1f} %, 1 % is allowed"

    def as_json(self) -> dict[str, Any]:
        totals = {reading: self.spent(reading) for reading in READINGS}
        return asdict(self) | {"spent": totals, "tokens": self.tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        return cls(data["arm"], data["reuse"], [Charge(**c) for c in data["charges"]])


def table(ledgers: Sequence[Ledger]) -> str:
    """FLOPs by kind and in the three readings, a line an arm, in Markdown."""
    kinds = [k for k in get_args(Kind) if any(c.kind == k for ledger in ledgers for c in ledger.charges)]
    heads = ["arm", "tokens trained", *kinds, *READINGS, "R"]

    def cells(ledger: Ledger) -> list[str]:
        of = {k: sum(c.flops for c in ledger.charges if c.kind == k) for k in kinds}
        spent = [f"{ledger.spent(reading):.3g}" for reading in READINGS]
        each = [f"{of[k]:.3g}" if of[k] else "" for k in kinds]
        return [ledger.arm, count(ledger.tokens), *each, *spent, str(ledger.reuse)]

    return markdown(heads, map(cells, ledgers))


def markdown(heads: Sequence[str], lines: Any) -> str:
    """A table; what is in a cell stays there."""
    rows = [list(heads), ["---", *["---:"] * (len(heads) - 1)], *lines]
    safe = [[visible(cell, 400).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in safe)


@dataclass(frozen=True)
class Arm:
    """What an arm would do. FLOPs: `per_token` of training, `fixed` in all before it, by kind.

    `stages`: where a model is cut while it trains, from which share of its tokens on a token costs how much, in order
    and never more than before; a cut comes between optimizer steps of `step` tokens, at the first that reaches it.
    `data`: distinct tokens that it trains on (None: as many as it likes). `student`: the digest of its shape. `parent`:
    whether it starts from the parent, or is taught or scored by it, so that the full reading owes `pretraining`.
    """

    name: str
    per_token: float
    fixed: Mapping[Kind, float] = field(default_factory=dict)
    data: int | None = None
    student: str = ""
    parent: bool = True
    stages: tuple[tuple[float, float], ...] = ()
    step: int = 1
    note: str = ""
    """What its FLOPs do not say."""

    @property
    def cost(self) -> float:
        """Of all that comes before training."""
        return sum(flops for kind, flops in self.fixed.items() if kind not in LISTED)

    def training(self, tokens: int) -> float:
        """FLOPs of training on so many tokens: those spent at each shape, times what a token takes there."""
        steps = (math.ceil(max(0.0, at - ROUNDING) * tokens / self.step) for at, _ in self.stages)
        begins = [min(tokens, count * self.step) for count in steps]
        spans = zip([0, *begins], [*begins, tokens], [self.per_token, *(f for _, f in self.stages)], strict=True)
        return sum((end - begin) * flops for begin, end, flops in spans)

    def spent(self, tokens: int) -> float:
        return self.cost + self.training(tokens)


@dataclass(frozen=True)
class Line:
    """What a budget is for one arm. `refusal`: why it cannot run; then there are no tokens."""

    arm: Arm
    tokens: int
    spent: float
    epochs: float | None
    scoring: float
    """Share of the budget that goes into scoring."""
    break_even: float
    """Share of the pool kept at which scoring costs as much as the training that it selects for: keep more."""
    refusal: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A budget shared out over arms, before anything runs."""

    budget: float
    batch_tokens: int
    lines: tuple[Line, ...]

    @property
    def tokens(self) -> dict[str, int]:
        return {line.arm.name: line.tokens for line in self.lines}

    def check(self) -> None:
        """Raises ConfigError with all that is wrong: arms that cannot run, students that differ in shape."""
        wrong = [f"{line.arm.name}: {line.refusal}" for line in self.lines if line.refusal]
        students: dict[str, str] = {}
        for line in self.lines:
            if line.arm.student:
                students.setdefault(line.arm.student, line.arm.name)
        if len(students) > 1:
            wrong.append(f"{' and '.join(students.values())} train students of different shapes: nothing is matched")
        if wrong:
            raise ConfigError("\n".join(wrong))

    def cells(self) -> list[list[str]]:
        """Of every arm, what is printed: its name, FLOPs before training and a token, tokens, epochs, the share that
        scoring takes, the break-even, and why it is refused or what to beware of."""
        return [_cells(line) for line in self.lines]

    def table(self) -> str:
        heads = ["arm", "fixed", "a token", "tokens", "epochs", "scoring", "break-even keep", ""]
        return markdown(heads, self.cells())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def break_even(scorer: float, per_token: float, keep: float = 1.0) -> float:
    """Cost of scoring over that of the training it selects for, f_score / (3 f_s keep).

    `scorer`: FLOPs a token of the pool; `per_token`: of training. At `keep` 1 it is the share of the pool at which the
    two are equal.
    """
    return scorer / (per_token * keep)


def plan(budget: float, arms: Sequence[Arm], batch_tokens: int = 1, pool: int | None = None) -> Plan:
    """The tokens that every arm can afford: whole batches, so that a schedule ends with the budget.

    `pool`: tokens that scoring ran over, which the break-even takes. Raises ConfigError for what is no budget and for
    names that are there twice.
    """
    if not 0 < budget < float("inf") or batch_tokens < 1:
        raise ConfigError(f"a budget of {budget:g} FLOPs in batches of {batch_tokens} tokens: both must be positive")
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ConfigError(f"arms: every one needs a name of its own: {', '.join(names)}")
    return Plan(budget, batch_tokens, tuple(_line(budget, arm, batch_tokens, pool) for arm in arms))


def _line(budget: float, arm: Arm, batch_tokens: int, pool: int | None) -> Line:
    if arm.per_token <= 0 or min(arm.fixed.values(), default=0) < 0:
        raise ConfigError(f"{arm.name}: training and what comes before it must cost something, not less than nothing")
    if any(after > before for (_, after), before in zip(arm.stages, _rates(arm), strict=False)) or _rates(arm)[-1] <= 0:
        raise ConfigError(f"{arm.name}: a model that is cut while it trains never costs more than before, nor nothing")
    scoring = arm.fixed.get("scoring", 0.0)
    tokens = batch_tokens * _batches(budget, arm, batch_tokens)
    spent = arm.spent(tokens)
    each = arm.training(tokens) / tokens if tokens else arm.per_token
    even = break_even(scoring / pool, each) if pool and scoring else 0.0
    epochs = tokens / arm.data if arm.data else None
    line = Line(arm, tokens, spent, epochs, scoring / budget, even)
    if refusal := _refusal(line, budget, batch_tokens):
        return Line(arm, 0, arm.cost, None, scoring / budget, even, refusal)
    warnings = [arm.note] if arm.note else []
    if epochs is not None and epochs > EPOCHS:
        warnings.append(f"{epochs:.1f} epochs over its data: above {EPOCHS:g}, repetition teaches less; keep more")
    if scoring > budget / 2:
        warnings.append(f"scoring takes {100 * scoring / budget:.0f} % of the budget; score what a cheap filter left")
    return Line(arm, tokens, spent, epochs, scoring / budget, even, warnings=tuple(warnings))


def _rates(arm: Arm) -> list[float]:
    """FLOPs a token at every shape."""
    return [arm.per_token, *(flops for _, flops in arm.stages)]


def _batches(budget: float, arm: Arm, batch_tokens: int) -> int:
    """Batches whose training comes closest to what is left of a budget."""
    dearest, cheapest = (
        max(0, int((budget - arm.cost) / (f * batch_tokens))) for f in (arm.per_token, _rates(arm)[-1])
    )
    over = range(dearest + 1, cheapest + 2)  # the first that may be too many, to the last
    few = dearest + bisect_right(over, budget, key=lambda n: arm.spent(n * batch_tokens))
    return min((few, few + 1), key=lambda n: abs(arm.spent(n * batch_tokens) - budget))


def _refusal(line: Line, budget: float, batch_tokens: int) -> str:
    arm = line.arm
    if arm.data == 0:
        return "there is no data to train on"
    if arm.cost >= budget:
        dear = max(arm.fixed, key=lambda kind: arm.fixed[kind] * (kind not in LISTED))
        return (
            f"{arm.cost:.3g} FLOPs before training exceed the budget of {budget:.3g}, {arm.fixed[dear]:.3g} of them "
            f"for {dear}: raise the budget, or spend less there (score by a smaller model, or what a cheap filter left)"
        )
    if not line.tokens:
        return f"what is left of the budget is less than a batch of {batch_tokens} tokens: raise the budget"
    if abs(line.spent - budget) > TOLERANCE * budget:
        return (
            f"in batches of {batch_tokens} tokens it would spend {line.spent:.3g} FLOPs of {budget:.3g}, more than 1 % "
            "off: take smaller batches, or raise the budget"
        )
    return ""


def _cells(line: Line) -> list[str]:
    told = "refused: " + line.refusal if line.refusal else "; ".join(line.warnings)
    return [
        line.arm.name,
        f"{line.arm.cost:.3g}",
        f"{line.arm.training(line.tokens) / line.tokens if line.tokens else line.arm.per_token:.4g}",
        "" if line.refusal else short(line.tokens),
        "" if line.epochs is None else f"{line.epochs:.2g}",
        f"{100 * line.scoring:.1f} %" if line.scoring else "",
        f"{line.break_even:.2g}" if line.break_even else "",
        told,
    ]
