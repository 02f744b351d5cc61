"""The pool by itself: outcomes, retries, workers that die, hang or never start."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import threads
from pipeline.engine.pool import Outcome, Pool, RayPool
from pipeline.errors import ConfigError, DiskFull, MissingExtra, TamisError
from pipeline.recipe import Resources


def outcomes(pool: Pool, task: Any, units: list[Any], **resources: Any) -> list[Outcome]:
    return sorted(pool.map(task, units, Resources(**resources)), key=lambda o: o.index)


def square(unit: int, attempt: int) -> dict[str, Any]:
    return {"value": unit * unit, "attempt": attempt}


@pytest.fixture
def pool(any_pool: Callable[[], Pool], monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr("pipeline.engine.pool.PAUSE_S", 0.0)
    return any_pool()


def test_every_unit_has_its_outcome(pool: Pool) -> None:
    found = outcomes(pool, square, list(range(30)))
    assert [o.result["value"] for o in found] == [i * i for i in range(30)]
    assert all(o.error is None and o.attempts == 1 for o in found)
    assert outcomes(pool, square, []) == []


class Failing:
    def __init__(self, error: Exception, times: int, notes: Path) -> None:
        self.error, self.times, self.notes = error, times, notes

    def __call__(self, unit: int, attempt: int) -> dict[str, Any]:
        with self.notes.open("a") as file:
            file.write(f"{unit}:{attempt} ")
        if unit == 1 and attempt < self.times:
            raise MissingExtra(*self.error) if isinstance(self.error, tuple) else self.error
        return {"rows": unit}


@pytest.mark.parametrize("error", [OSError("reset by peer"), ConnectionError("gone"), MemoryError("too much")])
def test_what_may_pass_is_tried_again(pool: Pool, error: Exception, tmp_path: Path) -> None:
    found = outcomes(pool, Failing(error, 2, tmp_path / "notes"), [0, 1, 2])
    assert [(o.result, o.error, o.attempts) for o in found] == [
        ({"rows": 0}, None, 1),
        ({"rows": 1}, None, 3),
        ({"rows": 2}, None, 1),
    ]


def test_what_does_not_pass_is_given_up(pool: Pool, tmp_path: Path) -> None:
    found = outcomes(pool, Failing(OSError("still down"), 99, tmp_path / "notes"), [0, 1, 2])
    assert [o.result for o in found] == [{"rows": 0}, {}, {"rows": 2}]
    assert found[1].error is not None
    assert found[1].error.startswith("OSError: still down (at test_pool.py:")
    assert found[1].attempts == 4


@pytest.mark.parametrize("error", [ValueError("wrong"), TamisError("says what to do")])
def test_a_defect_is_not_tried_again(pool: Pool, error: Exception, tmp_path: Path) -> None:
    found = outcomes(pool, Failing(error, 99, tmp_path / "notes"), [1])
    assert (tmp_path / "notes").read_text() == "1:0 "
    says = "says what to do" if isinstance(error, TamisError) else "ValueError: wrong (at test_pool.py:"
    assert found[0].error is not None
    assert found[0].error.startswith(says)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ConfigError("mend it"), ConfigError, "^mend it$"),
        (("seeing", "vision", "open_clip"), MissingExtra, r"pip install 'tamis\[vision\]'"),
        (OSError(28, "No space left on device"), DiskFull, "no space is left where the run writes: .*No space"),
    ],
)
def test_what_no_unit_is_to_blame_for_ends_the_pass(
    pool: Pool, error: Exception, kind: type[TamisError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says):
        outcomes(pool, Failing(error, 99, tmp_path / "notes"), [0, 1, 2])
    assert len(outcomes(pool, square, [1, 2, 3])) == 3  # and the pool is as good as before


def dying(unit: int, attempt: int) -> dict[str, Any]:
    if unit % 4 == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"pid": os.getpid()}


def test_workers_that_die_are_replaced(lasting_pool: RayPool) -> None:
    before = lasting_pool.lost
    found = outcomes(lasting_pool, dying, [0, 1, 2, 3])
    assert [o.error is None for o in found] == [True, False, True, True]
    assert found[1].error is not None
    assert found[1].error.startswith("worker lost: ")
    assert "\n" not in found[1].error
    assert found[1].attempts == 4
    assert lasting_pool.lost - before == 4
    assert len(outcomes(lasting_pool, square, list(range(10)))) == 10


def late(unit: int, attempt: int) -> dict[str, Any]:
    if unit == 0:
        time.sleep(60)
    return {}


def test_a_unit_that_is_always_late_is_given_up(ray_pool: Callable[..., RayPool]) -> None:
    pool = ray_pool(2, timeout_s=5, retries=1)
    started = time.monotonic()
    found = outcomes(pool, late, [0, 1, 2, 3])
    assert [o.error for o in found] == ["no result within 5 s", None, None, None]
    assert found[0].attempts == 2
    assert time.monotonic() - started < 40


class Model:
    """A task that loads something when it comes to a worker."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.loaded = False

    def __call__(self, unit: int, attempt: int) -> dict[str, Any]:
        if not self.loaded:
            with self.log.open("a") as file:
                file.write("loaded\n")
            self.loaded = True
        return {}


