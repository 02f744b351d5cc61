"""The sample depends on rows and seed, and on nothing else."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.hashing import hash64, row_keys
from pipeline.recipe import State
from pipeline.sample import Sample, draw, texts


def rows(count: int, distinct: int | None = None) -> pa.RecordBatch:
    number = np.arange(count) % (distinct or count)
    text = pa.array([f"text é{n} " * (n % 5 + 1) for n in number])
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(number, 3).astype(np.float16)), 3)
    return pa.record_batch(
        [row_keys(text), text, vector, pa.array(number)], ["row.key", "text", "embed.vector", "row.n"]
    )


def fold(sample: Sample, batch: pa.RecordBatch, shards: int, step: int) -> State:
    states = []
    for part in np.array_split(np.arange(batch.num_rows), shards):
        state: State = {}
        for i in range(0, len(part), step):
            piece = part[i : i + step]
            state = sample.update(state, batch.slice(piece[0], len(piece)).select(list(sample.inputs)))
        states += [state] if state else []
    return sample.merge(states)


@settings(deadline=None)
@given(
    st.integers(1, 400), st.integers(1, 60), st.integers(1, 7), st.integers(1, 90), st.sampled_from(["row.key", "text"])
)
def test_shards_and_batches_do_not_matter_and_the_smallest_hashes_are_taken(
    count: int, wanted: int, shards: int, step: int, key: str
) -> None:
    batch = rows(count)
    sample = Sample(("text", "embed.vector", "row.n"), wanted, count, seed=7, key=key)
    state = fold(sample, batch, shards, step)
    order = np.argsort(hash64(batch["row.key"], 7))[:wanted]
    assert state["row.n"].tolist() == order.tolist()
    assert texts(state) == batch["text"].take(pa.array(order)).to_pylist()
    assert state["embed.vector"].tolist() == [[n, n, n] for n in order]


def test_a_larger_sample_contains_the_smaller_one_and_seeds_differ() -> None:
    batch = rows(5000)
    small, large = (fold(Sample(("row.n",), n, 5000, 0), batch, 3, 500)["row.n"] for n in (50, 400))
    other = fold(Sample(("row.n",), 50, 5000, 1), batch, 3, 500)["row.n"]
    assert large[:50].tolist() == small.tolist()
    assert len(set(small) & set(other)) < 10


class Memory:
    """A run that only aggregates, and counts how often."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch, self.passes = batch, 0

    def aggregate(self, sample: Sample) -> State:
        self.passes += 1
        return fold(sample, self.batch, 4, 256)


@pytest.mark.parametrize(("count", "distinct", "passes"), [(100, 100, 1), (9000, 100, 2), (20_000, 20_000, 1)])
def test_rows_with_one_key_count_once_and_the_sample_is_full(count: int, distinct: int, passes: int) -> None:
    run = Memory(rows(count, distinct))
    state = draw(run, Sample(("row.n",), 40, count, 0))
    assert state["row.n"].tolist() == np.argsort(hash64(rows(distinct)["row.key"], 0))[:40].tolist()
    assert run.passes == passes


def test_fewer_keys_than_wanted_are_all_drawn() -> None:
    assert sorted(draw(Memory(rows(500, 9)), Sample(("row.n",), 40, 500, 0))["row.n"]) == list(range(9))


def test_a_shard_drops_what_cannot_be_in_the_sample() -> None:
    state = Sample(("row.n",), 100, of=1_000_000, seed=0).update({}, rows(20_000))
    assert 0 <= len(state["row.n"]) < 20  # a fiftieth of the corpus holds about 2 of 100 rows


@pytest.mark.parametrize("text", ["ééé", "日本語"])
def test_a_text_is_cut_at_a_whole_character(text: str) -> None:
    batch = pa.record_batch([row_keys(pa.array([text])), pa.array([text])], ["row.key", "text"])
    state = Sample(("text",), 1, 1, 0, max_bytes=4).update({}, batch)
    assert texts(state) == [text.encode()[:4].decode(errors="ignore")]


def test_large_strings_slices_and_unwanted_rows() -> None:
    batch = rows(50)
    large = batch.set_column(1, "text", batch["text"].cast(pa.large_string())).slice(10, 30)
    state = Sample(("text",), 50, 50, 0).update({}, large)
    assert sorted(texts(state)) == sorted(large["text"].to_pylist())
