"""Target texts that stand in the corpus: a criterion fitted to them keeps them, and what is measured on them flatters.

A row contains a target where the two are the same words: equal once lower-cased, with everything between runs of
letters, marks and digits one space. A target quoted inside a longer row is not found; that takes n-gram overlap, which
boilerplate sets off and which belongs before the run. One read of the text, so callers ask only where they fit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.hashing import hash64, row_keys
from pipeline.recipe import State

if TYPE_CHECKING:
    from pipeline.run import Run

log = logging.getLogger(__name__)

LISTED = 100
"""Row ids that are kept; all rows are counted."""
SHOWN = 10


@dataclass(frozen=True)
class Contained:
    """Rows of the corpus that are one of the targets: how many, and the ids of the first ones in corpus order.

    A corpus without an id column has the hexadecimal xxh3-128 of the text as id.
    """

    rows: int
    ids: list[str]


def warn_contained(run: Run, texts: pa.Array | Sequence[str], label: str) -> Contained:
    """Look for target texts among the rows, log a warning with the row ids where there are some, and return them.

    `label`: the key of the configuration that names the targets, such as `betr.targets`. A target of no word at all is
    never found.
    """
    values = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    hashes = np.unique(_hashes(values)[0])
    state = run.aggregate(_Found(hashes, "id" if run.config.corpus.id else "text"), f"{label} in the corpus")
    found = Contained(int(state["rows"][0]), state["ids"].tolist()) if state else Contained(0, [])
    if found.rows:
        log.warning(
            "%s: %d rows of the corpus are target texts themselves; remove them from one of the two, or what is "
            "measured on these targets flatters. Row ids: %s%s",
            label,
            found.rows,
            ", ".join(found.ids[:SHOWN]),
            ", ..." if found.rows > SHOWN else "",
        )
    return found


@dataclass(frozen=True)
class _Found:
    """Statistic: `rows` (1,) int64 whose normalised text hashes to one of `hashes` (sorted), `ids` (<= 100,) str."""

    hashes: np.ndarray = field(repr=False)
    name: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("text",) if self.name == "text" else ("text", self.name)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        hashes, usable = _hashes(batch.column("text"))
        at = usable[np.isin(hashes, self.hashes)]
        values = batch.column(self.name).take(pa.array(at[:LISTED]))
        ids = [k.hex() for k in row_keys(values).to_pylist()] if self.name == "text" else map(str, values.to_pylist())
        new = {"rows": np.array([len(at)]), "ids": np.array([*ids], np.str_)}
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {
            "rows": np.sum([s["rows"] for s in states], axis=0),
            "ids": np.concatenate([s["ids"] for s in states])[:LISTED],
        }


def _hashes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """uint64 hashes of the normalised texts that hold a word, and where those stand; both (m,)."""
    import polars as pl

    words = pl.Series(texts).str.to_lowercase().str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ").str.strip_chars()
    usable = np.flatnonzero((words.str.len_bytes() > 0).to_numpy())
    return hash64(row_keys(words.gather(usable).to_arrow().cast(pa.large_string())), 0), usable
