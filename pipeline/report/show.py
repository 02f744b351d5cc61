"""`tamis show`: real rows of a run with their scores and the reason for which they were kept or dropped.

Streams over the parts of thin columns with a heap of the rows asked for; the text of these rows alone is read, by
address. By a score it looks at every row, so it costs a pass over that score; without one it draws by the hash of the
rows' keys out of at most 16 shards. Ties go by that hash too, so the same call prints the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.shards import Shard
from pipeline.engine.parts import part_name
from pipeline.engine.reading import Layout, read_shard
from pipeline.errors import TamisError
from pipeline.hashing import hash64, mix64
from pipeline.report.format import count, number, visible
from pipeline.report.rows import read_contents
from pipeline.report.stored import Stored, quarantined
from pipeline.report.terminal import console, text
from pipeline.select.stage import stream

if TYPE_CHECKING:
    from rich.console import Console

RANDOM_SHARDS = 16
READERS = 4
TEXT_CHARACTERS = 400


@dataclass(frozen=True)
class Wanted:
    """Which rows: kept or dropped, and their order: by a score's reference, or by hash where it is None."""

    kept: bool
    by: str | None
    lowest: bool
    count: int
    seed: int


def print_rows(run_uri: str, kept: bool = True, by: str | None = None, lowest: bool = False, count: int = 10) -> None:
    """Print `count` rows, the best first (`lowest`: the worst) by the score `by`, or random ones.

    Raises TamisError where there is no run, no selection in it yet, or no score of that name.
    """
    run = Stored.at(run_uri)
    scores = [n for n in [*run.scores, "combined"] if run.store.exists("columns", n)]
    if by is not None and by not in scores:
        raise TamisError(f"--by {by}: the run has no score of that name; there are {', '.join(scores) or 'none yet'}")
    needed = [set(run.store.files("columns", c)) for c in ("select", "row", *([by] if by else []))]
    shards = [s for s in run.shards if s.pieces and part_name(s.index) in set.intersection(*needed)]
    if not shards:
        raise TamisError(f"{run_uri}: nothing is selected yet; `tamis status {run_uri}` says how far the run is")
    wanted = Wanted(kept, None if by is None else f"{by}.score", lowest, count, stream(run.config["seed"], "show"))
    if by is None:
        order = np.argsort(mix64(np.array([s.index for s in shards], np.uint64)), kind="stable")
        shards = [shards[i] for i in order]
    print_found(run, best_rows(run.layout, shards, wanted), scores, kept)


def best_rows(layout: Layout, shards: Sequence[Shard], wanted: Wanted) -> pa.Table:
    """`shard` and `row` of the rows wanted, in order. Any rows will do without a score: then it stops early."""
    best: list[pa.Table] = []
    with ThreadPoolExecutor(READERS) as threads:
        for start in range(0, len(shards), RANDOM_SHARDS):
            found = threads.map(lambda s: _best_of_shard(layout, s, wanted), shards[start : start + RANDOM_SHARDS])
            best = [_first(pa.concat_tables([*best, *found]), wanted)]
            if wanted.by is None and best[0].num_rows == wanted.count:
                break
    return best[0]


def _best_of_shard(layout: Layout, shard: Shard, wanted: Wanted) -> pa.Table:
    references = ["select.keep", "row.key", "address.row", *([wanted.by] if wanted.by else [])]
    tables = [_candidates(b, shard.index, wanted) for b in read_shard(layout, shard, references, 1 << 16)]
    return _first(pa.concat_tables(tables), wanted)


def _candidates(batch: pa.RecordBatch, shard: int, wanted: Wanted) -> pa.Table:
    """Rows of a batch that were kept, or were not, with what they are ordered by. Rows in quarantine were not kept."""
    keep = batch.column("select.keep").fill_null(False).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(keep == wanted.kept)
    order = np.zeros(len(rows), np.float32)
    if wanted.by:
        scores = batch.column(wanted.by).take(pa.array(rows))
        rows, scores = rows[scores.is_valid().to_numpy(zero_copy_only=False)], scores.drop_null()
        order = scores.to_numpy() * np.float32(1 if wanted.lowest else -1)
    at, keys = batch.column("address.row").to_numpy()[rows], batch.column("row.key").take(pa.array(rows))
    with np.errstate(over="ignore"):
        hashed = mix64(at.astype(np.uint64) + np.uint64(shard << 40))  # a row in quarantine may have no key
    valid = keys.is_valid().to_numpy(zero_copy_only=False)
    hashed[valid] = hash64(keys.drop_null(), wanted.seed)
    return _first(pa.table({"order": order, "hash": hashed, "shard": np.full(len(at), shard), "row": at}), wanted)


