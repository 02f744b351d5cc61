"""Rows that no arm of a comparison may train on: a random share of the corpus, and what is a target text itself.

Score 1: a row to train on; 0: held out, to measure on; -1: a text of the target, which is neither. With the floor 1 no
selection keeps the others. The share goes by the hash of the text, so exact copies of a row are held out with it; near
copies are not found, and a corpus that is full of them flatters every arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.hashing import hash64, row_keys
from pipeline.recipe import Column, State, Transform
from pipeline.scores._seeds import identify, read_seeds
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from pipeline.run import Run

FIELDS = pa.schema([("score", pa.float32())])
TRAIN, MIX, TARGET = 1.0, 0.0, -1.0


class HeldOut(Score):
    """1 for rows that an arm may train on."""

    claim = "an arm of a comparison may train on it"
    cost = "a hash of the text"
    source = "ours"
    kind: Literal["proxy-held-out"] = "proxy-held-out"
    content: Literal["text", "image"] = Field("text", description="what a row is known by")
    share: float = Field(0.02, gt=0, lt=0.5, description="of the corpus that is held out to measure on")
    seed: int = 0
    target: tuple[str, ...] = Field((), description="addresses of the files with the target's texts")
    target_text: str = "text"

    def column(self, run: Run) -> Column:
        hashes = np.empty(0, np.uint64)
        if self.target:
            hashes = text_hashes(read_seeds(self.target, self.target_text, "target"), self.seed)
        identity = self.identity(*identify(self.target))
        opened = partial(_open, self.content, self.share, self.seed, hashes)
        return Column(self.column_name, (self.content,), FIELDS, opened, identity)


def text_hashes(texts: pa.Array, seed: int) -> np.ndarray:
    """uint64 (n,) of n texts."""
    return hash64(row_keys(texts), seed)


def _open(content: str, share: float, seed: int, target: np.ndarray) -> Transform:
    limit = np.uint64(share * 2.0**64)

    def transform(batch: pa.RecordBatch) -> pa.RecordBatch:
        found = text_hashes(batch.column(content), seed)
        score = np.where(np.isin(found, target), TARGET, np.where(found < limit, MIX, TRAIN))
        return pa.record_batch([pa.array(score.astype(np.float32))], schema=FIELDS)

    return transform


@dataclass(frozen=True)
class Total:
    """Statistic: `train` (1,) int64, tokens of the rows that an arm may train on; `target` (1,), rows of the target."""

    held: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.held, "row.tokens")

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        held, size = batch.column(self.held).to_numpy(), batch.column("row.tokens").to_numpy()
        new = {"train": np.array([size[held == TRAIN].sum()]), "target": np.array([(held == TARGET).sum()])}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in ("train", "target")}
