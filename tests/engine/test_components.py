"""Connected components against scipy's over the whole graph, on either engine, however the work is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.engine.components import ContractTask, contract, distinct, pack
from pipeline.engine.pool import Pool
from pipeline.engine.regroup import unopened
from pipeline.errors import TamisError
from pipeline.recipe import Column, Transform
from pipeline.run import Run

KEYS = 3
COMPONENT = pa.schema([("component", pa.int64())])


def given_keys() -> Transform:
    """The `KEYS` keys of a row, which its text holds."""

    def read(batch: pa.RecordBatch) -> pa.RecordBatch:
        keys = np.array([text.split() for text in batch.column("text").to_pylist()], np.uint64)
        return pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(keys.ravel()), KEYS)], ["keys"])

    return read


def keys_column() -> Column:
    return Column("k", ("text",), pa.schema([("keys", pa.list_(pa.uint64(), KEYS))]), given_keys, "1")


def component_column(identity: str = "1") -> Column:
    return Column("linked", (), COMPONENT, unopened, identity)


def write(path: Path, keys: np.ndarray, group: int = 10) -> Path:
    texts = [" ".join(map(str, row)) for row in keys.tolist()]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group)
    return path


def expected(keys: np.ndarray, group: int = 10) -> list[int]:
    """Address of the first row of every row's component, by scipy over the graph of rows and keys."""
    n = len(keys)
    _, number = np.unique(keys, return_inverse=True)
    rows = np.repeat(np.arange(n), keys.shape[1])
    size = n + int(number.max()) + 1
    graph = coo_array((np.ones(len(rows)), (rows, n + number.ravel())), (size, size))
    label = connected_components(graph, directed=False)[1][:n]
    first = [int(np.flatnonzero(label == own)[0]) for own in label]
    return pack(np.array(first) // group, np.array(first) % group).tolist()


def stored(run: Run) -> list[int | None]:
    parts = sorted(Path(run.store.path, "columns", "linked").glob("*.parquet"))
    return [v for part in parts for v in pq.read_table(part)["component"].to_pylist()]


def path_of(n: int, seed: int = 0) -> np.ndarray:
    """Keys that join n rows to one path in a random order, and a key of its own for every row."""
    place = np.random.default_rng(seed).permutation(n).astype(np.uint64)
    return np.stack([place, place + np.uint64(1), place + np.uint64(10**6)], axis=1)


GRAPHS = {
    "path": path_of(60),
    "one key for all": np.stack([np.zeros(40, np.uint64), *np.arange(80, dtype=np.uint64).reshape(2, 40) + 1], axis=1),
    "all alone": np.arange(120, dtype=np.uint64).reshape(40, 3),
    "random": np.random.default_rng(1).integers(0, 200, (70, 3)).astype(np.uint64),
    "huge keys": np.random.default_rng(2).integers(0, 150, (70, 3)).astype(np.uint64) + np.uint64(2**64 - 200),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("partition_bytes", "block_bytes"), [(1 << 27, 1 << 28), (200, 1000), (100, 1)])
def test_components_are_those_of_scipy(
    tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch, name: str, partition_bytes: int, block_bytes: int
) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", partition_bytes)
    monkeypatch.setattr("pipeline.engine.regroup.BLOCK_BYTES", block_bytes)
    keys = GRAPHS[name]
    with open_run(write(tmp_path / "c.parquet", keys)) as run:
        run.materialize([keys_column()])
        run.connect_rows(component_column(), "k.keys")
        assert stored(run) == expected(keys)
        assert not Path(run.store.path, "scratch", "regroup", "linked").exists()


def test_workers_give_the_same_parts(
    tmp_path: Path, open_run: Any, any_pool: Callable[[], Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", 400)
    keys = path_of(50)
    with open_run(write(tmp_path / "c.parquet", keys), any_pool) as run:
        run.materialize([keys_column()])
        run.connect_rows(component_column(), "k.keys")
        assert stored(run) == expected(keys) == [0] * 50


def test_a_row_without_keys_has_no_component(tmp_path: Path, open_run: Any) -> None:
    pq.write_table(pa.table({"text": ["1 2 3", None, "3 4 5", "6 7 8"]}), tmp_path / "c.parquet")
    with open_run(tmp_path / "c.parquet") as run:
        run.materialize([keys_column()])
        run.connect_rows(component_column(), "k.keys")
        assert stored(run) == [0, None, 0, 3]


def test_what_is_done_is_not_done_again_and_a_dead_driver_leaves_its_edges(
    tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", 400)
    corpus = write(tmp_path / "c.parquet", GRAPHS["random"])

    def dying(self: ContractTask, partition: int, attempt: int) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ContractTask, "__call__", dying)
        with open_run(corpus) as run:
            run.materialize([keys_column()])
            with pytest.raises(KeyboardInterrupt):
                run.connect_rows(component_column(), "k.keys")
    with open_run(corpus) as run:
        run.materialize([keys_column()])
        run.connect_rows(component_column(), "k.keys")
        passes = [p["pass"] for p in run.manifest["passes"]]
        assert passes[0] == "linked contract"  # neither k, nor split, nor edges
        assert stored(run) == expected(GRAPHS["random"])
        run.connect_rows(component_column(), "k.keys")
        assert len(run.manifest["passes"]) == len(passes)


def test_keys_of_another_type_are_refused(write_corpus: Any, open_run: Any) -> None:
    with open_run(write_corpus()) as run, pytest.raises(TamisError, match=r"connected by corpus\.id, which is string"):
        run.connect_rows(component_column(), "corpus.id")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=40))
def test_stars_keep_who_is_connected(edges: list[tuple[int, int]]) -> None:
    pairs = np.array([(min(e), max(e)) for e in edges if e[0] != e[1]], np.int64).reshape(-1, 2)
    low, high = contract(pairs[:, 0], pairs[:, 1])
    assert (low < high).all()
    assert len(set(high.tolist())) == len(high)
    assert not set(low.tolist()) & set(high.tolist())
    least = dict(zip(high.tolist(), low.tolist(), strict=True))
    assert all(least.get(a, a) == least.get(b, b) for a, b in pairs.tolist())
    again = contract(*distinct(np.append(low, low), np.append(high, high)))
    assert np.array_equal(again[0], low)
    assert np.array_equal(again[1], high)


def test_a_long_path_takes_few_rounds(tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", 16 * KEYS * 3000 // 8)
    with open_run(write(tmp_path / "c.parquet", path_of(3000), 3000)) as run:
        run.materialize([keys_column()])
        run.connect_rows(component_column(), "k.keys")
        rounds = [p["units"] for p in run.manifest["passes"] if p["pass"] == "linked contract"]
        assert set(stored(run)) == {0}
    assert set(rounds) == {8}
    assert len(rounds) <= 8


def test_addresses_are_packed_in_their_order() -> None:
    shards, rows = np.array([0, 0, 1, 70_000], np.int32), np.array([3, 2**31, 0, 5])
    packed = pack(shards, rows)
    assert (np.diff(packed) > 0).all()
    assert (packed >> 32).tolist() == shards.tolist()
    assert (packed & 0xFFFFFFFF).tolist() == rows.tolist()
