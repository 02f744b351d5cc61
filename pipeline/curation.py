"""The main job, from corpus to curated set: read `curate` first.

Everything it calls leaves something on disk in the run directory, and finds it there again on the next call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.concepts.assign import concept_column
from pipeline.concepts.kmeans import Cluster
from pipeline.concepts.spread import measure
from pipeline.concepts.table import concept_table
from pipeline.config import Config, load, parse
from pipeline.corpus.rows import row_column
from pipeline.embed.base import Embed
from pipeline.engine.connect import connect
from pipeline.engine.pool import Pool
from pipeline.output.curated import write_curated
from pipeline.output.handoff import write_handoff
from pipeline.report.page import write_report
from pipeline.run import Run
from pipeline.select.stage import Selection, select


@dataclass(frozen=True)
class Curated:
    """What a run gave: where the files are, how much was kept of how much, and what is missing."""

    run: str
    path: str
    files: list[str]
    rows: int
    rows_kept: int
    tokens_kept: int
    bytes_kept: int
    reasons: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: everything is in; 2: finished, but some shards failed (they are listed in `failures`)."""
        return 2 if self.failures else 0


def curate(
    config: Config | dict[str, Any] | str | os.PathLike[str],
    overrides: list[str] | None = None,
    run: str | None = None,
    pool: Callable[[], Pool] | None = None,
    quiet: bool = False,
) -> Curated:
    """Sieve a corpus as a configuration says: embed, cluster, score, select, write, report.

    `config`: a `Config`, plain data, or the path of a YAML file; `overrides` are `a.b=c` strings for a file.
    `pool` makes the engine; by default the one that `engine.address` names. Raises TamisError for all that a user can
    mend. A second call with the same run directory does only what is missing or stale.
    """
    if not isinstance(config, Config):
        config = parse(config) if isinstance(config, dict) else load(os.fspath(config), overrides, run)
    with Run(config, pool or partial(connect, config.engine), quiet) as active:
        return harvest(active, sieve(active))


def sieve(run: Run) -> Selection:
    """Fill every column that the configuration asks for and choose the rows to keep."""
    config = run.config
    check(run)
    early = [s for s in config.scores if s.needs == "text" and not s.compares_rows]
    late = [s for s in config.scores if s not in early]
    embed = embedding(config)

    base = row_column(
        config.corpus.id is not None, config.corpus.tokenizer, config.corpus.has_text, config.corpus.image is not None
    )
    if run.stale(base):
        run.warm_up()
    for score in early:
        score.fit(run)
    if embed:
        embed.fit(run)
    # One read of the text feeds everything that needs nothing but the text.
    text = [base, *([embed.column(run)] if embed else [])]
    text += [column for score in config.scores for column in score.support(run)]
    run.materialize(list({column.name: column for column in text + [s.column(run) for s in early]}.values()))

    concepts = None
    if config.needs_concepts:
        run.materialize([concept_column(run, config.cluster)])
        concepts = concept_table(run, config.scores)
    for score in late:
        score.fit(run)
    if alone := [s.column(run) for s in late if not s.compares_rows]:
        run.materialize(alone)
    for score in late:
        if score.compares_rows:
            score.fill(run)
    return select(run, config.select, config.scores, concepts)


def check(run: Run) -> None:
    """Raise ConfigError for what can be seen to fail before any work is done."""
    config = run.config
    if config.needs_concepts:
        (config.cluster or Cluster()).concepts(run.rows)
    if config.select.budget.rows is not None:
        config.select.budget.amount(run.rows)


def harvest(run: Run, selection: Selection) -> Curated:
    """Write what was selected, in the forms that people and trainers read."""
    directory, files = write_curated(run, selection)
    write_handoff(run, selection)
    if run.config.output.spread:
        measure(run)
    run.release()  # the report reads little: the driver does it while Ray shuts down
    write_report(run, selection, files)
    run.finish()
    return Curated(
        run=run.store.uri,
        path=directory.uri,
        files=[f["file"] for f in files],
        rows=run.rows,
        rows_kept=selection.rows,
        tokens_kept=selection.tokens,
        bytes_kept=selection.bytes,
        reasons=selection.reasons,
        failures=run.failures,
    )


def embedding(config: Config) -> Embed | None:
    """The embedding that the configuration asks for; LSA where concepts are needed and nothing is said."""
    if config.embed is None and config.needs_vectors:
        from pipeline.embed.lsa import Lsa

        return Lsa()
    return config.embed
