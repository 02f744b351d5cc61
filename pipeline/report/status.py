"""`tamis status`: how far a run is and what failed, from what lies in its directory.

Changes nothing, so it works while the run goes on, from another machine, and on an object store. A part counts as done
when it is there; whether it is of the present configuration only the run itself finds out.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from pyarrow import fs as pafs

from pipeline.corpus.storage import Store
from pipeline.lock import NAME, NO_FLOCK, STALE_S
from pipeline.report.format import count, duration, plural, short, size, trouble, visible
from pipeline.report.stored import Stored, quarantined
from pipeline.report.terminal import console, print_failures, print_table, text

if TYPE_CHECKING:
    from rich.console import Console

QUARANTINE_SHOWN = 10


def print_status(run_uri: str) -> int:
    """Print the state of a run. Returns what `tamis curate` would: 0 done or at work, 1 failed or broken off, 2 done
    but for failed shards. Raises TamisError where there is no run."""
    run, out = Stored.at(run_uri), console()
    owner = holder(run.store)
    told, code = state(run, owner)
    out.print(text(told, "bold" if code == 0 else "bold red"))
    corpus = run.manifest.get("corpus")
    if corpus:
        cut = f"{plural(corpus['shards'], 'shard')} of {plural(corpus['files'], 'file')}"
        out.print(text(f"{count(corpus['rows'])} rows in {cut}"))
    print_columns(out, run, owner)
    print_passes(out, run)
    print_quarantine(out, run)
    print_failures(out, run.manifest.get("failed") or [])
    return code


def holder(store: Store) -> dict[str, Any] | None:
    """Who works in a run directory (host, pid, since); None where nobody does."""
    try:
        owner: dict[str, Any] = json.loads(store.read(NAME))
    except (FileNotFoundError, ValueError):
        return None
    held = _locked(store.at(NAME)) if store.local else None
    if held is None:
        held = time.time() - owner.get("beat", 0) < STALE_S
    return owner if held else None


def _locked(path: str) -> bool | None:
    """Whether a process holds the lock on a file; None where the file system has no locks."""
    try:
        import fcntl

        file = os.open(path, os.O_RDONLY)
    except (ImportError, FileNotFoundError):
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in NO_FLOCK else True
    finally:
        os.close(file)
    return False


def state(run: Stored, owner: dict[str, Any] | None) -> tuple[str, int]:
    """The state in a sentence, and the exit code that goes with it."""
    status = run.manifest.get("status", "")
    if owner is not None:
        since = duration(time.time() - owner["since"])
        return f"At work for {since}: process {owner['pid']} on {visible(owner['host'], 80)}", 0
    if status == "done":
        return f"Done: {_curated(run)}", 0
    if status == "finished with failed shards":
        return f"Finished, but some of the corpus is left out: {_curated(run)}", 2
    if status == "fitted":
        return "Fitted: nothing is selected yet; `tamis curate` goes on from here", 0
    if status == "failed":
        return f"Failed: {visible(str(run.manifest.get('error', '')), 1000)}", 1
    return "Broken off: no process works here. The same command continues where it stopped", 1


def _curated(run: Stored) -> str:
    curated = run.manifest.get("curated", {"files": [], "path": run.store.locate("curated")})
    rows = sum(f["rows"] for f in curated["files"])
    return f"{count(rows)} rows in {plural(len(curated['files']), 'file')} in {curated['path']}"


def print_columns(out: Console, run: Stored, owner: dict[str, Any] | None) -> None:
    """Parts of every column that are there; while a run is at work, also how many of them it has written."""
    root = run.store.at("columns")
    selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
    parts: dict[str, list[pafs.FileInfo]] = {}
    for info in run.store.filesystem.get_file_info(selector):
        column, _, name = info.path[len(root) + 1 :].partition("/")
        if name.endswith(".parquet"):
            parts.setdefault(column, []).append(info)
    known = run.manifest.get("columns", {})
    total = run.manifest.get("corpus", {}).get("shards", 0)
    lines = []
    for column in [*(c for c in known if c in parts), *sorted(c for c in parts if c not in known)]:
        infos = parts[column]
        new = sum((i.mtime_ns or 0) >= owner["since"] * 1e9 for i in infos) if owner else 0
        bad = known.get(column, {}).get("quarantined", 0)
        lines.append(
            (
                visible(column, 60),
                f"{count(len(infos))} of {count(total)}",
                count(new) if owner else "",
                size(sum(i.size for i in infos)),
                count(bad),
            )
        )
    if lines:
        out.print()
        print_table(out, ["column", "parts", "new" if owner else "", "stored", "quarantined"], lines, "lnnnn")


def print_passes(out: Console, run: Stored) -> None:
    """Passes of the last session, as far as the manifest has been saved."""
    lines = [
        (
            visible(p["pass"], 60),
            count(p["units"]),
            count(p["rows"]) if p["rows"] else "",
            short(p["rows"] / max(p["seconds"], 1e-3)) if p["rows"] else "",
            duration(p["seconds"]),
            trouble(p),
        )
        for p in run.manifest.get("passes", [])
    ]
    if lines:
        out.print()
        print_table(out, ["pass", "units", "rows", "rows/s", "time", ""], lines, "tnnnnl")


def print_quarantine(out: Console, run: Stored) -> None:
    """The first rows in quarantine, with their reasons."""
    bad = [name for name, c in run.manifest.get("columns", {}).items() if c["quarantined"]]
    if not bad:
        return
    found = quarantined(run.store, bad)
    lines = [
        (visible(q["reason"], 100), q["column"], f"{visible(q['file'], 200)}:{q['row_group']}:{q['row']}")
        for q in found.slice(0, QUARANTINE_SHOWN).to_pylist()
    ]
    out.print()
    out.print(text(f"Quarantine, the first {len(lines)} rows; {run.store.locate('quarantine')} has all:"))
    print_table(out, ["reason", "column", "file:row group:row"], lines, "llt")
