"""All that the report says about a run, before any markup: counts, histograms, and rows with their text.

The counts come from one pass over thin columns and, where the corpus has a source column, one over that; both are
stored, so that another report on an unchanged selection passes over nothing. The text of the sampled rows is read by
address at the end, out of at most 64 shards and about 512 MiB of the source, whatever the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engine.aggregate import load_state
from pipeline.hashing import mix64
from pipeline.recipe import State, fingerprint
from pipeline.report.counts import OTHER, Bins, Overview, Sources, bins
from pipeline.report.rows import Address, read_contents
from pipeline.run import Run
from pipeline.sample import needs_fit
from pipeline.select.stage import Selection, stream
from pipeline.select.verdict import REASONS

SAMPLED_SHARDS, SAMPLED_BYTES = 64, 512 << 20
CONCEPTS_LISTED, CONCEPTS_AT_EACH_END, AMONG_LARGEST = 40, 4, 1000
ROWS_A_CONCEPT, ROWS_WITHOUT_CONCEPTS = 3, 12
STATE = "state.npz"


@dataclass(frozen=True)
class Sampled:
    """A row that is shown with its text."""

    kept: bool
    text: str
    source: str
    scores: dict[str, float]
    reason: str
    where: str


@dataclass(frozen=True)
class Facts:
    """`bins` and `levels` go with `scores`; `reasons` have rows, tokens and bytes, int64 (3,), of every reason;
    `sources` rows, tokens, kept rows and kept tokens, int64 (4,); `sampled` is by concept, -1 where there are none."""

    run: Run
    selection: Selection
    files: Sequence[dict[str, Any]]
    scores: list[str]
    bins: list[Bins | None]
    levels: np.ndarray
    reasons: list[tuple[str, np.ndarray]]
    sources: list[tuple[str, np.ndarray]] | None
    concepts: pa.Table | None
    sampled: dict[int, list[Sampled]]
    sampled_shards: int

    def amount(self, *reasons: str) -> np.ndarray:
        """Rows, tokens and bytes, int64 (3,), of some reasons; of all without any."""
        return np.asarray(np.sum([a for reason, a in self.reasons if not reasons or reason in reasons], axis=0))

    @property
    def usable(self) -> np.ndarray:
        return self.amount()

    @property
    def above_floors(self) -> np.ndarray:
        return self.amount(*REASONS)

    @property
    def kept(self) -> np.ndarray:
        return self.amount("kept")

    @property
    def overall(self) -> float:
        """Share of the usable rows that is kept."""
        return float(self.kept[0] / max(int(self.usable[0]), 1))

    @property
    def lost(self) -> int:
        """Rows of shards that were given up."""
        return sum(self.run.shards[i].rows for i in self.run.failed)


def gather(run: Run, selection: Selection, files: Sequence[dict[str, Any]]) -> Facts:
    """Count and sample. Raises nothing of its own: a shard that fails here is given up like anywhere."""
    names = [s.column_name for s in run.config.scores]
    names += ["combined"] if "combined.score" in selection.ranked_by else []
    concepts = selection.concepts()
    chosen = () if concepts is None else choose_concepts(concepts)
    rows = ROWS_A_CONCEPT if chosen else ROWS_WITHOUT_CONCEPTS
    seed = stream(run.seed, "report")  # a draw of its own: the score `random` and ties go by hashes too
    shards = choose_shards(run, seed)
    seen = counted(run, Overview(tuple(f"{n}.score" for n in names), chosen, shards, rows, seed))
    source = run.config.corpus.source
    totals = {str(r): a for r, a in zip(seen["reason"], seen["amount"], strict=True)}
    return Facts(
        run=run,
        selection=selection,
        files=files,
        scores=names,
        bins=[bins(levels) for levels in seen["levels"]],
        levels=seen["levels"],
        reasons=sorted(totals.items(), key=lambda item: (-int(item[1][0]), item[0])),
        sources=by_source(counted(run, Sources(f"corpus.{source}")), sum(totals.values()), totals["kept"])
        if source
        else None,
        concepts=concepts,
        sampled=read_sampled(run, seen, names, chosen),
        sampled_shards=len(shards),
    )


def counted(run: Run, statistic: Overview | Sources) -> State:
    """The state of a statistic, kept as an artifact so that it is counted once."""
    name = f"report-{type(statistic).__name__.lower()}"
    identity = fingerprint(name, 1, asdict(statistic), run.identity(*statistic.inputs))
    state = run.aggregate(statistic, label=name) if needs_fit(run, name, identity) else {}
    return load_state(run.artifact(name, identity, partial(_write, state), resources=None).store, STATE)


def _write(state: State, directory: Path) -> None:
    np.savez_compressed(directory / STATE, **state)  # type: ignore[arg-type]  # keywords are arrays


def choose_shards(run: Run, seed: int) -> tuple[int, ...]:
    """Shards to sample from: the first by hash, as many as stay below the bounds, one at least."""
    live = run.live
    salted = np.array([s.index for s in live], np.uint64) + np.uint64(seed % 2**32)
    order = np.argsort(mix64(salted), kind="stable")[:SAMPLED_SHARDS]
    total = np.cumsum([live[i].bytes for i in order])
    within = max(1, int(np.searchsorted(total, SAMPLED_BYTES, side="right")))
    return tuple(sorted(live[i].index for i in order[:within]))


def choose_concepts(concepts: pa.Table) -> tuple[int, ...]:
    """The 40 largest, and of the 1,000 largest those of which most and least is kept."""
    rows, kept = concepts["n"].to_numpy(), concepts["kept_rows"].to_numpy()
    order = np.argsort(-rows, kind="stable")[:AMONG_LARGEST]
    order = order[rows[order] > 0]
    by_share = order[np.argsort(kept[order] / rows[order], kind="stable")]
    chosen = [*order[:CONCEPTS_LISTED], *by_share[:CONCEPTS_AT_EACH_END], *by_share[-CONCEPTS_AT_EACH_END:]]
    return tuple(concepts["concept"].to_numpy()[list(dict.fromkeys(chosen))].tolist())


def by_source(state: State, usable: np.ndarray, kept: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Sources, largest first. A row whose source is null reaches no statistic: such rows are what is left."""
    named = [(str(n), a) for n, a in zip(state.get("name", ()), state.get("amount", ()), strict=True)]
    rest = np.concatenate([usable[:2], kept[:2]]) - np.sum([np.zeros(4, np.int64), *(a for _, a in named)], axis=0)
    named += [("(null)", rest)] if rest[0] else []
    return sorted(named, key=lambda item: (item[0] == OTHER, -int(item[1][0]), item[0]))


def read_sampled(run: Run, seen: State, names: Sequence[str], concepts: Sequence[int]) -> dict[int, list[Sampled]]:
    """The sampled rows with their text, by concept."""
    corpus = run.config.corpus
    addresses: list[Address] = list(zip(seen["shard"].tolist(), seen["row"].tolist(), strict=True))
    found = read_contents(run.shards, addresses, corpus.text, corpus.id, corpus.source, run.layout.chat)
    sampled: dict[int, list[Sampled]] = {}
    for i, (shard, row) in enumerate(addresses):
        text, source = found[shard, row]
        where = run.shards[shard].locate(np.array([row])).to_pylist()[0]
        scores = dict(zip(names, seen["score"][i].tolist(), strict=True))
        place = f"{where['file']}, row group {where['row_group']}, row {where['row']}"
        group = int(seen["group"][i])
        shown = Sampled(bool(group % 2), text, source, scores, str(seen["why"][i]), place)
        sampled.setdefault(concepts[group // 2] if concepts else -1, []).append(shown)
    return sampled
