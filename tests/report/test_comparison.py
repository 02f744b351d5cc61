"""The page of a comparison: what it says of arms that speak other tokens, of zeros and of cost; nothing acts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.compare.ledger import Arm, Ledger, plan
from pipeline.compare.results import ArmResult, Measure, Results
from pipeline.report.comparison import write_page

HOSTILE = "runs/<script>alert(1)</script>"


def arm(name: str, kl: float | None, zeros: float, **cost: float) -> ArmResult:
    bits = Measure("bits_per_byte.pool", "language", False, np.array([[1.5, 2.5], [1.0, 2.0]]))
    return ArmResult(
        name, f"about {name}", {bits.name: bits}, kl, {}, [(0.5, 3.0), (1.0, 2.0)], 4.2e4, 1000, zeros, cost
    )


def results(directory: Path) -> Results:
    planned = plan(1e6, [Arm("A", 10.0), Arm("B", 5.0, note="masks save no FLOPs: charged as dense")])
    found = Results({"curated": HOSTILE, "seeds": 2}, 1e6, planned, str(directory))
    found.arms = {
        "A": arm("A", 0.25, 0.0, **{"prefill@1": 1234.0, "decode@1": 0.5, "peak_memory": 300.0, "file_size": 12.5}),
        "B": arm("B", None, 0.333, file_size=6.25),
    }
    for name in found.arms:
        ledger = Ledger(name)
        ledger.charge("training", 1e5, 6e5, "6 FLOPs a token")
        ledger.charge("training", 1e5, 4e5, "4 FLOPs a token")
        found.ledgers[name] = ledger
    return found


def test_the_page_says_what_an_arm_costs_and_what_it_has_not(tmp_path: Path) -> None:
    write_page(results(tmp_path))
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "masks save no FLOPs: charged as dense" in page
    for head in ("prefill@1, tokens/s", "decode@1, ms a token", "peak_memory, MB", "file_size, MB", "of them 0"):
        assert f">{head}</th>" in page
    assert ">33.3 %</td>" in page
    assert page.count(">0.2500</td>") == 1  # B speaks other tokens: no distance, and none that is made up
    assert ">200,000</td>" in page  # two shapes, one training


def test_tables_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    found = results(tmp_path)
    heads, lines = found.used()
    assert dict(zip(heads[2:], lines[1][2:], strict=True)) == {
        "parameters": "1,000", "of them 0": "33.3 %", "FLOPs a token": "42.0 k", "prefill@1, tokens/s": "",
        "decode@1, ms a token": "", "peak_memory, MB": "", "file_size, MB": "6.25",
    }  # fmt: skip
    assert [line[-1] for line in found.language()[1]] == ["0.2500", ""]
    assert found.as_json()["arms"]["B"]["cost"] == {"file_size": 6.25}
    assert "**Cost of use**" in found.markdown()
