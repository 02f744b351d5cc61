"""Where the engine comes from and goes: in the background, once, and not beyond the run."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import EngineConfig, parse
from pipeline.corpus.rows import row_column
from pipeline.engine.connect import connect
from pipeline.engine.pool import InlinePool, Pool
from pipeline.errors import ConfigError, TamisError
from pipeline.run import Run

SAMPLE = Path(__file__).parents[2] / "examples" / "sample"


class Watched(InlinePool):
    """An engine that says when it was let go, and in which thread."""

    closed = ""

    def close(self) -> None:
        self.closed = threading.current_thread().name


def run_with(directory: Path, make: Callable[[], Pool]) -> Run:
    config = {"corpus": {"path": str(SAMPLE)}, "scores": ["random"], "select": {"budget": {"rows": 1}}}
    return Run(parse(config | {"run": str(directory)}), make, quiet=True)


def test_the_driver_goes_on_while_the_engine_starts_and_starts_it_once(tmp_path: Path) -> None:
    made: list[Watched] = []
    go = threading.Event()

    def slow() -> Pool:
        assert go.wait(60)
        made.append(Watched())
        return made[-1]

    with run_with(tmp_path / "run", slow) as run:
        run.warm_up()
        run.warm_up()
        assert not made
        go.set()
        run.materialize([row_column(False, None)])
        assert len(made) == 1
        assert not made[0].closed
    assert made[0].closed
    assert made[0].closed != threading.current_thread().name


def test_what_is_already_computed_needs_no_engine(tmp_path: Path) -> None:
    column = row_column(False, None)
    with run_with(tmp_path / "run", InlinePool) as run:
        assert run.stale(column)
        run.materialize([column])
        assert not run.stale(column)
    with run_with(tmp_path / "run", lambda: pytest.fail("no engine is needed")) as run:
        run.materialize([column])


def test_a_heavy_pass_after_the_release_connects_again(tmp_path: Path) -> None:
    made: list[Watched] = []
    with run_with(tmp_path / "run", lambda: made.append(Watched()) or made[-1]) as run:
        run.warm_up()
        run.release()
        run.materialize([row_column(False, None)])
        assert len(made) == 2
        assert made[0].closed
        assert not made[1].closed
    assert made[1].closed


@pytest.mark.parametrize("used", [True, False])
def test_an_engine_that_does_not_start_is_an_error_of_the_pass_that_needs_it(tmp_path: Path, used: bool) -> None:
    def broken() -> Pool:
        raise TamisError("cannot connect to Ray")

    with run_with(tmp_path / "run", broken) as run:
        run.warm_up()
        if used:
            with pytest.raises(TamisError, match="cannot connect to Ray"):
                run.materialize([row_column(False, None)])


def test_an_engine_that_starts_for_nothing_is_let_go_when_the_run_fails(tmp_path: Path) -> None:
    pool = Watched()

    def fail() -> None:
        with run_with(tmp_path / "run", lambda: pool) as run:
            run.warm_up()
            raise ValueError("meanwhile")

    with pytest.raises(ValueError, match="meanwhile"):
        fail()
    assert pool.closed


def test_the_client_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="ray:// is not used"):
        connect(EngineConfig(address="ray://head:10001"))


PROGRAM = """
import sys
from pathlib import Path
from pipeline import curate
config = {"corpus": {"path": sys.argv[1], "id": "id"}, "scores": ["random"], "select": {"budget": {"rows": 100}},
          "engine": {"workers": 1}, "run": sys.argv[2]}
if __name__ == "__main__":
    assert curate(config, quiet=True).rows_kept == 100
    import ray
    assert not ray.is_initialized()
"""


def test_a_ray_of_our_own_ends_with_the_run_and_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(SAMPLE), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
