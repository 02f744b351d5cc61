"""`aggregate`: the right sum, by the same tree whatever does the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.rows import row_column
from pipeline.corpus.storage import Store
from pipeline.engine import aggregate
from pipeline.engine.aggregate import load_state, merge, save_state
from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.errors import NoShardLeft


def thirds(file: int, rows: int) -> dict[str, Any]:
    """Numbers whose float32 sum depends on the order of addition."""
    rng = np.random.default_rng(file)
    return {
        "text": ["x"] * rows,
        "n": (rng.standard_normal(rows) * 10.0 ** rng.integers(-3, 6, rows)).astype(np.float32),
    }


def test_totals(write_corpus: Any, open_run: Any, any_pool: Callable[[], Pool]) -> None:
    corpus = write_corpus(files=5, rows=30, groups=4)
    with open_run(corpus, any_pool) as run:
        run.materialize([row_column(False, None)])
        found = run.aggregate(toys.Total("row.bytes"))
        sizes = np.char.str_len(np.array(pq.read_table(corpus)["text"].to_pylist()))
        assert found["rows"].tolist() == [150]
        assert found["sum"][0] == pytest.approx(sizes.sum() / 3, rel=1e-5)
        assert not [p for p in Path(run.store.path, "scratch").rglob("*") if p.is_file()]


@pytest.mark.parametrize("many", [1024, 4])
def test_float_sums_are_the_same_for_any_workers(
    write_corpus: Any,
    open_run: Any,
    lasting_pool: RayPool,
    ray_pool: Callable[..., RayPool],
    monkeypatch: pytest.MonkeyPatch,
    many: int,
) -> None:
    monkeypatch.setattr("pipeline.run.MANY_SHARDS", many)
    corpus = write_corpus(files=10, rows=40, groups=4, rows_of=thirds)  # 40 shards: three levels of the tree
    sums = []
    for name, pool in (("inline", InlinePool), ("w2", lambda: lasting_pool), ("w4", lambda: ray_pool(4))):
        with open_run(corpus, pool, name) as run:
            sums.append(run.aggregate(toys.Total("corpus.n"))["sum"].tobytes())
    assert len(set(sums)) == 1
    values = pq.read_table(corpus)["n"].to_numpy()
    backwards = np.float32(sum(v / np.float32(3) for v in values[::-1]))
    assert backwards.tobytes() != sums[0]  # else the test would not see another order


def test_no_usable_row_is_an_empty_state(tmp_path: Path, open_run: Any) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "n": pa.array([None, None], pa.int64())}), tmp_path / "c.parquet")
    with open_run(tmp_path / "c.parquet") as run:
        assert run.aggregate(toys.Total("corpus.n")) == {}


def test_rows_without_a_value_are_left_out(tmp_path: Path, open_run: Any) -> None:
    pq.write_table(pa.table({"text": ["a", None, " ", "b"], "n": [1, 2, 4, None]}), tmp_path / "c.parquet")
    with open_run(tmp_path / "c.parquet") as run:
        assert run.aggregate(toys.Total("corpus.n"))["sum"].tolist() == [pytest.approx(7 / 3)]


def test_a_shard_that_cannot_be_read_is_given_up(
    write_corpus: Any, open_run: Any, any_pool: Callable[[], Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.pool.PAUSE_S", 0.0)
    corpus = write_corpus(files=3, rows=10, groups=1, rows_of=thirds)
    with open_run(corpus, any_pool) as run:
        damage(corpus / "f01.parquet")
        found = run.aggregate(toys.Total("corpus.n"))
        assert found["rows"].tolist() == [20]
        (failure,) = run.failures
        assert failure["file"].endswith("f01.parquet")
        for name in ("f00", "f02"):
            damage(corpus / f"{name}.parquet")
        with pytest.raises(NoShardLeft, match=r"every shard failed; the first: .*f01.parquet"):
            run.aggregate(toys.Total("corpus.n"))


def damage(path: Path) -> None:
    """Overwrite the data, not the footer: the listing still finds the file as it was."""
    content = bytearray(path.read_bytes())
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[4:end] = b"\xff" * (end - 4)
    path.write_bytes(content)


@given(st.lists(st.lists(st.integers(0, 99), max_size=3), min_size=1, max_size=40), st.integers(2, 5))
def test_merging_leaves_out_empty_states(values: list[list[int]], fan_in: int) -> None:
    statistic = toys.Total("n")
    states = [{"sum": np.array([sum(v)])} if v else {} for v in values]
    while len(states) > 1:
        states = [merge(statistic, states[i : i + fan_in]) for i in range(0, len(states), fan_in)]
    assert states[0].get("sum", np.array([0])).tolist() == [sum(map(sum, values))]


def test_a_state_is_saved_without_pickle(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    state = {"a.b": np.arange(3, dtype=np.uint16), "m": np.ones((2, 2), np.float16)}
    save_state(store, state, "s.npz")
    loaded = load_state(store, "s.npz")
    assert {k: (v.dtype, v.tolist()) for k, v in loaded.items()} == {k: (v.dtype, v.tolist()) for k, v in state.items()}
    save_state(store, {"o": np.array([{}], dtype=object)}, "o.npz")
    with pytest.raises(ValueError, match="allow_pickle"):
        load_state(store, "o.npz")


def test_the_tree_is_fixed() -> None:
    assert (aggregate.FAN_IN, aggregate.MANY_SHARDS) == (16, 1024)  # another shape gives other sums: bump versions
