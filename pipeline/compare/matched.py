"""`tamis compare CONFIG`: what curation and pruning buy at equal FLOPs. Read `compare_matched` first.

Every arm (`pipeline.compare.arms`) spends the same budget: what it costs to score the pool and to measure importance
comes off the tokens that it trains on (evaluation.md, section 3). All train on blocks of one length, with one batch,
tokenizer and family of optimizer, from as many seeds; each seed has its own random rows, its own calibration draw and
its own order of blocks. They are measured on documents that none of them has seen: those set apart by hash of their
text, in the pool and in the curated set.

What it leaves in the run directory:

    parent/, random-<seed>/   the model to begin with; runs that drew random rows of the pool, as many as were curated
    blocks/, held_out/        what is trained and measured on
    students/                 the cut models, before healing
    arms/<arm>-<seed>/        what came of every training: result.json, values.npz, metrics.jsonl
    compare/                  matched.json, matched.md, index.html

What it trades away: models of this size tell which data heal a cut better at this budget, no more. The intervals over
runs count seeds, random draws and calibration draws together.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from pipeline.artifact import Artifact, BuildTask
from pipeline.compare.arms import CUT, DESIGNS, PARENT, Data, Design, by_chance, counts, from_scratch, per_token
from pipeline.compare.flops import ModelShape, full, gradients, hessian, hessian_solve, layerwise, statistics
from pipeline.compare.ledger import Arm, Ledger, Plan, plan
from pipeline.compare.measures.language import divergence
from pipeline.compare.measures.latency import latency
from pipeline.compare.measures.suite import Latency, Suite, measure_all
from pipeline.compare.results import Results, judge
from pipeline.compare.scoring import Scored, scoring_cost
from pipeline.compress import folder
from pipeline.compress.compression import shrink
from pipeline.compress.config import CalibrationData, RecoveryOf, Small, StepOf
from pipeline.compress.data import Source, curated, pack_blocks, parquet, set_apart
from pipeline.compress.parent import parent_folder
from pipeline.compress.recover.distill import Distill
from pipeline.compress.recover.full import Full
from pipeline.compress.steps.width import Width
from pipeline.config import Config, EngineConfig, Model, parse
from pipeline.corpus.storage import Store, is_remote
from pipeline.curation import curate
from pipeline.engine import threads
from pipeline.engine.connect import connect
from pipeline.engine.progress import stage
from pipeline.errors import ConfigError, TamisError
from pipeline.lock import RunLock
from pipeline.models.files import check_installed, folder_digest
from pipeline.recipe import Resources, fingerprint
from pipeline.scores.random import Random
from pipeline.select.config import Budget, Select

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

VERSION = 1
DUPLICATES = ("exact_duplicates", "fuzzy_duplicates", "semantic_duplicates")
"""Scores that random rows pass as well, so that curation is not credited for deduplication."""
DOMAIN_BYTES = 400_000
"""Text of each held-out domain that is measured on, at the most."""
POOL = "pool"
GRAM = {"obs", "refit", "scalar"}
"""Parts of a width step that take Gram matrices."""


class Matched(Model):
    """A parent, what is cut from it, the data, and the budget that all arms share."""

    model: str | Small = Field(description="the parent: folder, hf://org/name, or a small model to train here")
    curated: str = Field(description="directory of a curated run; its corpus is the pool that random rows come from")
    steps: list[StepOf] = Field(min_length=1, description="what makes the student: width, or depth by whole blocks")
    recover: RecoveryOf = Full()
    distill: RecoveryOf = Distill()
    scratch_lr: float | None = Field(None, gt=0, description="learning rate from scratch (default: that of `recover`)")
    flops: float | None = Field(None, gt=0, description="budget of every arm")
    tokens: int | None = Field(None, ge=1, description="or: the budget is what training the student on so many takes")
    length: int = Field(512, ge=8, description="tokens a block")
    calibration: CalibrationData = CalibrationData()
    seeds: int = Field(3, ge=2, description="trainings of every arm")
    arms: tuple[str, ...] = Field(tuple(DESIGNS), min_length=2)
    parent_tokens: float | None = Field(
        None, ge=0, description="tokens that the parent was trained on, for the full reading (default: of a small one)"
    )
    reuse: int = Field(1, ge=1, description="runs that share the scores, for the amortised reading")
    held_out: float = Field(0.02, gt=0, lt=0.5, description="share of the texts that is measured on, by hash")
    keep: tuple[str, ...] = Field((), description="arms whose models are kept, below arms/<arm>-<seed>/model")
    evaluate: Suite = Suite()
    latency: Latency | None = Field(Latency(repeats=10), description="how speed is measured; null: not at all")
    engine: EngineConfig = EngineConfig()
    run: str
    seed: int = 0

    @field_validator("arms", "keep")
    @classmethod
    def _known(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [a for a in arms if a not in DESIGNS]:
            raise ValueError(f"no arm is called {unknown[0]!r}; there are {', '.join(DESIGNS)}")
        return tuple(name for name in DESIGNS if name in arms)

    @model_validator(mode="after")
    def _whole(self) -> Matched:
        check_installed("tamis compare", "models", "torch", "transformers", "safetensors")
        if (self.flops is None) == (self.tokens is None):
            raise ValueError("name the budget once: `flops`, or `tokens` that the student is trained on")
        if self.calibration.by != "random" or self.calibration.draws > 1:
            raise ValueError("calibration: every seed of an arm draws rows at random: leave out `by` and `draws`")
        if "D" in self.arms and not self.distill.needs_teacher:
            raise ValueError(f"distill: {self.distill.kind} learns from no teacher: leave out arm D or name `distill`")
        return self


@dataclass(frozen=True)
class Texts:
    """What is trained on: curated texts, and a draw of random ones a seed. What is measured on: texts by domain."""

    curated: pa.Array
    random: tuple[pa.Array, ...]
    held_out: Mapping[str, pa.Array]
    fingerprint: str

    def of(self, data: Data, seed: int) -> pa.Array:
        return self.curated if data == "curated" else self.random[seed]


@dataclass(frozen=True)
class Unit:
    """One training: an arm, a seed, where its start, its blocks and its result are."""

    design: Design
    seed: int
    start: str
    blocks: str
    tokens: int
    result: Artifact


def compare_matched(
    config: Matched, quiet: bool = False, only_plan: bool = False, show: Callable[[Plan], None] | None = None
) -> Results:
    """Run the comparison; a second call continues. `show` gets the plan before anything is trained.

    Raises ConfigError for what cannot be matched or afforded, and TamisError.
    """
    if is_remote(config.run):
        raise ConfigError(f"run: {config.run!r}: models are written to a directory of a file system, not to a store")
    directory = Path(config.run).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    lock = RunLock(Store(str(directory)))
    lock.acquire()
    try:
        with threads.limited(config.engine.cpus):
            return _compare(config, directory, quiet, only_plan, show)
    finally:
        lock.release()


def _compare(
    config: Matched, directory: Path, quiet: bool, only_plan: bool, show: Callable[[Plan], None] | None
) -> Results:
    with stage("parent", quiet):
        parent = parent_folder(config.model, directory / "parent", config.held_out, config.seed)
        model, tokenizer = folder.load(parent)
    sieved = sieve_of(config.curated)
    with stage("random rows", quiet):
        texts = gather(config, sieved, directory, quiet=True)
    with stage("students", quiet):
        students = cut_students(config, parent, model, tokenizer, texts, directory / "students")
    example = folder.load(Path(next(iter(students.values())).folder))[0]
    dense, small = ModelShape.of(model), ModelShape.of(example)

    batch_tokens = config.recover.batch * config.length
    each = per_token(config.recover.cost(example, model), small, dense, config.length, batch_tokens)
    budget = config.flops or (config.tokens or 0) * each
    most = int(budget / each) + batch_tokens
    blocks = write_blocks(config, tokenizer, texts, most, directory / "blocks")
    scored = scoring_cost(config.curated, sieved)
    shapes = {"dense": (model, dense), "student": (example, small)}
    planned = make_plan(config, budget, shapes, students, blocks, scored)
    if show:
        show(planned)
    planned.check()
    results = Results(config.model_dump(mode="json"), budget, planned, str(directory / "compare"))
    if only_plan:
        return results

    suite = suite_of(config, texts.held_out, directory / "held_out")
    suite.contamination([texts.curated, *texts.random])  # warns
    task = ArmTask(config, str(parent), suite)
    units = units_of(config, planned, students, parent, blocks, texts, suite, directory / "arms")
    train(task, [u for u in units if not u.result.stored()], config.engine, quiet)
    speed = speeds({"dense": model, "student": example}, config.latency) if config.latency else {}
    judge(results, units, ledgers(config, planned, units, dense, scored), speed)
    results.write()
    return results


def sieve_of(run: str) -> Config:
    """The configuration of a curated run. Raises ConfigError where there is none."""
    try:
        manifest = json.loads(Store(run).read("manifest.json"))
    except FileNotFoundError as error:
        raise ConfigError(f"curated: {run} is not a run: run `tamis curate` first") from error
    if manifest.get("status") in (None, "running", "failed", "fitted"):
        raise ConfigError(f"curated: {run} is not finished: run `tamis curate` on its configuration again")
    return parse(manifest["config"])


def gather(config: Matched, sieved: Config, directory: Path, quiet: bool) -> Texts:
    """Curated and random texts without those that are measured on. As many random tokens as were curated, each seed.

    The random rows are a curation of their own, by chance alone, of the same corpus: it passes the engine, and so does
    a pool of any size.
    """
    kept = curated(config.curated)
    selected = json.loads(Store(config.curated).read("artifacts", "selection", "selection.json"))
    drawn = [
        parquet([curate(by_luck(config, sieved, int(selected["tokens"]), s, directory), quiet=quiet).path], kept.column)
        for s in range(config.seeds)
    ]
    split = [set_apart(source.texts(), config.held_out, config.seed) for source in (kept, *drawn)]
    if not all(len(rest) for _, rest in split):
        raise ConfigError("curated: nothing is left of it beside what is measured on: lower held_out")
    held_out = domains(config, sieved, kept, drawn)
    prints = fingerprint([kept.fingerprint, *(d.fingerprint for d in drawn)], config.held_out, config.seed)
    return Texts(split[0][1], tuple(rest for _, rest in split[1:]), held_out, prints)


def by_luck(config: Matched, sieved: Config, tokens: int, seed: int, directory: Path) -> Config:
    """A curation of the same corpus by chance, deduplicated where the curated run was."""
    copies = [s for s in sieved.scores if s.kind in DUPLICATES]
    names = {s.column_name for s in copies}
    select = Select(
        budget=Budget(tokens=tokens),
        weights={"random": 1.0},
        floors={name: floor for name, floor in sieved.select.floors.items() if name in names},
        seed=config.seed + seed,
    )
    own = {
        "scores": [*copies, Random(seed=config.seed + seed)],
        "select": select,
        "run": str(directory / f"random-{seed}"),
        "engine": config.engine,
    }
    if not any(s.needs != "text" for s in copies):
        own |= {"embed": None, "cluster": None}
    return sieved.model_copy(update=own)


def domains(config: Matched, sieved: Config, kept: Source, drawn: Sequence[Source]) -> dict[str, pa.Array]:
    """Held-out texts by domain: of the curated set, of the pool, and of each of its sources where they are named.

    Raises ConfigError where the share leaves nothing to measure on.
    """
    column = sieved.corpus.source
    apart = partial(set_apart, share=config.held_out, seed=config.seed)
    found = {"curated": apart(kept.texts())[0]}
    names = {"text": kept.column} | ({"source": column} if column else {})
    rows = pa.concat_tables([pa.Table.from_batches(list(source.batches(names))) for source in drawn])
    rows = rows.group_by(rows.schema.names).aggregate([])  # a row that several seeds drew counts once
    found[POOL] = apart(iter(rows["text"].chunks))[0]
    for name in sorted(rows["source"].drop_null().unique().to_pylist()) if column else ():
        found[f"pool, {name}"] = apart(iter(rows.filter(pc.equal(rows["source"], name))["text"].chunks))[0]
    if missing := next((name for name in ("curated", POOL) if not len(found[name])), None):
        raise ConfigError(f"held_out: no text of the {missing} set is left to measure on: raise the share")
    return {name: texts for name, texts in found.items() if len(texts)}


def suite_of(config: Matched, held_out: Mapping[str, pa.Array], directory: Path) -> Suite:
    """What is measured: the configured suite; without domains of its own the held-out ones, a Parquet file each."""
    if config.evaluate.domains:
        return config.evaluate
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for i, (name, texts) in enumerate(held_out.items()):
        sizes = np.cumsum(pc.binary_length(texts).to_numpy())
        few = texts.slice(0, max(1, int(np.searchsorted(sizes, DOMAIN_BYTES))))
        paths[name] = (str(directory / f"{i:02d}.parquet"),)
        pq.write_table(pa.table({"text": few}), paths[name][0])
    return config.evaluate.model_copy(update={"domains": paths, "text": "text"})


@dataclass(frozen=True)
class Student:
    """A cut model on disk, and the tokens that were run to cut it."""

    folder: str
    passes: dict[str, int]


def cut_students(
    config: Matched, parent: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Texts, directory: Path
) -> dict[tuple[str, int], Student]:
    """Every student that the arms begin with, by what it is calibrated on (or `chance`) and seed; all of one shape.

    The shape is that of the first curated calibration; the others get its counts.
    """
    needed = {("chance" if d.start == "chance" else str(d.calibration)) for d in _arms(config) if d.start != "dense"}
    ways = [w for w in ("curated", "random", "chance") if w == "curated" or w in needed]
    length = config.calibration.length or config.length
    found: dict[tuple[str, int], Student] = {}
    steps: Sequence[Any] = config.steps
    for way in ways:
        for seed in range(config.seeds):
            own = by_chance(steps, config.seed + seed) if way == "chance" else steps
            place = directory / f"{way}-{seed}"
            data: Data = "random" if way == "random" else "curated"
            asked = [s.model_dump(mode="json") for s in own]
            calibration = config.calibration.model_dump(mode="json")
            made_of = (folder_digest(parent), texts.fingerprint)
            identity = fingerprint("student", VERSION, asked, calibration, length, *made_of)
            done = _read(place / "student.json")
            if done.get("fingerprint") != identity:
                wanted, drawn = config.calibration, texts.of(data, seed)
                blocks = pack_blocks(drawn, tokenizer, length, wanted.rows * length, wanted.seed + seed)
                smaller = shrink(copy.deepcopy(model), own, blocks, config.calibration.batch)
                if smaller.masks or smaller.vocabulary is not None:
                    counts(own[0], {})  # says why such a step cannot be matched
                folder.save(smaller.model, tokenizer, place, {"steps": smaller.steps})
                done = {"fingerprint": identity, "passes": dict(smaller.passes), "steps": smaller.steps}
                (place / "student.json").write_text(json.dumps(done, indent=2))
            if not found:
                steps = [counts(s, r) for s, r in zip(config.steps, done["steps"], strict=True)]
            found[way, seed] = Student(str(place), done["passes"])
    return found


def write_blocks(
    config: Matched, tokenizer: PreTrainedTokenizerFast, texts: Texts, tokens: int, directory: Path
) -> dict[tuple[Data, int], tuple[str, int]]:
    """Blocks of each data and seed as .npy, with how many tokens they hold: at most `tokens`, in an order a seed."""
    directory.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[Data, int], tuple[str, int]] = {}
    for data in ("curated", "random"):
        for seed in range(config.seeds):
            blocks = pack_blocks(texts.of(data, seed), tokenizer, config.length, tokens, config.seed + seed)
            path = directory / f"{data}-{seed}.npy"
            np.save(path, blocks, allow_pickle=False)
            found[data, seed] = (str(path), blocks.size)
    return found


def make_plan(
    config: Matched,
    budget: float,
    shapes: Mapping[str, tuple[nn.Module, ModelShape]],
    students: Mapping[tuple[str, int], Student],
    blocks: Mapping[tuple[Data, int], tuple[str, int]],
    scored: Scored,
) -> Plan:
    """What every arm can afford: the dearest of its calibrations is charged, so that all seeds train alike."""
    dense = shapes["dense"][1]
    length = config.calibration.length or config.length
    arms = []
    for design in _arms(config):
        model, shape = shapes["dense" if design.start == "dense" else "student"]
        recovery = config.distill if design.taught else config.recover
        fixed: dict[Any, float] = {}
        if design.calibration:
            passes = [s.passes for (way, _), s in students.items() if way == design.calibration]
            fixed["importance"] = max(importance_cost(config.steps, p, dense, length) for p in passes)
        if "curated" in (design.data, design.calibration):
            fixed["scoring"] = scored.total
        cost = recovery.cost(model, shapes["dense"][0])
        arms.append(
            Arm(
                design.name,
                per_token(cost, shape, dense, config.length, recovery.batch * config.length),
                fixed,
                min(size for (data, _), (_, size) in blocks.items() if data == design.data),
                "" if design.start == "dense" else shape.digest,
                parent=design.start not in ("scratch",) or design.taught,
            )
        )
    return plan(budget, arms, config.length, scored.pool_tokens)  # a recovery ends with a step of fewer blocks


def importance_cost(steps: Sequence[Any], passes: Mapping[str, int], dense: ModelShape, length: int) -> float:
    """FLOPs of measuring and cutting, from the tokens that went through the model, at the dense model's rate.

    Where Gram matrices are taken, so are their sums, factors and sweeps (evaluation.md, section 2).
    """
    parts = [part for s in steps if isinstance(s, Width) for part in (s.importance, s.compensation) if part]
    forward, backward = passes.get("forward", 0), passes.get("backward", 0)
    flops = forward * statistics(dense, length) + backward * gradients(dense, length)
    if any(part.kind in GRAM for part in parts):
        flops += forward * (hessian(dense, length) - layerwise(dense, length)) + hessian_solve(dense)
    return flops


def units_of(
    config: Matched,
    planned: Plan,
    students: Mapping[tuple[str, int], Student],
    parent: Path,
    blocks: Mapping[tuple[Data, int], tuple[str, int]],
    texts: Texts,
    suite: Suite,
    directory: Path,
) -> list[Unit]:
    """Every training, and the references, which train on nothing."""
    references = [Design(PARENT, "dense", "random"), Design(CUT, "cut", "curated", "curated")]
    units = []
    for design in [*references, *_arms(config)]:
        for seed in range(1 if design.name == PARENT else config.seeds):
            way = "chance" if design.start == "chance" else (design.calibration or "curated")
            start = str(parent) if design.start == "dense" else students[way, seed].folder
            path, _ = blocks[design.data, seed]
            tokens = planned.tokens.get(design.name, 0)
            recovery = recovery_of(config, design, seed)
            made_of = (folder_digest(Path(start)), folder_digest(parent), texts.fingerprint, config.length, tokens)
            asked = (recovery.model_dump(mode="json"), suite.model_dump(mode="json"), design.name in config.keep)
            identity = fingerprint("arm", VERSION, design.start, *made_of, *asked)
            name = f"{design.name.replace(chr(39), '2')}-{seed}"
            result = Artifact(name, identity, Store(str(directory / name)))
            units.append(Unit(design, seed, start, path, tokens, result))
    return units


def recovery_of(config: Matched, design: Design, seed: int) -> Any:
    """How an arm trains, with a seed: from scratch at a rate of its own."""
    own: dict[str, Any] = {"seed": config.seed + seed}
    if design.start == "scratch" and config.scratch_lr:
        own["lr"] = config.scratch_lr
    return (config.distill if design.taught else config.recover).model_copy(update=own)


def train(task: ArmTask, units: Sequence[Unit], engine: EngineConfig, quiet: bool) -> None:
    """Train what has no result yet, a model a worker. Raises TamisError for the first that fails."""
    if not units:
        return
    pool, told = connect(engine), 0
    try:
        for done in pool.map(task, units, Resources(cpus=engine.cpus, gpus=engine.gpus)):
            unit = units[done.index]
            if done.error:
                raise TamisError(f"arm {unit.design.name}, seed {unit.seed}: {done.error}")
            told += 1
            if not quiet:
                line = f"{told}/{len(units)}: arm {unit.design.name}, seed {unit.seed}"
                print(line, file=sys.stderr, flush=True)
    finally:
        pool.close()


@dataclass
class ArmTask:
    """Train one arm with one seed, measure it, publish what came out."""

    config: Matched
    parent: str
    suite: Suite

    def __call__(self, unit: Unit, attempt: int) -> dict[str, Any]:
        return BuildTask(unit.result, partial(_train, self, unit))(None, attempt)


def _train(task: ArmTask, unit: Unit, directory: Path) -> None:
    import torch

    from pipeline.compress.healing import heal

    torch.set_num_threads(threads.cpus())
    config, design = task.config, unit.design
    dense, tokenizer = folder.load(Path(task.parent))
    model, _ = folder.load(Path(unit.start))
    if design.start == "scratch":
        model = from_scratch(model, config.seed + unit.seed)
    blocks = np.load(unit.blocks, mmap_mode="r", allow_pickle=False)
    facts: dict[str, Any] = {"tokens": 0}
    if unit.tokens:
        work = Path(unit.result.store.path).parent.parent / "training" / unit.result.fingerprint
        recovery = recovery_of(config, design, unit.seed)
        done = heal(model, recovery, blocks, unit.tokens, teacher=dense if design.taught else None, directory=work)
        model = done.model
        facts |= {"tokens": done.tokens}
        (directory / "metrics.jsonl").write_bytes(Path(done.metrics).read_bytes())
    if design.name in config.keep:
        folder.save(model, tokenizer, directory / "model", {"arm": f"{design.name}: {design.about}", **facts})
    values = measure_all(model, tokenizer, task.suite)
    if (pool := next(iter(task.suite.domains), None)) is not None:
        values["kl"] = divergence(
            dense, model, tokenizer, task.suite.texts(POOL if POOL in task.suite.domains else pool)
        )
    facts["measures"] = {n: {"axis": m.axis, "higher_is_better": m.higher_is_better} for n, m in values.items()}
    facts |= {"parameters": model.num_parameters(), "flops_per_token": ModelShape.of(model).forward(config.length)}
    np.savez(directory / "values.npz", **{name: m.values for name, m in values.items()})  # type: ignore[arg-type]
    (directory / "result.json").write_text(json.dumps(facts, indent=2))


def speeds(models: Mapping[str, nn.Module], wanted: Latency) -> dict[str, dict[str, float]]:
    """Median of every latency measure by model, with nothing else at work here."""
    asked = (wanted.batches, wanted.prompt, wanted.repeats, wanted.threads)
    return {
        name: {m.name: m.quantile(0.5) for m in latency(model, *asked) if m.name != "peak_memory"}
        for name, model in models.items()
    }


def ledgers(
    config: Matched, planned: Plan, units: Sequence[Unit], dense: ModelShape, scored: Scored
) -> dict[str, Ledger]:
    """What every arm spent: what was planned before training, and the tokens that it trained on."""
    found, pretrained = {}, config.parent_tokens or 0.0
    if config.parent_tokens is None and isinstance(config.model, Small):
        pretrained = config.model.steps * config.model.batch * config.model.shape.context
    for line in planned.lines:
        arm, ledger = line.arm, Ledger(line.arm.name, config.reuse)
        for kind, flops in arm.fixed.items():
            ledger.charge(kind, scored.pool_tokens if kind == "scoring" else 0, flops)
        own = [u for u in units if u.design.name == arm.name]
        tokens = float(np.mean([_read(Path(u.result.store.path) / "result.json")["tokens"] for u in own]))
        ledger.charge("training", tokens, tokens * arm.per_token)
        if arm.parent:
            ledger.charge("pretraining", pretrained, full(dense, config.length) * pretrained)
        found[arm.name] = ledger
    return found


def _arms(config: Matched) -> list[Design]:
    return [DESIGNS[name] for name in config.arms]


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found
