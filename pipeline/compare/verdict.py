"""From the losses of trained arms to a table and a verdict: which criterion earns its cost.

Every arm of a budget is trained with the same seeds, so an arm is compared with `random` seed by seed: the interval of
the mean difference is Student's t over the seeds (two-sided, 95 %, no correction for the number of criteria). A
criterion is better, or worse, where that interval leaves out 0.

What a better selection is worth is said in compute: `random` is also trained twice as long, and on the line through its
two losses (loss against the logarithm of the steps) `worth` is the factor of steps that would bring random to the
criterion's loss. It is cut at 2, where the line ends, so that nothing is claimed beyond what was trained. A criterion
costs what it takes to score the corpus beyond a random draw, in worker-seconds as measured, an embedding or a model's
pass included with all who use it. It has paid for itself once that is saved: after cost / ((worth - 1) * seconds of a
training) trainings like these, or one that is so much longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.report.format import duration
from pipeline.report.terminal import console, print_table, text

if TYPE_CHECKING:
    from pipeline.compare.proxy import Compared

CONFIDENCE = 0.95
LONGER = 2
"""Factor of steps of the second random arm."""
RANDOM = "random"
LONG = f"{RANDOM}-x{LONGER}"
Verdict = Literal["baseline", "better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its confidence interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half:.4f}"


@dataclass(frozen=True)
class Line:
    """What became of one arm at one budget. Losses are nats a token, of images the share of mistakes; differences are
    those to random."""

    arm: str
    at: float
    rows: int
    epochs: float
    target: Interval | None
    mix: Interval
    target_difference: Interval | None
    mix_difference: Interval
    verdict: Verdict
    worth: float | None
    """Steps that random would need for the same loss, over those it had; at the most 2; None where unknown."""
    cost: float | None
    """Worker-seconds to score the corpus, beyond a random draw; None where the scores were there before."""
    trainings: float | None
    """Trainings like these after which the scores are paid for; None where they are not, or unknown."""

    def sentence(self) -> str:
        """The verdict in words."""
        if self.verdict != "better":
            return {"baseline": "the baseline", "worse": "worse than random"}.get(self.verdict, self.verdict)
        if self.worth is None:
            return "better; twice the steps did not help random, so its worth in compute is unknown"
        worth = f"better, worth {self.worth:.2f} times the compute" + (" or more" if self.worth == LONGER else "")
        if self.cost is None or self.trainings is None:
            return f"{worth}; what it cost is not known: it was scored before"
        if self.trainings <= 1:
            return f"{worth}: earns its cost here"
        return f"{worth}: earns its cost where {self.trainings:,.0f} times this training follows"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"says": self.sentence()}


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % half width over seeds, by Student's t. Raises ValueError for fewer than two values."""
    from scipy import stats

    if len(values) < 2:
        raise ValueError("an interval takes two seeds or more")
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(float(np.mean(values)), float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread)


def judge(
    arm: str,
    at: float,
    rows: int,
    epochs: float,
    losses: Mapping[str, Mapping[str, Sequence[float]]],
    cost: float | None,
    seconds: float,
) -> Line:
    """The line of one arm.

    `losses`: arm to metric (`mix`, and `target` where there is one) to a loss a seed, in the same order for all; `LONG`
    is random trained longer. `epochs`: how often the arm's tokens were seen. `seconds`: of one training.
    """
    deciding = "target" if "target" in losses[arm] else "mix"

    def difference(metric: str) -> Interval:
        return interval([a - r for a, r in zip(losses[arm][metric], losses[RANDOM][metric], strict=True)])

    deciding_difference = difference(deciding)
    verdict: Verdict = "no difference shown"
    if arm == RANDOM:
        verdict = "baseline"
    elif abs(deciding_difference.mean) > deciding_difference.half:
        verdict = "better" if deciding_difference.mean < 0 else "worse"
    worth = trainings = None
    if verdict == "better":
        gained = [r - x for r, x in zip(losses[RANDOM][deciding], losses[LONG][deciding], strict=True)]
        worth = worth_of(-deciding_difference.mean, float(np.mean(gained)))
        if worth is not None and cost is not None:
            trainings = cost / ((worth - 1) * seconds)
    return Line(
        arm=arm,
        at=at,
        rows=rows,
        epochs=epochs,
        target=interval(losses[arm]["target"]) if deciding == "target" else None,
        mix=interval(losses[arm]["mix"]),
        target_difference=deciding_difference if deciding == "target" else None,
        mix_difference=difference("mix"),
        verdict=verdict,
        worth=worth,
        cost=cost,
        trainings=trainings,
    )


def worth_of(gain: float, gain_of_longer: float) -> float | None:
    """Factor of steps worth a loss lower by `gain`, where twice the steps lower it by `gain_of_longer`; at most 2."""
    if gain_of_longer <= 0:
        return None
    return float(LONGER ** min(1.0, gain / gain_of_longer))


def cells(lines: Sequence[Line], measure: str) -> list[tuple[str, ...]]:
    """The table as text, heads first, a line an arm; `measure` is what the numbers are, lower being better.

    Where there is no target there is no column for it.
    """

    def signed(line: Line, value: Interval | None) -> str:
        return "" if value is None or line.verdict == "baseline" else f"{value.mean:+.4f} ± {value.half:.4f}"

    def cost(line: Line) -> str:
        return "not known" if line.cost is None else duration(line.cost)

    columns: list[tuple[str, Callable[[Line], str]]] = [
        ("criterion", lambda line: line.arm),
        ("budget", lambda line: f"{100 * line.at:g} %"),
        (f"target {measure}", lambda line: str(line.target or "")),
        ("to random", lambda line: signed(line, line.target_difference)),
        (f"mix {measure}", lambda line: str(line.mix)),
        ("to random", lambda line: signed(line, line.mix_difference)),
        ("cost", cost),
        ("verdict", lambda line: line.sentence()),
    ]
    if all(line.target is None for line in lines):
        del columns[2:4]
    return [tuple(head for head, _ in columns), *(tuple(cell(line) for _, cell in columns) for line in lines)]


def markdown(lines: Sequence[Line], setting: str, measure: str = "loss") -> str:
    """The table in Markdown as a page, below what was run."""
    heads, *rows = cells(lines, measure)
    table = [" | ".join(c.replace("|", "\\|") for c in row) for row in (heads, ("---",) * len(heads), *rows)]
    return "\n".join(["# Which criterion earns its cost", "", setting, "", *(f"| {row} |" for row in table), ""])


def print_comparison(done: Compared) -> None:
    """The end of `tamis compare --proxy`: what was run, a line an arm, where the files are."""
    out = console()
    out.print(text(done.setting))
    out.print()
    heads, *rows = cells(done.lines, done.measure)
    print_table(out, heads, rows, "l" + "n" * (len(heads) - 2) + "t")
    out.print()
    out.print(text(f"Table    {done.markdown}"))
    out.print(text(f"Numbers  {done.json}"))
