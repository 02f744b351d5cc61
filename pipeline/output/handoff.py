"""The hand-off: two disjoint subsets of the curated set, named in `handoff.json`, for whoever compresses a model.

`calibration` is a few hundred rows with equal shares of every concept, `recovery` a token budget drawn at random from
the rest. Neither holds a row of the nanochat layout's validation file. Both are Parquet below `<run>/handoff/`, in the
source's schema, and the file says so in the words that compression tools use for their arguments. Where the output
rewrites texts, theirs are shortened as well; rows are drawn by their original tokens. For a budget of compute,
`training` says how many tokens a trainer's loader is to read, and how often it repeats the curated set for that.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.corpus.shards import MIB
from pipeline.errors import BudgetTooSmall
from pipeline.output.curated import VALIDATION, validation_rows
from pipeline.output.write import Subset, sweep, write_subset
from pipeline.run import Run
from pipeline.select.stage import Selection
from pipeline.select.subset import Drawn, subset

PREFIX = "handoff_"
CALIBRATION, RECOVERY = f"{PREFIX}calibration", f"{PREFIX}recovery"
"""Columns of the keep flags; a score may be called `calibration`."""


def write_handoff(run: Run, selection: Selection) -> None:
    """Draw and write both subsets and `handoff.json`; one that the configuration sets to 0 is left out."""
    wanted = run.config.handoff
    concepts = selection.concepts()
    described: dict[str, Any] = {
        "format": "tamis-handoff-1",
        "selection": run.plans["select"].fingerprint,
        "text_column": run.config.corpus.text,
        **({"chat": run.manifest["chat"]} if "chat" in run.manifest else {}),
        **({"image_column": run.config.corpus.image} if run.config.corpus.image else {}),
        "tokens_counted_by": run.tokens_named,
        **({"training": selection.training} if selection.training else {}),
    }
    drawn: list[str] = []
    left = selection.rows
    if run.config.output.layout == "nanochat":  # what a trainer validates with is in neither
        drawn, left = [VALIDATION], left - validation_rows(selection)
    if wanted.calibration_rows:
        rows = min(wanted.calibration_rows, max(1, left // 2))  # something must be left to recover on
        number = 0 if concepts is None else concepts.num_rows
        calibration = subset(run, CALIBRATION, rows=rows, seed=run.seed, without=tuple(drawn), concepts=number)
        described["calibration"] = _write(run, calibration)
        drawn, left = [*drawn, CALIBRATION], left - calibration.rows
    if wanted.recovery_tokens and left:
        try:
            recovery = subset(run, RECOVERY, tokens=wanted.recovery_tokens, seed=run.seed, without=tuple(drawn))
            described["recovery"] = _write(run, recovery)
        except BudgetTooSmall as error:  # no reason to lose a curated set that is finished
            described["recovery"] = {"num_samples": 0, "why": f"handoff.recovery_tokens: {error}"}
    for name in {"calibration", "recovery"} - described.keys():
        run.store.remove("handoff", name)
    run.store.write(json.dumps(described, indent=2).encode(), "handoff.json")


def _write(run: Run, drawn: Drawn) -> dict[str, Any]:
    name = drawn.name.removeprefix(PREFIX)
    directory = run.store.child("handoff", name)
    columns = tuple(run.config.corpus.columns or run.schema.names)
    output = run.config.output
    kept = Subset(
        drawn.name,
        directory,
        "part-{:05d}.parquet",
        columns,
        row_group_rows=output.row_group_rows,
        rewrite=output.rewrite,
    )
    files = write_subset(run, kept, output.file_mb * MIB, f"write {name}")
    sweep(directory, files)
    return {
        "dataset": directory.uri,
        "data_files": f"{directory.uri}/*.parquet",
        "num_samples": sum(f["rows"] for f in files),
        "fingerprint": run.plans[drawn.name].fingerprint,
        "files": [{"file": f["file"], "rows": f["rows"], "fingerprint": f["fingerprint"]} for f in files],
    }