def test_an_actor_loads_its_model_once_a_pass(lasting_pool: RayPool, tmp_path: Path) -> None:
    for passes in (1, 2):
        outcomes(lasting_pool, Model(tmp_path / "log"), list(range(20)))
        assert passes <= len((tmp_path / "log").read_text().split()) <= 2 * passes


def limits(unit: int, attempt: int) -> dict[str, Any]:
    import pyarrow as pa
    from threadpoolctl import threadpool_info

    pools = [p["num_threads"] for p in threadpool_info()]
    return {"cpus": threads.cpus(), "arrow": pa.cpu_count(), "most": max(pools, default=1)}


def test_threads_follow_the_cpus(any_pool: Callable[[], Pool], request: pytest.FixtureRequest) -> None:
    import pyarrow as pa

    before = threads.cpus(), pa.cpu_count()
    pool = any_pool()
    for cpus in (2, 1):
        (found,) = outcomes(pool, limits, [0], cpus=cpus)
        assert found.result == {"cpus": cpus, "arrow": cpus, "most": cpus}
    assert (threads.cpus(), pa.cpu_count()) == before


def test_an_actor_that_cannot_fit_is_an_error_at_once(ray_pool: Callable[..., RayPool]) -> None:
    with pytest.raises(TamisError, match=r"A worker wants 64 cpus; the cluster has 6 cpus .*Lower engine.cpus"):
        outcomes(ray_pool(2), square, [1], cpus=64)
    with pytest.raises(TamisError, match=r"A worker wants 1 cpus, 1 gpus; the cluster has 6 cpus .*, 0 gpus"):
        outcomes(ray_pool(2), square, [1], gpus=1)
    with pytest.raises(TamisError, match=r"1 cpus, 9000 GiB"):
        outcomes(ray_pool(None), square, [1], memory=9000 << 30)


def test_where_the_cluster_may_grow_one_waits_and_says_so(
    ray_pool: Callable[..., RayPool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.engine.pool.CHECK_S", 0.2)
    monkeypatch.setattr("pipeline.engine.pool.REPORT_S", 0.3)
    monkeypatch.setattr("pipeline.engine.pool.PATIENCE_S", 0.0)
    with pytest.raises(TamisError, match=r"no worker has started within 2 s. A worker wants 64 cpus"):
        outcomes(ray_pool(1, timeout_s=1.5, elastic=True), square, [1], cpus=64)
    assert "no worker has started for" in caplog.text


def test_workers_that_do_not_start_are_an_error(
    ray_pool: Callable[..., RayPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.pool._Worker", Stillborn)
    with pytest.raises(TamisError, match=r"workers do not start: .*no such library"):
        outcomes(ray_pool(1), square, [1])


class Stillborn:
    def __init__(self, *arguments: Any) -> None:
        raise ImportError("no such library")

    def ready(self) -> None: ...


class Unloadable:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise ModuleNotFoundError("No module named 'mine'")


def test_a_task_that_no_worker_can_load_is_an_error(lasting_pool: RayPool) -> None:
    with pytest.raises(ConfigError, match=r"a worker cannot load its task: .*No module named 'mine'$"):
        outcomes(lasting_pool, Unloadable(), [1])


def environment(unit: str, attempt: int) -> dict[str, Any]:
    return {"value": os.environ.get(unit)}


def test_an_actor_inherits_where_and_as_whom_to_read(
    ray_pool: Callable[..., RayPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_TEST", "http://127.0.0.1:1")
    monkeypatch.setenv("SOMETHING_ELSE", "x")
    found = outcomes(ray_pool(1), environment, ["AWS_ENDPOINT_URL_TEST", "SOMETHING_ELSE"])
    assert [o.result["value"] for o in found] == ["http://127.0.0.1:1", None]


def test_a_pass_that_is_left_is_cleaned_up(lasting_pool: RayPool) -> None:
    pass_ = lasting_pool.map(late, [0, 1, 2, 3])
    next(pass_)
    pass_.close()
    assert len(outcomes(lasting_pool, square, list(range(10)))) == 10
