"""`tamis fit`: fit the artifacts of one criterion of a configuration, and score nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pipeline.config import Config
from pipeline.curation import sieve
from pipeline.engine.connect import connect
from pipeline.engine.pool import Pool
from pipeline.errors import ConfigError
from pipeline.run import Run
from pipeline.select.proxies import QQT


def fit(config: Config, kind: str, pool: Callable[[], Pool] | None = None, quiet: bool = False) -> dict[str, str]:
    """Fit the scores of a kind (or of that name); returns where their artifacts are, by name, in the order of fitting.

    The run then holds them for `curate`, whose configuration must be the same. `pool` makes the engine, as in `curate`.
    The kind `qqt` is the law of a budget of compute: it is fitted to the order of the rows, so these are scored.
    Raises ConfigError where the configuration has no such score, or one that learns from vectors or concepts.
    """
    if kind == QQT:
        return _fit_law(config, pool or partial(connect, config.engine), quiet)
    scores = [s for s in config.scores if kind in (s.kind, s.column_name)]
    if not scores:
        there = ", ".join(dict.fromkeys(s.kind for s in config.scores))
        raise ConfigError(f"scores: the configuration has none of kind {kind!r}; it has {there}")
    if later := next((s for s in scores if s.needs != "text"), None):
        raise ConfigError(f"{later.column_name} learns from {later.needs}, which `tamis curate` makes first: run that")
    with Run(config, pool or partial(connect, config.engine), quiet) as run:
        before = run.manifest.pop("artifacts", {})
        for score in scores:
            score.fit(run)
        fitted = run.manifest.get("artifacts", {})
        run.manifest |= {"artifacts": before | fitted, "status": "fitted"}
        run.manifest.pop("error", None)
        run.save()
        return {name: run.store.locate("artifacts", name) for name in fitted}


def _fit_law(config: Config, pool: Callable[[], Pool], quiet: bool) -> dict[str, str]:
    if config.select.budget.proxies is None:
        raise ConfigError("select.budget: it has no `proxies` to fit a law to: write {compute, params, proxies}")
    with Run(config, pool, quiet) as run:
        sieve(run)
        run.manifest["status"] = "fitted"
        run.save()
        return {QQT: run.store.locate("artifacts", QQT)}
