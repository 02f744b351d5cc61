"""`tamis plan`: what a run would read, write, compute and take, before anything runs.

Rates are measured here and now: every text recipe is fitted on at most 2,048 rows out of four shards and then run over
them for up to two seconds. The rest follows from counts: matrix products from FLOPs at the rate of this machine, passes
over thin columns from bytes at a measured rate. Reads the footers of the corpus; writes to a temporary directory alone,
which is removed, and neither makes nor changes the run's.

Trades: time is for cores like these, without Ray's start (about five seconds) and without waiting for an object store;
a fit that asks for more than 2,048 rows takes longer than is said, at most in proportion (LSA: 11 s on 2,048 rows, 15 s
on 10,000). On a corpus of 11,817 rows, columns of numbers came out within 10 % of what is said here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.shards import Shard, compressed_bytes, read_source
from pipeline.corpus.storage import Store, is_remote
from pipeline.engine.parts import part_name
from pipeline.report import measure
from pipeline.report.format import count, duration, plural, short, size, visible

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.embed.base import Embed
    from pipeline.run import Run
    from pipeline.scores.base import Score
    from pipeline.select.compute import Choice

SAMPLE_ROWS, SAMPLE_BYTES, SAMPLE_SHARDS = 2048, 32 << 20, 4
ID_BYTES = 36
"""Of the column `tamis` that a curated row carries: its id as hex digits and its concept; scores come on top."""
THIN_PASSES = 8
"""Passes over thin columns of a selection and what follows: two or three for the threshold, one each for keep flags,
totals, output, hand-off and report."""


@dataclass(frozen=True)
class Stage:
    """Bytes as stored, compressed; `seconds` with all workers; `flops` 0 where they are not known."""

    name: str
    read: float
    written: float
    seconds: float
    flops: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run comes to. `columns` are bytes by column; `free` is None on an object store."""

    run: str
    files: int
    shards: int
    rows: int
    bytes: int
    tokens: float
    tokens_named: str
    sample_rows: int
    workers: int
    stages: tuple[Stage, ...]
    columns: dict[str, float]
    artifacts: int
    kept_rows: float
    curated: float
    worker_memory: int
    free: int | None
    warnings: tuple[str, ...]
    training: tuple[Choice, ...] = ()
    """Of a budget of compute: what the law chooses for a tenth of it, for it, and for ten times as much."""

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.stages)

    @property
    def stored(self) -> float:
        """Bytes that the run comes to hold."""
        return sum(self.columns.values()) + self.artifacts + self.curated


def make_plan(config: Config) -> Plan:
    """Measure and add up. Raises what `curate` would raise at once, such as ConfigError, CorpusError, MissingExtra."""
    from pipeline.engine.pool import InlinePool
    from pipeline.run import Run

    with tempfile.TemporaryDirectory(prefix="tamis-plan-") as directory:
        listed = Path(directory, "corpus")
        _copy_listing(Store(config.run), Store(str(listed)))
        with Run(config.model_copy(update={"run": str(listed)}), InlinePool, quiet=True) as whole:
            sample = sample_table(whole)
            small = _small_config(config, sample, Path(directory))
            with Run(small, InlinePool, quiet=True) as run:
                return _add_up(Scene(config, whole, run, sample, Path(directory)))


@dataclass(frozen=True)
class Scene:
    """`whole` is the corpus, only listed; `run` is the sample, on which recipes are fitted and run."""

    config: Config
    whole: Run
    run: Run
    sample: pa.Table
    scratch: Path

    @property
    def rows(self) -> int:
        return self.whole.rows

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.whole.live)

    @property
    def workers(self) -> int:
        """As configured, or as many as this machine has cores for."""
        engine = self.config.engine
        if engine.address == "inline":
            return 1
        return engine.workers or max(1, int((os.cpu_count() or 1) / engine.cpus))

    @property
    def busy(self) -> int:
        """Workers that have something to do: no more than there are shards."""
        return min(self.workers, len(self.whole.live))

    def stored(self, columns: Sequence[str]) -> float:
        """Compressed bytes of some source columns, by their share in the footers of some shards."""
        part = there = 0
        for shard in _spread(self.whole.live):
            sizes = compressed_bytes(shard.pieces[0])
            there += sum(sizes.values())
            part += sum(
                sizes[name] for name in {c if c in sizes else c.partition(".")[0] for c in columns} if name in sizes
            )
        return self.bytes * part / max(there, 1)


