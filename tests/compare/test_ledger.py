"""The ledger and the plan: the specification's worked example row by row, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compare import flops
from pipeline.compare.flops import LayerShape, ModelShape
from pipeline.compare.ledger import EPOCHS, Arm, Charge, Ledger, break_even, plan, table
from pipeline.errors import ConfigError

C, T, POOL = 1e17, 512, 300_000_000
PARENT = ModelShape(576, 49152, (LayerShape(9, 3, 64, 1536, vectors=1152),) * 30, vectors=576)
STUDENT = PARENT.cut(heads=6, kv_heads=2, width=1152)
IMPORTANCE = 128 * 2048 * PARENT.forward(2048)
CHEAP = POOL * flops.FAST_FILTER[1]


def worked_example() -> list[Arm]:
    train = flops.full(STUDENT, T)
    student: dict[str, Any] = {"student": STUDENT.digest}
    return [
        Arm("A", flops.full(PARENT, T)),
        Arm("B", train, {"importance": IMPORTANCE}, **student),
        Arm("C n-gram", train, {"importance": IMPORTANCE, "scoring": CHEAP}, **student),
        Arm("C parent", train, {"importance": IMPORTANCE, "scoring": POOL * flops.scoring(T, PARENT)}, **student),
        Arm(
            "C paser", train, {"importance": IMPORTANCE, "scoring": POOL * flops.scoring(T, PARENT, STUDENT)}, **student
        ),
        Arm("D", flops.distillation(STUDENT, PARENT, T), {"importance": IMPORTANCE, "scoring": CHEAP}, **student),
        Arm("E", train, parent=False, **student),
        Arm("F", train, {"scoring": CHEAP}, parent=False, **student),
    ]


def test_the_worked_example_row_by_row() -> None:
    assert pytest.approx(1.08e14, rel=5e-3) == IMPORTANCE
    assert CHEAP == 6e11
    planned = plan(C, worked_example(), pool=POOL)
    expected = {  # fixed, per token, tokens in millions
        "A": (0, 9.131e8, 109.5),
        "B": (1.08e14, 7.051e8, 141.7),
        "C n-gram": (1.08e14, 7.051e8, 141.7),
        "C parent": (9.14e16, 7.051e8, 12.2),
        "C paser": (1.62e17, 7.051e8, 0),
        "D": (1.08e14, 1.0095e9, 98.9),
        "E": (0, 7.051e8, 141.8),
        "F": (6e11, 7.051e8, 141.8),
    }
    for line in planned.lines:
        fixed, per_token, tokens = expected[line.arm.name]
        assert line.arm.cost == pytest.approx(fixed, rel=7e-3)
        assert line.arm.per_token == pytest.approx(per_token, rel=2e-4)
        assert line.tokens / 1e6 == pytest.approx(tokens, abs=0.06)
        assert bool(line.refusal) == (line.arm.name == "C paser")
    scored = planned.lines[3]
    assert scored.scoring == pytest.approx(0.913, abs=1e-3)
    assert "91 % of the budget" in scored.warnings[0]
    with pytest.raises(ConfigError, match=r"C paser: 1\.62e\+17 FLOPs before training exceed .*1\.62e\+17 .*scoring"):
        planned.check()
    assert "| C parent | 9.14e+16 | 7.051e+08 | 12.2 M |" in planned.table()
    plan(C, [a for a in worked_example() if a.name != "C paser"], pool=POOL).check()


def test_break_even_factors() -> None:
    train = flops.full(STUDENT, T)
    assert break_even(PARENT.forward(T), train, 0.1) == pytest.approx(4.3, abs=0.05)
    assert break_even(PARENT.forward(T), train, 0.5) == pytest.approx(0.86, abs=0.005)
    assert break_even(2e7, train, 0.1) == pytest.approx(0.28, abs=0.005)
    assert break_even(flops.FAST_FILTER[1], train, 0.1) == pytest.approx(3e-5, rel=0.06)
    line = plan(C, worked_example(), pool=POOL).lines[3]
    assert line.break_even == pytest.approx(PARENT.forward(T) / train)
    assert break_even(PARENT.forward(T), train, line.break_even) == pytest.approx(1)


def test_three_readings() -> None:
    ledger = Ledger("C", reuse=4)
    ledger.charge("pretraining", 2e12, flops.full(PARENT, 2048) * 2e12, "the parent's 2 T tokens")
    ledger.charge("importance", 128 * 2048, 100.0)
    ledger.charge("scoring", 1000, 40.0, "perplexity of the pool")
    ledger.charge("deduplication", 1000, 7e6, "integer operations")
    ledger.charge("training", 500, 860.0)
    ledger.charge("final evaluation", 9, 5e5)
    assert ledger.spent() == 1000
    assert ledger.spent("amortised") == 970
    assert ledger.spent("full") == pytest.approx(2.46e21, rel=5e-3)
    assert ledger.tokens == 500
    assert ledger.invalid(1000) == ledger.invalid(1009) == ledger.invalid(991) == ""
    assert "C spent 1000 FLOPs of 1011: off by -1.1 %" in ledger.invalid(1011)
    again = Ledger.from_json(json.loads(json.dumps(ledger.as_json())))
    assert again == ledger
    assert ledger.as_json()["spent"] == {r: ledger.spent(r) for r in ("marginal", "full", "amortised")}


def test_tables_hold_what_names_hold() -> None:
    ledger = Ledger("a|b\n<script>")
    ledger.charge("training", 1, 2.0)
    shown = table([ledger])
    assert shown.splitlines()[0] == "| arm | tokens trained | training | marginal | full | amortised | R |"
    assert shown.splitlines()[2:] == ["| a\\|b &lt;script> | 1 | 2 | 2 | 2 | 2 | 1 |"]
    assert "&lt;script>" in plan(10.0, [Arm("<script>", 1.0)]).table()


@given(
    st.floats(1e3, 1e18),
    st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0, 2)), min_size=1, max_size=6),
    st.integers(1, 5000),
)
def test_arms_that_are_not_refused_spend_the_budget(budget: float, arms: list[Any], batch: int) -> None:
    made = [Arm(str(i), per_token, {"scoring": share * budget}) for i, (per_token, share) in enumerate(arms)]
    for line in plan(budget, made, batch_tokens=batch).lines:
        ledger = Ledger(line.arm.name)
        ledger.charge("scoring", 1, line.arm.cost)
        ledger.charge("training", line.tokens, line.tokens * line.arm.per_token)
        assert line.refusal or not ledger.invalid(budget)
        assert line.tokens % batch == 0
        assert (line.tokens == 0) == bool(line.refusal)


def test_epochs_are_counted_and_warned_of() -> None:
    few, many = plan(1000.0, [Arm("few", 1.0, data=200), Arm("many", 1.0, data=500)]).lines
    assert few.epochs == 5 > EPOCHS
    assert "5.0 epochs" in few.warnings[0]
    assert (many.epochs, many.warnings) == (2.0, ())


@pytest.mark.parametrize(
    ("arm", "batch", "says"),
    [
        (Arm("x", 1.0, {"importance": 2e3}), 1, "2e.03 FLOPs before training .* for importance"),
        (Arm("x", 1.0, {"importance": 900}), 512, "less than a batch of 512"),
        (Arm("x", 1.0), 300, "more than 1 % off: take smaller batches"),
        (Arm("x", 1.0, data=0), 1, "no data"),
    ],
)
def test_refusals(arm: Arm, batch: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(1000.0, [arm], batch_tokens=batch).check()


def test_errors_at_the_door() -> None:
    twins = [Arm("x", 1.0, student="a"), Arm("y", 1.0, student="b")]
    with pytest.raises(ConfigError, match="x and y train students of different shapes"):
        plan(1000.0, twins).check()
    with pytest.raises(ConfigError, match="name of its own"):
        plan(1000.0, [Arm("x", 1.0)] * 2)
    with pytest.raises(ConfigError, match="must be positive"):
        plan(0.0, [])
    with pytest.raises(ConfigError, match="x: training"):
        plan(1.0, [Arm("x", 0.0)])
    with pytest.raises(ValueError, match="one run at least"):
        Ledger("x", reuse=0)
    wrong: Any = "coffee"
    for kind, tokens, spent in ((wrong, 1, 1), ("training", -1, 1), ("training", 1, float("nan"))):
        with pytest.raises(ValueError, match=r"coffee|cannot be charged"):
            Charge(kind, tokens, spent)