def _first(table: pa.Table, wanted: Wanted) -> pa.Table:
    keys = [(name, "ascending") for name in ("order", "hash", "shard", "row")]
    return table.take(pc.select_k_unstable(table, min(wanted.count, table.num_rows), keys))


def print_found(run: Stored, found: pa.Table, scores: Sequence[str], kept: bool) -> None:
    """Print rows in order, each with all that the run knows about it."""
    out = console()
    if not found.num_rows:
        out.print(text(f"No row was {'kept' if kept else 'dropped'}."))
        return
    addresses = list(zip(found["shard"].to_pylist(), found["row"].to_pylist(), strict=True))
    corpus = run.config["corpus"]
    read = read_contents(run.shards, addresses, corpus["text"], corpus["id"], corpus["source"], run.layout.chat)
    for position, (shard, row) in enumerate(addresses, 1):
        values = stored_values(run, shard, row, scores)
        content, source = read[shard, row]
        where = run.shards[shard].locate(np.array([row])).to_pylist()[0]
        print_row(out, position, values, source, f"{where['file']}:{where['row_group']}:{where['row']}", content)


def stored_values(run: Stored, shard: int, row: int, scores: Sequence[str]) -> dict[str, Any]:
    """Scores, concept, tokens and reason of one row; what it does not have is None."""
    wanted = {n: (n, "score") for n in scores} | {"tokens": ("row", "tokens"), "reason": ("select", "reason")}
    if run.store.exists("columns", "concept"):
        wanted["concept"] = ("concept", "concept")
    values = {name: _value(run, column, field, shard, row) for name, (column, field) in wanted.items()}
    if values["reason"] is None:
        columns = run.manifest.get("columns", {})
        table = quarantined(run.store, [n for n, c in columns.items() if c["quarantined"]], [shard])
        why = [q["reason"] for q in table.to_pylist() if q["shard_row"] == row]
        values["reason"] = f"quarantined: {', '.join(dict.fromkeys(why)) or 'a value is missing'}"
    return values


def _value(run: Stored, column: str, field: str, shard: int, row: int) -> Any:
    try:
        with run.store.filesystem.open_input_file(run.store.at("columns", column, part_name(shard))) as source:
            file = pq.ParquetFile(source)
            start = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row < start + rows:
                    return file.read_row_group(group, columns=[field], use_threads=False)[field][row - start].as_py()
                start += rows
    except FileNotFoundError:  # a column of an earlier configuration lacks parts
        return None
    return None


def print_row(out: Console, position: int, values: dict[str, Any], source: str, where: str, content: str) -> None:
    """One row: what is known of it on a line, the start of its text below."""
    head = text(f"{position:>3}  ", "bold")
    for name, value in values.items():
        if name not in ("tokens", "reason", "concept") and value is not None:
            head.append(f"{name} ", "dim").append(f"{number(value)}  ", "bold")
    if values.get("concept") is not None:
        head.append("concept ", "dim").append(f"{values['concept']}  ")
    if values["tokens"] is not None:
        head.append("tokens ", "dim").append(f"{count(values['tokens'])}  ")
    head.append(visible(values["reason"], 120), "green" if values["reason"] == "kept" else "yellow")
    out.print(head)
    out.print(text(f"     {' '.join(filter(None, [visible(source, 80), visible(where, 300)]))}", "dim"))
    body = text(visible(content, TEXT_CHARACTERS) or "(no text)")
    for line in islice(_wrapped(out, body), 6):
        out.print(text("     ").append_text(line))
    out.print()


def _wrapped(out: Console, body: Any) -> Iterator[Any]:
    yield from body.wrap(out, max(20, out.width - 6))