def _add_up(scene: Scene) -> Plan:
    scene = replace(scene, config=with_stored_law(scene.config))
    config, rows = scene.config, scene.rows
    stages, columns, dims = text_stages(scene)
    if config.needs_concepts:
        stages += concept_stages(scene, dims)
        columns["concept"] = 8.0 * rows
    names = [s.column_name for s in config.scores]
    columns |= {name: 4.0 * rows for name in names if name not in columns}
    if len(config.select.ranking(names)) > 1:
        columns["combined"] = 4.0 * rows
    columns["select"] = 1.0 * rows
    thin = THIN_PASSES * (columns["row"] + sum(columns[name] for name in names))
    stages.append(
        Stage("select and report", thin, columns["select"], thin / measure.thin_rate(scene.scratch) / scene.busy)
    )

    row = stored_sizes(scene.run)
    available = {"rows": float(rows), "tokens": rows * row["tokens"], "bytes": rows * row["bytes"]}
    wanted = wanted_amount(config, available)
    kept = min(1.0, wanted / max(available[config.select.budget.unit], 1.0)) * rows
    carried = config.corpus.columns or scene.run.schema.names
    source = scene.stored(carried)
    writing, width = measure.writing_rate(scene.sample.select(carried), scene.scratch / "out.parquet")
    width += ID_BYTES + 4 * len(names) if config.output.scores else 0
    seconds = rows * measure.reading_rate(scene.run, carried) + kept * writing
    stages.append(Stage("write", source, kept * width, seconds / scene.busy))
    plan = Plan(
        run=config.run,
        files=scene.whole.manifest["corpus"]["files"],
        shards=len(scene.whole.live),
        rows=rows,
        bytes=scene.bytes,
        tokens=available["tokens"],
        tokens_named=scene.whole.tokens_named,
        sample_rows=scene.sample.num_rows,
        workers=scene.workers,
        stages=tuple(stages),
        columns=columns,
        artifacts=sum(scene.run.store.files("artifacts", recursive=True).values()),
        kept_rows=kept,
        curated=kept * width,
        worker_memory=measure.peak_memory(),
        free=_free(config.run),
        warnings=(),
        training=training(config, available["tokens"]),
    )
    return replace(plan, warnings=tuple(warnings(scene, plan, wanted, available)))


def text_stages(scene: Scene) -> tuple[list[Stage], dict[str, float], int]:
    """Fits, and the one pass in which everything that needs the text alone is computed; bytes by column, dimensions."""
    from pipeline.corpus.rows import row_column
    from pipeline.curation import embedding

    config, run, rows = scene.config, scene.run, scene.rows
    corpus = config.corpus
    content = [role for role, there in (("text", corpus.has_text), ("image", corpus.image)) if there]
    asked = [
        *(name for role in content for name in run.layout.source_columns(role)),
        *([corpus.id] if corpus.id else []),
    ]
    read = scene.stored(asked)
    base = row_column(corpus.id is not None, corpus.tokenizer, corpus.has_text, corpus.image is not None)
    run.materialize([base])
    rates, stages, dims = {"row": measure.column_rate(run, base)}, [], 0
    embed = embedding(config)
    of_rows = [s for s in config.scores if s.needs == "text" and not s.compares_rows]
    recipes: list[Embed | Score] = [*([embed] if embed else []), *of_rows]
    for recipe in recipes:
        before = len(run.manifest["passes"])
        recipe.fit(run)
        stages += [_fit_stage(scene, p, read) for p in run.manifest["passes"][before:]]
    support = {c.name: c for score in config.scores for c in score.support(run)}
    run.materialize(list(support.values()))  # what reads them has to find them
    for column in [*support.values(), *(recipe.column(run) for recipe in recipes)]:
        rates[column.name] = measure.column_rate(run, column)
        if column.name == "embed":
            dims = column.fields.field("vector").type.list_size
    for score in config.scores:
        if score.needs == "text" and score.compares_rows:
            before = len(run.manifest["passes"])
            score.fit(run)
            score.fill(run)
            stages += [_fit_stage(scene, p, read) for p in run.manifest["passes"][before:]]
    columns = {name: rate.width * rows for name, rate in rates.items()}
    seconds = measure.reading_rate(run, asked) + sum(rate.seconds for rate in rates.values())
    seconds = rows * seconds / scene.busy + sum(rate.load for rate in rates.values())
    flops = model_flops(embed, rows * stored_sizes(run)["bytes"] / 4) if embed else 0.0
    return [*stages, Stage("+".join(rates), read, sum(columns.values()), seconds, flops)], columns, dims


