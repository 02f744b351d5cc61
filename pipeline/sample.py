"""A reproducible sample of rows: those whose keys have the smallest hashes under a seed.

It depends on the rows and the seed alone, not on shards, batches or workers, and a larger sample contains the smaller
ones. Rows with the same key count once, so a page that stands there a million times does not fill the sample, and
doubling a corpus does not change it. The rows come sorted by hash, which is a random order: any prefix is a sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import MARKER, Artifact
from pipeline.corpus.chat import SPANS, span_arrays, span_lists
from pipeline.errors import TamisError
from pipeline.hashing import hash64, row_keys
from pipeline.recipe import State
from pipeline.vectors import matrix

if TYPE_CHECKING:
    from pipeline.run import Run

LENGTH = ".length"
"""A text column is two arrays of the state: its bytes end to end, and under this suffix the bytes of each row."""
LISTED = ".listed"
"""A column of spans or of lists of integers is the same, and an empty array of its values' type under this suffix."""


@dataclass(frozen=True)
class Sample:
    """Statistic: `values` of the `rows` rows with the smallest hashes, out of a corpus of about `of` keys; see `draw`.

    State: `hash` (m uint64, ascending) and for every reference in `values` an array of m rows: numbers as (m,), vectors
    as (m, d), texts cut to `max_bytes` as bytes (read them with `texts`), images as bytes, empty where they have more
    than `max_bytes` (read them with `contents`). m <= rows. A shard drops at once what can hardly be among the smallest
    hashes of the whole corpus, so all states together hold about 1.25 * `rows` rows.
    """

    values: tuple[str, ...]
    rows: int
    of: int
    seed: int
    key: str = "row.key"
    """Reference to hash: `row.key`, or `text`, whose key is computed here and spares reading another column."""
    max_bytes: int = 4096

    @property
    def share(self) -> float:
        """Share of all hashes that is looked at: a quarter and six standard deviations more than `rows` of `of`."""
        return min(1.0, (1.25 * self.rows + 6 * math.sqrt(self.rows) + 32) / max(self.of, 1))

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.key, *self.values]))

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        keys = batch.column(self.key)
        hashes = hash64(keys if self.key == "row.key" else row_keys(keys), self.seed)
        drawn = np.flatnonzero(hashes <= np.uint64(min(int(self.share * 2.0**64), 2**64 - 1)))
        rows: State = {"hash": hashes[drawn]}
        for name in self.values:
            rows |= self._pack(name, batch.column(name).take(pa.array(drawn)))
        return self.merge([state, rows] if state else [rows])

    def merge(self, states: Sequence[State]) -> State:
        hashes = np.concatenate([s["hash"] for s in states])
        smallest, first = np.unique(hashes, return_index=True)
        order = first[: self.rows]
        merged: State = {name: kept for name, kept in states[0].items() if name.endswith(LISTED)}
        merged["hash"] = smallest[: self.rows]
        for name in self.values:
            joined = np.concatenate([s[name] for s in states])
            if name + LENGTH in states[0]:
                lengths = np.concatenate([s[name + LENGTH] for s in states])
                merged |= self._pack(name, _binary(joined, lengths).take(pa.array(order)))
            else:
                merged[name] = joined[order]
        return merged

    def _pack(self, name: str, values: pa.Array) -> State:
        if pa.types.is_fixed_size_list(values.type):
            return {name: matrix(values)}
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            flat, lengths = _listed(values)
            size = flat.dtype.itemsize * (2 if flat.ndim == 2 else 1)
            packed = self._pack(name, _binary(flat.view(np.uint8).ravel(), lengths * size))
            return {**packed, name + LISTED: flat[:0]}
        if pa.types.is_binary(values.type):  # half an image is none
            values = pc.if_else(pc.less_equal(pc.binary_length(values), self.max_bytes), values, b"")
        elif not (
            pa.types.is_string(values.type)
            or pa.types.is_large_string(values.type)
            or pa.types.is_large_binary(values.type)
        ):
            return {name: values.to_numpy(zero_copy_only=False)}
        cut = pc.binary_slice(values.cast(pa.large_binary()), 0, self.max_bytes)
        offsets = np.frombuffer(cut.buffers()[1], np.int64)[cut.offset : cut.offset + len(cut) + 1]
        content = np.frombuffer(cut.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        return {name: content, name + LENGTH: np.diff(offsets)}


def draw(run: Run, sample: Sample) -> State:
    """The sample's state: exactly the `rows` smallest hashes, or all there are; `{}` where no row is usable.

    One pass, and one more where over a fifth of the rows repeat a key or are unusable.
    """
    while True:
        state = run.aggregate(sample)
        found = len(state["hash"]) if state else 0
        if found >= sample.rows or sample.share == 1:
            return state if found else {}
        sample = replace(sample, of=int(found / sample.share))  # so many keys there seem to be


def texts(state: State, name: str = "text") -> list[str]:
    """The m texts of a sample's state; a character that the cut has broken is left out."""
    return [v.decode(errors="ignore") for v in contents(state, name)]


def contents(state: State, name: str) -> list[bytes]:
    """The m texts or binary values of a sample's state as bytes."""
    return list(_binary(state[name], state[name + LENGTH]).to_pylist())


def sampled(state: State, name: str = "text") -> pa.Array:
    """A column of texts of a sample's state as large_string, one of spans, or of integers as list<int64>."""
    if name + LISTED not in state:
        return pa.array(texts(state, name), pa.large_string())
    kind = state[name + LISTED]
    size = kind.dtype.itemsize * (2 if kind.ndim == 2 else 1)
    flat = state[name].view(kind.dtype).reshape(-1, *kind.shape[1:])
    bounds = np.append(0, np.cumsum(state[name + LENGTH] // size))
    if kind.ndim == 2:
        return span_lists(flat[:, 0], flat[:, 1], bounds)
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(flat))


def _listed(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Values of lists end to end, (N, 2) int32 of spans or (N,) int64, and how many each list has; a null is -1."""
    if values.type == SPANS:
        start, end, bounds = span_arrays(values)
        return np.stack([start, end], axis=1).astype(np.int32), np.diff(bounds)
    flat = pc.fill_null(values.flatten().cast(pa.int64()), -1).to_numpy()
    return flat, values.value_lengths().to_numpy().astype(np.int64)


def _binary(content: np.ndarray, lengths: np.ndarray) -> pa.LargeBinaryArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(content))]
    return pa.Array.from_buffers(pa.large_binary(), len(lengths), buffers)


def needs_fit(run: Run, name: str, identity: str) -> bool:
    """Whether `run.artifact(name, identity, ...)` has to build; asked before an aggregate that only the build needs."""
    return not Artifact(name, identity, run.store.child("artifacts", name)).stored()


def stored(run: Run, name: str) -> Artifact:
    """The artifact of a name as it lies in the run. Raises TamisError where there is none yet."""
    store = run.store.child("artifacts", name)
    try:
        return Artifact(name, json.loads(store.read(MARKER))["fingerprint"], store)
    except FileNotFoundError:
        raise TamisError(f"the run has no artifact {name!r} yet: fit it first") from None
