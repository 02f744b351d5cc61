"""The global order: every row once, the same for any world and any workers, resumable anywhere."""

from __future__ import annotations

from itertools import chain
from math import factorial

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.output.loader.plan import WINDOW_BYTES, Epoch, Settings, Share, fit
from pipeline.output.loader.reading import ROW, VALID, read_batches


def orders(batches: tuple[int, ...] = (4, 8, 12)) -> st.SearchStrategy[Settings]:
    return st.builds(
        Settings,
        batch=st.sampled_from(batches),
        seed=st.integers(0, 2**63 - 1),
        shuffle=st.booleans(),
        lanes=st.integers(1, 9),
        phases=st.integers(1, 4),
        window=st.just(1),
        drop_last=st.booleans(),
    )


GROUPS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= 12)


def batches(epoch: Epoch, world: int = 1, workers: int = 1, start: int = 0, ahead: int = 2) -> list[list[int]]:
    """Global batches as `world` ranks with `workers` each read them, ranks one after the other; fill-ins negative."""
    size = epoch.settings.batch

    def reader(rank: int, worker: int) -> chain[pa.Table]:
        share = Share(rank * size // world, (rank + 1) * size // world, start + worker, workers)
        return chain(read_batches(epoch, share, lambda rows: pa.table({"row": rows}), ahead))

    readers = [[reader(rank, worker) for worker in range(workers)] for rank in range(world)]
    found = []
    for number in range(start, epoch.batches):
        batch: list[int] = []
        for rank in readers:
            table = next(rank[(number - start) % workers])
            assert table.num_rows == size // world
            assert table["row"].equals(table[ROW])
            batch += np.where(table[VALID].to_numpy(), table[ROW].to_numpy(), -1 - table[ROW].to_numpy()).tolist()
        found.append(batch)
    assert all(next(one, None) is None for one in chain(*readers)), "a rank has a batch more"
    return found


def epoch_of(order: Settings, sizes: list[int], memory: float, number: int = 0) -> Epoch:
    counts = np.array(sizes, np.int64)
    return Epoch(fit(order, counts, 1.0, memory), counts, number)


@settings(max_examples=30)
@given(order=orders(), sizes=GROUPS, memory=st.integers(1, 300), number=st.integers(0, 3))
def test_every_row_comes_once(order: Settings, sizes: list[int], memory: int, number: int) -> None:
    found = batches(epoch_of(order, sizes, memory, number))
    flat, rows = list(chain(*found)), sum(sizes)
    real = [row for row in flat if row >= 0]
    assert len(set(real)) == len(real)
    assert set(real) <= set(range(rows))
    assert len(real) == (rows // order.batch * order.batch if order.drop_last else rows)
    assert all(row >= 0 for row in chain(*found[:-1])), "only the last batch is filled up"
    assert all(0 <= -1 - row < rows for row in flat if row < 0)
    if not order.shuffle:
        assert real == list(range(len(real)))


@settings(max_examples=20)
@given(
    order=orders(),
    sizes=GROUPS,
    memory=st.integers(1, 300),
    world=st.sampled_from([1, 2, 4]),
    workers=st.integers(1, 4),
    data=st.data(),
)
def test_the_world_does_not_matter(
    order: Settings, sizes: list[int], memory: int, world: int, workers: int, data: st.DataObject
) -> None:
    epoch = epoch_of(order, sizes, memory)
    expected = batches(epoch, ahead=data.draw(st.integers(1, 5)))
    start = data.draw(st.integers(0, len(expected)))
    assert batches(epoch, world, workers, start) == expected[start:]


@settings(max_examples=10)
@given(order=orders(), sizes=GROUPS, memory=st.integers(1, 300), world=st.sampled_from([1, 2, 4]))
def test_what_is_read_is_what_is_yielded(order: Settings, sizes: list[int], memory: int, world: int) -> None:
    """No reader reads a row that is another's."""
    epoch = epoch_of(order, sizes, memory)
    read: list[int] = []

    def note(rows: np.ndarray) -> pa.Table:
        read.extend(rows.tolist())
        return pa.table({"row": rows})

    for rank in range(world):
        share = Share(rank * order.batch // world, (rank + 1) * order.batch // world, 0, 1)
        list(read_batches(epoch, share, note, 2))
    assert len(read) == epoch.batches * order.batch


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sizes = [100] * 8

    def order(seed: int, number: int) -> list[list[int]]:
        return batches(epoch_of(Settings(16, seed, True, 4, 1, 1, True), sizes, 400, number))

    assert order(0, 0) == order(0, 0)
    distinct = {str(order(seed, number)) for seed in range(3) for number in range(3)}
    assert len(distinct) == 9


def test_the_order_is_the_same_for_ever() -> None:
    """A stored state must mean the same place in a later version."""
    epoch = epoch_of(Settings(4, 7, True, 2, 2, 1, False), [5, 4, 6, 3, 4], 12, 2)
    assert (epoch.settings.lanes, epoch.settings.phases, epoch.settings.window) == (2, 2, 1)
    assert batches(epoch) == [
        [14, 11, 16, 15],
        [8, 20, 21, 0],
        [9, 12, 17, 6],
        [19, 18, 1, 2],
        [10, 13, 7, 5],
        [3, 4, -10, -11],
    ]


def test_one_lane_and_a_large_window_shuffle_uniformly() -> None:
    """All 24 orders of four rows in two groups over 2,400 seeds: 99.9 % of chi-square with 23 degrees is below 49.7."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        epoch = Epoch(Settings(4, seed, True, 1, 1, 2, True), np.array([2, 2]), 0)
        (window,) = epoch.windows(Share(0, 4, 0, 1))
        order = tuple(epoch.rows_of(window, Share(0, 4, 0, 1))[0].tolist())
        counts[order] = counts.get(order, 0) + 1
    expected = 2400 / factorial(4)
    assert len(counts) == factorial(4)
    assert sum((n - expected) ** 2 for n in counts.values()) / expected < 49.7


def test_ranks_up_to_the_lanes_and_workers_up_to_the_phases_share_no_row_group() -> None:
    """But for the groups that a cut between streams falls into."""
    sizes = np.full(64, 100)
    epoch = Epoch(fit(Settings(32, 3, True, 4, 2, 1, True), sizes, 1.0, 1600), sizes, 0)
    assert (epoch.settings.lanes, epoch.settings.phases, epoch.settings.window) == (4, 2, 2)

    def groups(rank: int, worker: int) -> set[int]:
        touched: set[int] = set()

        def note(rows: np.ndarray) -> pa.Table:
            touched.update((rows // 100).tolist())
            return pa.table({"row": rows})

        list(read_batches(epoch, Share(rank * 8, rank * 8 + 8, worker, 2), note, 2))
        return touched

    read = [groups(rank, worker) for rank in range(4) for worker in range(2)]
    assert sum(map(len, read)) <= 64 + 7


def test_what_is_held_is_bounded() -> None:
    """Loaded and not yet given out: a window a stream, and those read ahead."""
    sizes = np.full(200, 50)
    epoch = Epoch(fit(Settings(8, 0, True, 4, 1, 1, True), sizes, 1.0, 400), sizes, 0)
    assert epoch.settings.window == 2
    loaded = given_out = most = 0

    def note(rows: np.ndarray) -> pa.Table:
        nonlocal loaded
        loaded += len(rows)
        return pa.table({"row": rows})

    for table in read_batches(epoch, Share(0, 8, 0, 1), note, 3):
        most = max(most, loaded - given_out)
        given_out += table.num_rows
    assert given_out == 10_000
    assert most <= (4 + 3 + 4) * 100  # windows in use, ahead, and those that are used up in this batch


def test_settings_follow_the_rows() -> None:
    sizes = np.full(40, 1000)
    asked = Settings(24, 0, True, 9, 2, 1, True)
    assert fit(asked, sizes, 1000.0, 64e6) == Settings(24, 0, True, 8, 2, 4, True)
    assert fit(asked, sizes[:3], 1000.0, 64e6) == Settings(24, 0, True, 3, 1, 21, True)
    assert fit(asked, sizes, 1e6, 1e6).window == 1
    assert fit(asked, sizes, 1000.0, 1e15).window == WINDOW_BYTES // 1_000_000
    assert fit(Settings(24, 0, False, 8, 2, 1, True), sizes, 1.0, 1e9) == Settings(24, 0, False, 1, 1, 1, True)


@pytest.mark.parametrize("ahead", [1, 4])
def test_an_error_in_a_thread_reaches_the_reader(ahead: int) -> None:
    epoch = Epoch(Settings(4, 0, True, 1, 1, 1, True), np.array([8, 8, 8]), 0)
    calls = 0

    def fail(rows: np.ndarray) -> pa.Table:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("gone")
        return pa.table({"row": rows})

    with pytest.raises(OSError, match="gone"):
        list(read_batches(epoch, Share(0, 4, 0, 1), fail, ahead))
