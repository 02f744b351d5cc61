"""Files appear whole or not at all, locally and through fsspec; tests/test_s3.py does the same on an object store."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

import pytest

from pipeline.corpus.storage import Store, is_disk_full, is_remote, resolve


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A local directory, and a file system that Arrow knows through fsspec alone."""
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_write_list_read_remove(store: Store) -> None:
    store.write(b"one", "a", "b", "1.txt")
    store.write(b"three", "a", "2.txt")
    store.write(b"", "a", "empty.gz")  # a name is no instruction to compress
    assert store.files("a") == {"2.txt": 5, "empty.gz": 0}
    assert store.files("a", recursive=True) == {"2.txt": 5, "b/1.txt": 3, "empty.gz": 0}
    assert store.read("a", "b", "1.txt") == b"one"
    assert store.exists("a", "b")
    store.write(b"two", "a", "b", "1.txt")
    assert store.read("a", "b", "1.txt") == b"two"
    store.remove("a", "2.txt")
    store.remove("a", "2.txt")
    store.remove("a", "b")
    assert store.files("a", recursive=True) == {"empty.gz": 0}
    assert store.files("nothing") == {}
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_a_writer_that_fails_leaves_what_was(store: Store) -> None:
    store.write(b"before", "x")
    with pytest.raises(ZeroDivisionError), store.sink("x") as sink:
        sink.write(b"half" + bytes(1 // 0))
    assert store.read("x") == b"before"
    assert store.files() == {"x": 6}


def test_nothing_is_seen_before_the_end(store: Store) -> None:
    with store.sink("x") as sink:
        sink.write(b"a" * 10_000_000)
        assert not store.exists("x")
        assert store.files() == {}
    assert store.files() == {"x": 10_000_000}


def test_what_killed_writers_leave_is_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("columns/len/part-00001.parquet.0a1b2c3d.tmp", "notes.tmp", "columns/len/part-00001.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert set(store.files(recursive=True)) == {"notes.tmp", "columns/len/part-00001.parquet"}
    store.remove_temporaries()
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"notes.tmp", "part-00001.parquet"}
    Store("memory://x").remove_temporaries()


def test_places_and_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("runs/a/").at("x", "y") == str(tmp_path / "runs/a/x/y")
    assert Store("runs/a/").locate("x") == "runs/a/x"
    assert Store(f"file://{tmp_path}").path == str(tmp_path)
    assert Store("s3://b/run/").locate("x") == "s3://b/run/x"
    assert Store("a").child("b", "c") == Store("a/b/c")
    assert [is_remote(u) for u in ("a", "/a", "file:///a", "s3://a", "hf://datasets/a", "gs://a")] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]


def test_a_hub_address_needs_no_network_to_be_understood() -> None:
    filesystem, path = resolve("hf://datasets/owner/name/data/*.parquet")
    assert path == "datasets/owner/name/data/*.parquet"
    assert "hffs" in filesystem.type_name or "py::fsspec" in filesystem.type_name


def test_an_unknown_scheme_says_so() -> None:
    with pytest.raises(ValueError, match=r"cannot open 'nosuch://x'.*Arrow says"):
        resolve("nosuch://x")


def test_a_full_disk_is_told_from_other_errors() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert is_disk_full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    assert is_disk_full(OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"))
    assert not is_disk_full(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert not is_disk_full(ValueError("No space left on device"))


def test_a_device_without_room() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with (
        pytest.raises(OSError, match="No space left") as caught,
        resolve("/dev/full")[0].open_output_stream("/dev/full") as sink,
    ):
        sink.write(b"x")
    assert is_disk_full(caught.value)
