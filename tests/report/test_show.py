from __future__ import annotations

import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import TamisError
from pipeline.report.format import HARMLESS, UNSAFE
from pipeline.report.show import print_rows


def column(run: Path, name: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(p) for p in sorted((run / "columns" / name).iterdir())])


def printed(capsys: pytest.CaptureFixture[str], run: Path, **options: Any) -> list[str]:
    """What is printed, a block a row."""
    print_rows(str(run), **options)
    return [b for b in capsys.readouterr().out.split("\n\n") if b.strip()]


def addresses(blocks: list[str]) -> list[str]:
    return [re.findall(r"parquet:\d+:\d+", b)[0] for b in blocks]


@pytest.mark.parametrize("lowest", [False, True])
def test_by_a_score_the_best_come_first(hostile_run: Path, capsys: pytest.CaptureFixture[str], lowest: bool) -> None:
    blocks = printed(capsys, hostile_run, kept=False, by="dice", lowest=lowest, count=7)
    scores, keep = column(hostile_run, "dice")["score"], column(hostile_run, "select")["keep"]
    dropped = [s for s, k in zip(scores.to_pylist(), keep.to_pylist(), strict=True) if s is not None and not k]
    expected = sorted(dropped, reverse=not lowest)[:7]
    shown = [float(re.findall(r"dice ([\d.e-]+)", b)[0]) for b in blocks]
    assert shown == pytest.approx(expected, rel=1e-3)


def test_random_rows_are_the_same_every_time_and_a_larger_draw_holds_the_smaller(
    hostile_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    five, again, ten = (addresses(printed(capsys, hostile_run, kept=True, count=n)) for n in (5, 5, 10))
    assert five == again == ten[:5]
    assert len(set(ten)) == 10


def test_every_row_is_kept_or_dropped_and_quarantine_is_dropped(
    hostile_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, dropped = (printed(capsys, hostile_run, kept=k, count=1000) for k in (True, False))
    assert (len(kept), len(dropped)) == (60, 140)
    assert len({*addresses(kept), *addresses(dropped)}) == 200
    assert all(" kept" in b.splitlines()[0] for b in kept)
    assert sorted(w for b in dropped for w in re.findall(r"quarantined: (.*)", b.splitlines()[0])) == [
        "blank text",
        "null text",
    ]


def test_nothing_of_the_corpus_acts_on_the_terminal(hostile_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(str(hostile_run), kept=False, count=1000)
    out = capsys.readouterr().out
    assert not [c for c in out if unicodedata.category(c) in UNSAFE and c not in HARMLESS and c != "\n"]
    for literal in (
        "[bold red]markup[/] :smile: [link=http://evil]here[/link]",
        "␛[31mred",
        "<script>alert(1)</script>",
    ):
        assert literal in out


def test_mistakes_are_named(hostile_run: Path, tmp_path: Path) -> None:
    with pytest.raises(TamisError, match=r"--by nope: .* there are length, dice"):
        print_rows(str(hostile_run), by="nope")
    with pytest.raises(TamisError, match="is not a run directory"):
        print_rows(str(tmp_path))
    for name in ("manifest.json", "corpus"):
        copy: Any = shutil.copytree if (hostile_run / name).is_dir() else shutil.copy
        copy(hostile_run / name, tmp_path / name)
    with pytest.raises(TamisError, match="nothing is selected yet"):
        print_rows(str(tmp_path))
    shutil.rmtree(tmp_path / "corpus")
    shutil.copytree(hostile_run / "columns", tmp_path / "columns")
    with pytest.raises(TamisError, match="has not listed its corpus"):
        print_rows(str(tmp_path))
