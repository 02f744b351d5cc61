"""The curated set: the kept rows as Parquet, a card that says what they are, and the lineage of every file.

`layout: parquet` keeps the source's schema and row order and may add a struct column `tamis` (id, concept, scores).
`layout: nanochat` writes what that trainer reads: `shard_00000.parquet`, one `text` column, row groups of 1,024 rows to
stripe over ranks, and a last shard for validation, here a random sample of the kept rows rather than their tail.

With `output.rewrite` the kept texts are shortened first (`pipeline.rewrite`): selection and budget count the original
tokens, the files hold what is left of the same rows, and `tamis` says of every row which characters of its original
were kept and removed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.corpus.shards import MIB
from pipeline.corpus.storage import Store
from pipeline.errors import TamisError
from pipeline.output.card import write_card
from pipeline.output.write import TAMIS, Annotation, Subset, sweep, write_subset
from pipeline.rewrite.base import REWRITE, Shortened
from pipeline.run import Run
from pipeline.select.stage import Selection
from pipeline.select.subset import subset

VALIDATION = "validation"
VALIDATION_SHARE = 0.01
VALIDATION_ROWS = 50_000
NANOCHAT_GROUP = 1024


def write_curated(run: Run, selection: Selection) -> tuple[Store, list[dict[str, Any]]]:
    """Write the curated set. Returns its directory and the lineage of its files."""
    output = run.config.output
    directory = Store(output.path) if output.path else run.store.child("curated")
    file_bytes = output.file_mb * MIB
    if output.rewrite:
        output.rewrite.fit(run)
        run.materialize([output.rewrite.column(run)])
    if output.layout == "nanochat":
        files = _nanochat(run, selection, directory, file_bytes)
    else:
        notes = score_annotations(run) if output.scores else ()
        columns = run.config.corpus.columns or run.schema.names
        kept = Subset(
            keep="select",
            directory=directory,
            pattern="part-{:05d}.parquet",
            columns=tuple(c for c in columns if not (notes and c == TAMIS)),  # that of an earlier curation is replaced
            annotations=notes,
            row_group_rows=output.row_group_rows,
            rewrite=output.rewrite,
        )
        files = write_subset(run, kept, file_bytes, "write")
    sweep(directory, files)
    rewritten = shortened(run) if output.rewrite else None
    write_card(run, selection, directory, files, rewritten)
    run.manifest["curated"] = {"path": directory.uri, "files": files} | ({"rewritten": rewritten} if rewritten else {})
    run.save()
    return directory, files


def score_annotations(run: Run) -> tuple[Annotation, ...]:
    """Row id, concept and every score, as far as the run has them."""
    found = [Annotation("id", "row", "key")]
    if "concept" in run.plans:
        found.append(Annotation("concept", "concept", "concept"))
    found += [Annotation(s.column_name, s.column_name, "score") for s in run.config.scores]
    found += [Annotation(name, s.column_name, field) for s in run.config.scores for name, field in s.along.items()]
    if run.config.output.rewrite:
        found += [Annotation(name, REWRITE, name) for name in ("kept", "removed", "kept_fraction")]
    return tuple(found)


def shortened(run: Run) -> dict[str, int]:
    """What the rewrite left: `rows` that it looked at, how many it `shortened`, their `tokens` and `bytes` now."""
    return {name: int(total[0]) for name, total in run.aggregate(Shortened()).items()}


def validation_rows(selection: Selection) -> int:
    """Rows that the nanochat layout keeps for validation."""
    return min(VALIDATION_ROWS, max(1, int(selection.rows * VALIDATION_SHARE)))


def _nanochat(run: Run, selection: Selection, directory: Store, file_bytes: float) -> list[dict[str, Any]]:
    if selection.rows < 2:
        raise TamisError("output.layout: nanochat needs two rows, one of them to validate with; one is kept")
    subset(run, VALIDATION, rows=validation_rows(selection), seed=run.seed)
    assert run.config.corpus.text is not None  # the configuration refuses it
    train = Subset(
        keep="select",
        without=VALIDATION,
        directory=directory,
        pattern="shard_{:05d}.parquet",
        columns=(run.config.corpus.text,),
        names=("text",),
        row_group_rows=NANOCHAT_GROUP,
        rewrite=run.config.output.rewrite,
    )
    files = write_subset(run, train, file_bytes, "write")
    validation = replace(train, keep=VALIDATION, without=None, first=len(files))
    return [*files, *write_subset(run, validation, float("inf"), "write val")]
