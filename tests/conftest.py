"""What tests share: real data where it is there, small corpora, one Ray a session, runs on either engine."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from pipeline.config import EngineConfig, parse
from pipeline.corpus.storage import _s3
from pipeline.engine.connect import connect
from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.run import Run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # actors import `toys`: Ray hands them the driver's path

settings.register_profile("tamis", deadline=None)  # a busy machine is not a wrong result
settings.load_profile("tamis")

RAY_CPUS = 6
"""Cores that Ray believes in, so that four workers and the lasting two run side by side on any machine."""

DEBIAN = ("openclipart/png", "openclipart/svg", "tuxpaint/stamps", "datasets/fashion-mnist")

RowsOf = Callable[[int, int], dict[str, Any]]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora that lie beside the repository on some machines."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        assert "TAMIS_REQUIRE_SHARED_DATA" not in os.environ, f"{path} is not there"  # CI must not skip these
        pytest.skip("no ../shared/data beside the repository")
    return path


@pytest.fixture(scope="session")
def debian_root() -> Path:
    """Where `make debian` has unpacked packages with real images, or `/`, where they may be installed."""
    for root in (ROOT / ".debian", Path("/")):
        if all((root / "usr/share" / part).is_dir() for part in DEBIAN):
            return root
    assert "TAMIS_REQUIRE_DEBIAN_DATA" not in os.environ, "make debian has unpacked nothing"
    pytest.skip("real images are not there: make debian")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of an S3 server on loopback; its URI. The environment has the address and the keys."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"tamis-{uuid.uuid4().hex}"  # servers of a process share their buckets
    boto3.client("s3").create_bucket(Bucket=name)
    yield f"s3://{name}"
    running.stop()
    _s3.cache_clear()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    import ray

    connect(EngineConfig(address="local", workers=RAY_CPUS))
    yield
    ray.shutdown()


@pytest.fixture
def ray_pool(ray_session: None) -> Iterator[Callable[..., RayPool]]:
    """`ray_pool(workers)` is a pool on the session's Ray; `timeout_s`, `retries` and `elastic` may follow."""
    pools: list[RayPool] = []

    def make(workers: int | None = 2, timeout_s: float = 60, retries: int = 3, elastic: bool = False) -> RayPool:
        pools.append(RayPool(workers, timeout_s, retries, elastic))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


class LastingPool(RayPool):
    """Keeps its actors from test to test: starting them is what takes the time."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def lasting_pool(ray_session: None) -> RayPool:
    return LastingPool(workers=2, timeout_s=60, retries=3, elastic=False)


@pytest.fixture(params=["inline", "ray"])
def any_pool(request: pytest.FixtureRequest) -> Callable[[], Pool]:
    """Makes a pool; the test runs on both engines."""
    if request.param == "inline":
        return InlinePool
    pool: RayPool = request.getfixturevalue("lasting_pool")
    return lambda: pool


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """`write_corpus(files=3, rows=20, groups=2)` writes `f00.parquet`, ... of `id` and `text`; returns the folder.

    `rows_of(file, rows)` gives other columns; each file has `groups` row groups.
    """

    def write(
        files: int = 3, rows: int = 20, groups: int = 2, name: str = "corpus", rows_of: RowsOf | None = None
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        for file in range(files):
            table = pa.table((rows_of or plain_rows)(file, rows))
            pq.write_table(table, directory / f"f{file:02d}.parquet", row_group_size=max(1, -(-rows // groups)))
        return directory

    return write


def plain_rows(file: int, rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(file)
    words = [" ".join(["word"] * n) for n in rng.integers(1, 30, rows)]
    return {"id": [f"{file}-{i}" for i in range(rows)], "text": [f"{w} {file} {i}" for i, w in enumerate(words)]}


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[..., Run]:
    """`with open_run(corpus) as run:` on the inline engine, or on what `pool` makes.

    Every row group is a shard of its own unless `corpus_options` says otherwise; `engine` sets keys of that name.
    """

    def make(
        corpus: Path | str,
        pool: Callable[[], Pool] = InlinePool,
        name: str = "run",
        corpus_options: dict[str, Any] | None = None,
        **engine: Any,
    ) -> Run:
        options = {"path": str(corpus), "shard_mb": 1e-6} | (corpus_options or {})
        config = parse(
            {
                "corpus": {k: v for k, v in options.items() if v is not None},
                "scores": ["random"],
                "select": {"budget": {"rows": 1}},
                "engine": {"address": "inline"} | engine,
                "run": name if "://" in name else str(tmp_path / name),
            }
        )
        return Run(config, pool, quiet=True)

    return make