def _fit_stage(scene: Scene, measured: dict[str, Any], read: float) -> Stage:
    """A pass of a fit: one over rows grows with the corpus, one in a single worker is what it was on the sample."""
    if not measured["rows"]:
        return Stage(measured["pass"], 0, 0, measured["seconds"])
    return Stage(measured["pass"], read, 0, measured["seconds"] * scene.rows / measured["rows"] / scene.busy)


def concept_stages(scene: Scene, dims: int) -> list[Stage]:
    """K-means on a sample in one worker, full Lloyd where asked, and the assignment of every row."""
    from pipeline.concepts.kmeans import Cluster

    cluster, rows = scene.config.cluster or Cluster(), scene.rows
    k = cluster.concepts(rows)
    vectors = 2.0 * dims * rows
    rate = measure.matrix_rate(dims, scene.config.engine.cpus)
    thin = measure.thin_rate(scene.scratch) * scene.busy
    fit = 2.0 * k * dims * min(k * cluster.sample_per_concept, rows) * cluster.iterations
    one = 2.0 * k * dims * rows
    stages = [Stage(f"k-means, k = {count(k)}", vectors, 4.0 * k * dims, fit / rate + vectors / thin, fit)]
    if cluster.full_lloyd:
        times = cluster.full_iterations
        seconds = times * (one / rate / scene.busy + vectors / thin)
        stages.append(Stage(f"Lloyd, {times} times at the most", times * vectors, 4.0 * k * dims, seconds, times * one))
    return [*stages, Stage("concept", vectors, 8.0 * rows, one / rate / scene.busy + vectors / thin, one)]


def model_flops(embed: Embed, tokens: float) -> float:
    """2 a weight and token for a transformer whose safetensors lie in a local folder; embedding tables only look up."""
    model = getattr(embed, "model", None)
    weights = 0
    for file in Path(model).expanduser().glob("*.safetensors") if model else ():
        with file.open("rb") as source:
            header = json.loads(source.read(struct.unpack("<Q", source.read(8))[0]))
        tensors = {n: t["shape"] for n, t in header.items() if n != "__metadata__" and "embed" not in n}
        weights += sum(math.prod(shape) for shape in tensors.values() if len(shape) > 1)
    return 2.0 * weights * tokens


def stored_sizes(run: Run) -> dict[str, float]:
    """Mean tokens and bytes of the sample's rows."""
    store = run.store
    with store.filesystem.open_input_file(store.at("columns", "row", part_name(run.live[0].index))) as source:
        table = pq.read_table(source, columns=["tokens", "bytes"])
    return {name: pc.mean(table[name]).as_py() or 0.0 for name in table.column_names}


def wanted_amount(config: Config, available: dict[str, float]) -> float:
    """The budget in its unit."""
    budget = config.select.budget
    if budget.compute is not None:
        choice = budget.choice(int(available["tokens"]))
        return float(choice.best.tokens if choice else available["tokens"])
    if budget.fraction is not None:
        return budget.fraction * available[budget.unit]
    return float(getattr(budget, budget.unit))


