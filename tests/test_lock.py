"""One run a directory: refused while the holder lives, taken over once it is gone, whoever races."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.storage import Store
from pipeline.errors import RunLocked
from pipeline.lock import RunLock
from tests.waiting import wait_for

HOLD = """
import sys, time
from pipeline.corpus.storage import Store
from pipeline.lock import RunLock
RunLock(Store(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["kernel", "beats"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A directory locked by the kernel, and one where there are no locks, as on an object store."""
    if request.param == "beats":
        monkeypatch.setattr(RunLock, "_acquire_from_kernel", lambda self: False)
        monkeypatch.setattr("pipeline.lock.SETTLE_S", 0.05)
        monkeypatch.setattr("pipeline.lock.BEAT_S", 0.05)
    return Store(str(tmp_path / "run"))


def owner(store: Store) -> dict[str, Any]:
    return dict(json.loads(store.read("lock.json")))


def test_the_second_refuses_and_names_the_first(store: Store) -> None:
    first = RunLock(store)
    first.acquire()
    says = rf"another run works in .*/run: process {os.getpid()} on {socket.gethostname()}, since 20\d\d-.*--run"
    with pytest.raises(RunLocked, match=says):
        RunLock(store).acquire()
    first.check()
    first.release()
    assert store.files() == {}
    second = RunLock(store)
    second.acquire()
    assert owner(store)["session"] == second.session
    second.release()


def test_another_process_is_refused_and_a_killed_one_succeeded(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", HOLD, store.uri], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(RunLocked, match=f"process {process.pid} on"):
        RunLock(store).acquire()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert store.exists("lock.json")
    lock = RunLock(store)
    lock.acquire()
    assert owner(store)["pid"] == os.getpid()
    lock.release()


WINS = 10


def race(directory: str, start: Any, won: Any) -> None:
    store = Store(directory)
    start.wait()
    wins = 0
    while wins < WINS:
        lock = RunLock(store)
        try:
            lock.acquire()
        except RunLocked:
            continue
        wins += 1
        won.append((time.monotonic(), "in"))
        time.sleep(0.002)
        won.append((time.monotonic(), "out"))
        lock.release()


def test_of_many_that_race_one_at_a_time_has_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        start, won = manager.Event(), manager.list()
        racers = [context.Process(target=race, args=(str(tmp_path / "run"), start, won)) for _ in range(3)]
        for racer in racers:
            racer.start()
        start.set()
        for racer in racers:
            racer.join()
        steps = [step for _, step in sorted(won)]
        assert [racer.exitcode for racer in racers] == [0] * 3
    assert steps == ["in", "out"] * (3 * WINS)


# ---- where there are no locks


@pytest.mark.parametrize("store", ["beats"], indirect=True)
class TestBeats:
    def left_behind(self, store: Store, **changes: Any) -> None:
        lock = {"host": "elsewhere", "pid": 1, "session": "x", "since": time.time(), "beat": time.time()}
        store.write(json.dumps(lock | changes).encode(), "lock.json")

    def test_a_silent_lock_of_another_machine_is_void(self, store: Store) -> None:
        self.left_behind(store, beat=time.time() - 100)
        with pytest.raises(RunLocked, match="process 1 on elsewhere"):
            RunLock(store).acquire()
        self.left_behind(store, beat=time.time() - 130)
        lock = RunLock(store)
        lock.acquire()
        lock.release()

    def test_a_lock_of_a_dead_process_of_this_machine_is_void_at_once(self, store: Store) -> None:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        self.left_behind(store, host=socket.gethostname(), pid=dead.pid)
        lock = RunLock(store)
        lock.acquire()
        lock.release()

    def test_a_lock_of_an_earlier_process_with_our_number_is_void(self, store: Store) -> None:
        self.left_behind(store, host=socket.gethostname(), pid=os.getpid())
        lock = RunLock(store)
        lock.acquire()
        lock.release()

    def test_the_lock_is_renewed(self, store: Store) -> None:
        lock = RunLock(store)
        lock.acquire()
        first = owner(store)["beat"]
        wait_for(lambda: owner(store)["beat"] > first)
        lock.release()
        time.sleep(0.2)
        assert not store.exists("lock.json")  # no beat comes after the end

    def test_of_two_that_begin_at_once_the_last_to_write_wins(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def meanwhile(seconds: float) -> None:
            self.left_behind(store, session="the other")

        monkeypatch.setattr("pipeline.lock.time.sleep", meanwhile)
        with pytest.raises(RunLocked, match="process 1 on elsewhere"):
            RunLock(store).acquire()
        assert owner(store)["session"] == "the other"

    def test_who_was_overtaken_stops(self, store: Store) -> None:
        lock = RunLock(store)
        lock.acquire()
        lock.check()
        self.left_behind(store, session="the other")
        wait_for(lambda: lock._lost is not None)
        with pytest.raises(RunLocked, match="process 1 on elsewhere"):
            lock.check()
        lock.release()
        assert owner(store)["session"] == "the other"  # which is not ours to remove


def test_a_run_that_was_overtaken_stops(write_corpus: Any, open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import toys

    monkeypatch.setattr(RunLock, "_acquire_from_kernel", lambda self: False)
    monkeypatch.setattr("pipeline.lock.SETTLE_S", 0.05)
    monkeypatch.setattr("pipeline.lock.BEAT_S", 0.05)
    thief = {"host": "elsewhere", "pid": 7, "session": "y", "since": time.time(), "beat": time.time()}
    with open_run(write_corpus()) as run:
        run.store.write(json.dumps(thief).encode(), "lock.json")
        with pytest.raises(RunLocked, match="process 7 on elsewhere"):
            run.materialize([toys.column("len", toys.slow, 0.1)])
    assert owner(run.store)["session"] == "y"


def test_two_runs_on_one_directory(write_corpus: Any, open_run: Any) -> None:
    corpus = write_corpus()
    with open_run(corpus), pytest.raises(RunLocked, match="another run works in"), open_run(corpus):
        pass
    with open_run(corpus):
        pass
