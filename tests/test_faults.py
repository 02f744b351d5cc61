"""Faults from outside: a driver killed in the middle, a full disk, a user who stops, Ray that goes away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toys

from pipeline.corpus.rows import row_column
from pipeline.corpus.storage import Store, is_disk_full
from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.errors import DiskFull
from tests.waiting import wait_for

DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
import toys
from functools import partial
from pipeline.config import parse
from pipeline.engine.connect import connect
from pipeline.run import Run

config = parse({
    "corpus": {"path": sys.argv[2], "shard_mb": 1e-6},
    "scores": ["random"],
    "select": {"budget": {"rows": 1}},
    "engine": {"address": sys.argv[4], "workers": 2},
    "run": sys.argv[3],
})
with Run(config, partial(connect, config.engine), quiet=True) as run:
    run.materialize([toys.column("len", toys.slow, 0.05)])
    print("computed", run.manifest["columns"]["len"]["computed"], flush=True)
"""


def start(corpus: Path, run: Path, address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(Path(toys.__file__).parent), str(corpus), str(run), address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"RAY_ADDRESS": ""})


def children(pid: int) -> set[int]:
    """Processes that a process has started, and theirs."""
    found = set[int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found |= {number} | children(number)
    return found


def command_of(pid: int) -> str:
    """Command line of a process; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("address", ["inline", "local"])
def test_a_killed_driver_leaves_what_it_did(write_corpus: Any, open_run: Any, tmp_path: Path, address: str) -> None:
    corpus, run = write_corpus(files=5, rows=16, groups=8), tmp_path / "killed"
    process = start(corpus, run, address)
    parts = run / "columns" / "len"
    wait_for(lambda: parts.is_dir() and len(list(parts.glob("*.parquet"))) >= 5)
    workers = {pid for pid in children(process.pid) if "_Worker" in command_of(pid)}
    assert len(workers) == (2 if address == "local" else 0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any("_Worker" in command_of(pid) for pid in workers))  # none outlives its driver
    whole = {p.name: p.read_bytes() for p in parts.glob("*.parquet")}
    assert 5 <= len(whole) < 40
    with open_run(corpus, name="undisturbed") as undisturbed:
        undisturbed.materialize([toys.column("len", toys.slow, 0.05)])
    with open_run(corpus, name="killed") as again:
        again.materialize([toys.column("len", toys.slow, 0.05)])
        assert again.manifest["columns"]["len"]["computed"] == 40 - len(whole)
        again.finish()
    found = {p.name: p.read_bytes() for p in parts.iterdir() if not p.name.endswith(".tmp")}
    assert whole.items() <= found.items()
    assert found == {p.name: p.read_bytes() for p in Path(undisturbed.store.path, "columns/len").iterdir()}


def test_a_user_who_stops_can_go_on(write_corpus: Any, tmp_path: Path) -> None:
    corpus, run = write_corpus(files=5, rows=16, groups=8), tmp_path / "stopped"
    process = start(corpus, run, "inline")
    wait_for(lambda: (run / "columns/len/part-00002.parquet").exists())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert '"status": "failed"' in (run / "manifest.json").read_text()
    assert not (run / "lock.json").exists()
    again = start(corpus, run, "inline")
    out, _ = again.communicate(timeout=120)
    assert 0 < int(out.split()[1]) < 38


def test_a_pass_that_is_interrupted_leaves_no_actor(
    write_corpus: Any, open_run: Any, ray_pool: Callable[..., RayPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(files=4, rows=16, groups=4)
    before = actors()
    seen = []

    def interrupt(*_: Any) -> None:
        seen.append(actors() - before)
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.engine.progress.Progress.add", interrupt)
    with pytest.raises(KeyboardInterrupt), open_run(corpus, lambda: ray_pool(2)) as run:
        run.materialize([toys.column("len", toys.slow, 0.2)])
    assert seen[0]
    wait_for(lambda: actors() <= before, 30)


def actors() -> set[str]:
    import ray

    return {a for a, state in ray._private.state.actors().items() if state["State"] == "ALIVE"}


# ---- no disk space


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    mount = subprocess.run(command, capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    write_corpus: Any, open_run: Any, small_disk: Path, any_pool: Callable[[], Pool]
) -> None:
    corpus = write_corpus(files=5, rows=16, groups=8)
    filler = small_disk / "filler"
    columns = [row_column(False, None), toys.column("len", toys.length)]
    with open_run(corpus, any_pool, name=str(small_disk / "run")) as run:
        filler.write_bytes(b"x" * 900_000)
        with pytest.raises(DiskFull, match=r"no space is left where the run writes: .*No space left on device"):
            run.materialize(columns)
    filler.unlink()
    with open_run(corpus, any_pool, name=str(small_disk / "run")) as run:
        done = len(list((small_disk / "run/columns/row").glob("*.parquet")))  # by now the killed workers are gone
        assert 0 < done < 40
        run.materialize(columns)
        assert run.manifest["columns"]["row"]["computed"] == 40 - done
    assert not list(small_disk.rglob("*.tmp"))


def test_a_full_disk_does_not_hide_behind_the_manifest(write_corpus: Any, open_run: Any, small_disk: Path) -> None:
    def end(run: Any) -> None:
        with run:
            (small_disk / "filler").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * 4096))
            run.materialize([row_column(False, None)])

    with pytest.raises(DiskFull):
        end(open_run(write_corpus(files=20), name=str(small_disk / "run")))
    assert not (small_disk / "run" / "lock.json").exists()


def test_a_write_that_finds_no_room_leaves_nothing(small_disk: Path) -> None:
    store = Store(str(small_disk))
    with pytest.raises(OSError, match="No space left") as caught:
        store.write(b"x" * 2_000_000, "columns", "x", "part")
    assert caught.value.errno == errno.ENOSPC
    assert is_disk_full(caught.value)
    assert store.files("columns", recursive=True) == {}
    assert [p for p in small_disk.rglob("*") if p.is_file()] == []


# ---- Ray itself


def test_two_curations_in_one_process(write_corpus: Any, open_run: Any, ray_pool: Callable[..., RayPool]) -> None:
    corpus = write_corpus()
    found = []
    for name in ("one", "two"):
        with open_run(corpus, lambda: ray_pool(2), name=name) as run:
            run.materialize([toys.column("len", toys.length)])
            found.append([p.read_bytes() for p in sorted(Path(run.store.path, "columns/len").iterdir())])
    assert found[0] == found[1]
    with open_run(corpus, InlinePool, name="one") as run:
        run.materialize([toys.column("len", toys.length)])
        assert run.manifest["columns"]["len"]["computed"] == 0
