from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse
from pipeline.corpus.storage import Store
from pipeline.engine.pool import InlinePool
from pipeline.errors import TamisError
from pipeline.lock import STALE_S
from pipeline.report.status import holder, print_status
from pipeline.run import Run


def test_a_run_with_failures(hostile_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_status(str(hostile_run)) == 2
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(lines[0][:12]) == "Finished, but some of the corpus is left out: 60 rows in"
    assert lines[1] == ["200", "rows", "in", "4", "shards", "of", "2", "files"]
    assert next(line for line in lines if line[:1] == ["row"])[1:4] == ["4", "of", "4"]
    assert next(line for line in lines if line[:1] == ["row"])[-1] == "2"
    assert any(line[:2] == ["null", "text"] for line in lines)
    assert any("b<script>.parquet:" in line[0] for line in lines if line)


def test_a_run_at_work_and_one_broken_off(
    hostile_configuration: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse(hostile_configuration(tmp_path / "run"))
    with Run(config, InlinePool, quiet=True):
        assert print_status(str(tmp_path / "run")) == 0
        assert "At work for" in capsys.readouterr().out
        shutil.copytree(tmp_path / "run", tmp_path / "copy")  # nobody holds a lock on the copy
    assert print_status(str(tmp_path / "copy")) == 1
    assert "Broken off" in capsys.readouterr().out


def test_a_failed_run_says_why(
    hostile_configuration: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse(hostile_configuration(tmp_path / "run"))
    with pytest.raises(TamisError, match="too \x1b much"), Run(config, InlinePool, quiet=True):
        raise TamisError("too \x1b much")
    assert print_status(str(tmp_path / "run")) == 1
    assert "Failed: too ␛ much" in capsys.readouterr().out


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(TamisError, match=r"no manifest\.json"):
        print_status(str(tmp_path / "nowhere"))


def test_a_lock_of_beats_is_void_when_they_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an object store, or a file system without locks."""
    monkeypatch.setattr("pipeline.report.status._locked", lambda path: None)
    monkeypatch.setattr("time.time", lambda: 10_000.0)
    for age, held in ((1.0, True), (STALE_S + 1, False)):
        lock = {"host": "elsewhere", "pid": 1, "since": 0.0, "beat": 10_000.0 - age}
        (tmp_path / "lock.json").write_text(json.dumps(lock))
        assert (holder(Store(str(tmp_path))) is not None) == held
    (tmp_path / "lock.json").write_text("{half")
    assert holder(Store(str(tmp_path))) is None