def with_stored_law(config: Config) -> Config:
    """A budget of compute whose proxies have been trained gets the law that they gave."""
    from pipeline.select.compute import load_law
    from pipeline.select.proxies import LAW, QQT

    budget = config.select.budget
    file = ("artifacts", QQT, LAW)
    if budget.proxies is None or LAW not in Store(config.run).files(*file[:-1]):
        return config
    law = load_law(Store(config.run).locate(*file))
    budget = budget.model_copy(update={"law": law, "proxies": None})
    return config.model_copy(update={"select": config.select.model_copy(update={"budget": budget})})


def training(config: Config, tokens: float) -> tuple[Choice, ...]:
    from pipeline.select.compute import choose

    budget = config.select.budget
    if budget.compute is None or budget.params is None or budget.law is None:
        return ()
    return tuple(choose(budget.law, budget.compute * times, budget.params, tokens) for times in (0.1, 1.0, 10.0))


def warnings(scene: Scene, plan: Plan, wanted: float, available: dict[str, float]) -> Iterator[str]:
    """What would stop the run, or make it slower or larger than its owner thinks."""
    engine, unit = scene.config.engine, scene.config.select.budget.unit
    if scene.config.select.budget.proxies is not None:
        yield "select.budget.proxies: how much will be kept is known once they have been trained; all is counted here"
    if wanted > available[unit]:
        there = f"{'' if unit == 'rows' else 'about '}{count(available[unit])}"
        yield f"select.budget.{unit}: {count(wanted)} is more than the corpus has, {there}: lower it"
    if failures := scene.whole.failures:
        first = f"{failures[0]['file']}: {failures[0]['reason']}"
        yield f"{plural(len(failures), 'file')} cannot be read and will be left out; the first: {first}"
    bad = scene.run.manifest["columns"]["row"]["quarantined"]
    if bad > engine.max_bad_fraction * plan.sample_rows:
        yield (
            f"{count(bad)} of {count(plan.sample_rows)} sampled rows have no usable text, more than "
            f"engine.max_bad_fraction = {engine.max_bad_fraction:g} allows: the run would stop"
        )
    if plan.free is not None:
        need = plan.stored - sum(Store(plan.run).files(recursive=True).values())  # what is there is written over
        if need > plan.free:
            yield f"{size(need)} more are needed in {plan.run}, {size(plan.free)} are free: make room, or use --run"
    if plan.shards < plan.workers:
        yield f"{plan.workers} workers for {plan.shards} shards: lower corpus.shard_mb to give all of them work"
    if engine.address in (None, "inline"):
        memory, need = measure.machine_memory(), plan.workers * plan.worker_memory
        if memory and need > memory:
            yield f"{plan.workers} workers need about {size(need)} of memory, of {size(memory)}: lower engine.workers"
    elif engine.workers is None:
        yield f"engine.workers is not set: time is for {plan.workers} workers, whatever the cluster has"
    if engine.gpus:
        yield "engine.gpus: models were measured here, on the CPU where there is no GPU; see FLOPs"


def _spread(shards: Sequence[Shard]) -> list[Shard]:
    """Up to four shards that stand evenly over the corpus."""
    return [shards[i] for i in np.unique(np.linspace(0, len(shards) - 1, SAMPLE_SHARDS).astype(int))]


