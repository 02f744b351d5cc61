"""What the scores of a comparison cost: worker-seconds as they were measured, kept in `compare/costs.json` of the run.

A column's seconds are noted when it is computed, under its fingerprint, so that a comparison that is continued knows
what the first try took. A column that was there before anybody measured has no cost, and neither has a criterion that
reads it: None, not 0. Seconds of a column that was computed in part, because a try was broken off, are those of the
rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from pipeline.run import Run

FILE = ("compare", "costs.json")


def note(run: Run, columns: Sequence[str], seconds: float) -> None:
    """Note wall seconds that some columns took together, in equal parts, for those that this pass computed."""
    entries = [run.manifest["columns"][name] for name in columns]
    new = [e["fingerprint"] for e in entries if e["computed"]]
    if new:
        costs = known(run) | dict.fromkeys(new, seconds * workers(run) / len(new))
        run.store.write(json.dumps(costs, indent=2).encode(), *FILE)


def cost(run: Run, columns: Sequence[str]) -> float | None:
    """Worker-seconds of some columns; None where those of one are not known."""
    costs = known(run)
    found = [costs.get(run.manifest["columns"][name]["fingerprint"]) for name in columns]
    return None if None in found else float(sum(f for f in found if f is not None))


def known(run: Run) -> dict[str, float]:
    try:
        return dict(json.loads(run.store.read(*FILE)))
    except FileNotFoundError:
        return {}


def workers(run: Run) -> int:
    """Workers that a pass has."""
    engine = run.config.engine
    if engine.address == "inline":
        return 1
    return engine.workers or max(1, int((os.cpu_count() or 1) / engine.cpus))