def sample_table(run: Run) -> pa.Table:
    """The first rows of up to four shards."""
    chosen = _spread(run.live)
    tables = []
    for shard in chosen:
        batch = next(read_source(shard, run.schema.names, SAMPLE_ROWS // len(chosen), run.layout.image))
        fitting = SAMPLE_BYTES // len(chosen) * batch.num_rows // max(batch.nbytes, 1)
        tables.append(pa.Table.from_batches([batch.slice(0, max(1, fitting))]))
    return pa.concat_tables(tables).replace_schema_metadata(None)


def _small_config(config: Config, sample: pa.Table, directory: Path) -> Config:
    """The same recipes over the sample, in a directory of its own."""
    path = directory / "sample.parquet"
    pq.write_table(sample, path, compression="zstd")
    corpus = config.corpus.model_copy(update={"path": str(path), "shard_mb": 1024.0, "refresh": False})
    engine = config.engine.model_copy(update={"address": "inline", "workers": 1, "max_bad_fraction": 1.0})
    return config.model_copy(update={"corpus": corpus, "engine": engine, "run": str(directory / "run")})


def _copy_listing(source: Store, target: Store) -> None:
    """What a run has listed need not be listed again, which counts where there are six million objects."""
    for name in source.files("corpus", recursive=True):
        target.write(source.read("corpus", *name.split("/")), "corpus", *name.split("/"))


def _free(run: str) -> int | None:
    """Bytes free where a run will be; None on an object store."""
    if is_remote(run):
        return None
    place = Path(Store(run).path)
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


TIMES = ("C / 10", "C", "10 C")


def curve_lines(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """A line a pool: its tokens, share and epochs, and its predicted error for every compute, the least one marked."""
    now = choices[1]
    lines = []
    for i, pool in enumerate(now.curve):
        errors = [f"{c.curve[i].error:.5g}{' *' if c.curve[i] == c.best else '  '}" for c in choices]
        lines.append((short(pool.tokens), f"{pool.fraction:.1%}", f"{pool.epochs:.3g}", *errors))
    return lines


def print_plan(plan: Plan) -> None:
    from pipeline.report.terminal import console, print_table, text

    def line(name: str, read: float, written: float, flops: float, seconds: float) -> tuple[str, ...]:
        amounts = [size(b) if b else "" for b in (read, written)]
        return visible(name, 70), *amounts, short(flops) if flops else "", duration(seconds)

    out, stages = console(), plan.stages
    corpus = f"{count(plan.rows)} rows, about {short(plan.tokens)} tokens ({plan.tokens_named})"
    files = f"{size(plan.bytes)} in {plural(plan.files, 'file')}, {plural(plan.shards, 'shard')}"
    out.print(text(f"{corpus}, {files}", "bold"))
    about = f"Measured on {count(plan.sample_rows)} of its rows on this machine; time is for"
    out.print(text(f"{about} {plural(plan.workers, 'worker')}, without Ray's start."))
    out.print()
    lines = [line(s.name, s.read, s.written, s.flops, s.seconds) for s in stages]
    sums = (sum(getattr(s, name) for s in stages) for name in ("read", "written", "flops", "seconds"))
    lines.append(line("all", *sums))
    print_table(out, ["stage", "reads", "writes", "FLOPs", "time"], lines, "tnnnn")
    out.print()
    stored = [(visible(name, 60), size(b / plan.rows), size(b)) for name, b in plan.columns.items()]
    stored.append(("artifacts", "", size(plan.artifacts)))
    stored.append(("curated", size(plan.curated / max(plan.kept_rows, 1)), size(plan.curated)))
    stored.append(("all", "", size(plan.stored)))
    print_table(out, ["stored", "a row", "in all"], stored, "lnn")
    out.print()
    if plan.training:
        print_table(out, ["tokens kept", "of all", "epochs", *TIMES], curve_lines(plan.training), "nnnnnn")
        out.print(text("Predicted error by tokens kept, for a tenth of the compute, for it and for ten times as much;"))
        out.print(text("the least is marked."))
        out.print(*(text(visible(f"{note[:1].upper()}{note[1:]}.", 400)) for note in plan.training[1].notes), sep="\n")
        out.print()
    free = "" if plan.free is None else f", {size(plan.free)} free"
    out.print(text(f"Keeps   about {count(plan.kept_rows)} rows"))
    out.print(text(f"Disk    {size(plan.stored)} in {plan.run}{free}"))
    out.print(text(f"Memory  about {size(plan.worker_memory)} a worker"))
    for warning in plan.warnings:
        out.print(text(f"Warning {visible(warning, 400)}", "yellow"))
