"""`tamis compare CONFIG`: what curation and pruning buy at equal FLOPs. Read `compare_matched` first.

Every arm (`pipeline.compare.arms`) spends the same budget: what it costs to score the pool and to measure importance
comes off the tokens that it trains on (evaluation.md, section 3). All train on blocks of one length, with one batch,
tokenizer and family of optimizer, from as many seeds; each seed has its own random rows, its own calibration draw and
its own order of blocks. They are measured on documents that none of them has seen: those set apart by hash of their
text, in the pool and in the curated set.

What it leaves in the run directory:

    parent/, random-<seed>/   the model to begin with; runs that drew random rows of the pool, as many as were curated
    blocks/, held_out/        what is trained and measured on
    students/                 the cut models, before healing; end-<seed>: as a schedule leaves them
    arms/<arm>-<seed>/        what came of every training: result.json, values.npz, metrics.jsonl
    compare/                  matched.json, matched.md, index.html

Where a schedule cuts while it trains, `pipeline.compare.trajectory` says beforehand what that will cost. Masks save no
FLOPs: their arms are charged those of the dense matrices. A vocabulary that was trimmed makes other tokens of the same
texts, so measures are by byte or by item, and arms that speak otherwise than the parent have no KL from it.

What it trades away: models of this size tell which data heal a cut better at this budget, no more. The intervals over
runs count seeds, random draws and calibration draws together.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifact import Artifact, BuildTask
from pipeline.compare.arms import CUT, DESIGNS, PARENT, Design, from_scratch, per_token
from pipeline.compare.config import Matched
from pipeline.compare.flops import ModelShape, full
from pipeline.compare.ledger import Ledger, Plan
from pipeline.compare.material import (
    POOL,
    Blocks,
    Student,
    Students,
    Texts,
    calibrated_on,
    gather,
    make_students,
    sieve_of,
    suite_of,
    write_blocks,
)
from pipeline.compare.measures.base import context_length
from pipeline.compare.measures.language import divergence
from pipeline.compare.measures.latency import in_own_process
from pipeline.compare.measures.suite import Latency, Suite, measure_all
from pipeline.compare.planning import load_models, make_plan, spending
from pipeline.compare.results import Results, judge
from pipeline.compare.scoring import Scored, scoring_cost
from pipeline.compare.trajectory import spans
from pipeline.compress import folder
from pipeline.compress.config import Small
from pipeline.compress.documents import end_of, text_of
from pipeline.compress.parent import parent_folder
from pipeline.compress.place import read_json, working_in
from pipeline.compress.recover._admission import check
from pipeline.compress.recover.base import Setup
from pipeline.compress.schedule.base import Schedule
from pipeline.config import EngineConfig
from pipeline.corpus.storage import Store
from pipeline.engine import threads
from pipeline.engine.connect import connect
from pipeline.engine.progress import stage
from pipeline.errors import ConfigError, TamisError
from pipeline.models.files import folder_digest
from pipeline.recipe import Resources, fingerprint

if TYPE_CHECKING:
    from torch import nn

VERSION = 2


@dataclass(frozen=True)
class Unit:
    """One training: an arm, a seed, where its start, its blocks and its result are."""

    design: Design
    seed: int
    start: str
    blocks: str
    schedule: Schedule | None
    tokens: int
    result: Artifact


def compare_matched(
    config: Matched, quiet: bool = False, only_plan: bool = False, show: Callable[[Plan], None] | None = None
) -> Results:
    """Run the comparison; a second call continues. `show` gets the plan before anything is trained.

    Raises ConfigError for what cannot be matched or afforded, and TamisError.
    """
    with working_in(config.run, config.engine.cpus) as directory:
        return _compare(config, directory, quiet, only_plan, show)


def _compare(
    config: Matched, directory: Path, quiet: bool, only_plan: bool, show: Callable[[Plan], None] | None
) -> Results:
    sieved = sieve_of(config.curated)
    with stage("parent", quiet):
        parent = parent_folder(config.model, directory / "parent", config.held_out, config.seed)
        model, tokenizer = folder.load(parent)
    check_parent(config, model, tokenizer)
    with stage("random rows", quiet):
        texts = gather(config, sieved, directory, quiet=True)
    with stage("students", quiet):
        students = make_students(config, parent, model, tokenizer, texts, directory / "students")
    models = load_models(model, students)
    _, spoken = folder.load(Path(students.ends[0].folder))

    whole = spending(config, DESIGNS["B"], models, students)
    budget = config.flops or whole.training(config.tokens or 0)
    most = int(budget / spending(config, DESIGNS["E"], models, students).per_token) + whole.step
    blocks = write_blocks(config, {True: tokenizer, False: spoken}, texts, most, directory / "blocks")
    scored = scoring_cost(config.curated, sieved)
    planned = make_plan(config, budget, models, students, blocks, scored)
    if show:
        show(planned)
    planned.check()
    admit(config, parent, students, blocks, planned)
    results = Results(config.model_dump(mode="json"), budget, planned, str(directory / "compare"))
    if only_plan:
        return results

    suite = suite_of(config, texts.held_out, directory / "held_out")
    suite.contamination(map(text_of, (texts.curated, *texts.random)))  # warns
    task = ArmTask(config, str(parent), suite)
    units = units_of(config, planned, students, parent, blocks, texts, suite, directory / "arms")
    train(task, [u for u in units if not u.result.stored()], config.engine, quiet)
    used = {"dense": Student(str(parent), folder_digest(parent)), "student": students.ends[0]}
    costs = {name: cost_of_use(of, config.latency, directory / "cost" / f"{name}.json") for name, of in used.items()}
    judge(results, units, ledgers(config, planned, units, models["dense"][1], scored), costs)
    results.write()
    return results


def check_parent(config: Matched, model: nn.Module, tokenizer: Any) -> None:
    """Raises ConfigError for a parent that cannot be compared with."""
    if tokenizer is None:
        raise ConfigError("model: its folder holds no tokenizer: put tokenizer.json beside it")
    end_of(tokenizer)
    takes = context_length(model)
    for name, length in (("length", config.length), ("calibration.length", config.calibration.length or 0)):
        if length > takes:
            raise ConfigError(f"{name}: {length} tokens a block, where the model takes {takes}: set {name}: {takes}")


def admit(config: Matched, parent: Path, students: Students, blocks: Blocks, planned: Plan) -> None:
    """Begin every kind of training and let it go again. Raises ConfigError for an arm that would fail when its turn
    comes."""
    seen = set()
    for design in config.designs:
        if (kind := (design.start, design.taught)) in seen:
            continue
        seen.add(kind)
        start, given, schedule = begins(config, design, 0, students, parent, blocks)
        setup, recovery = set_up(config, design, 0, start.folder, given, str(parent)), recovery_of(config, design, 0)
        try:
            check(setup, recovery, planned.tokens[design.name])
            session = recovery.begin(setup)
            if schedule:
                schedule.start(setup, session)
        except ConfigError as error:
            raise ConfigError(f"arm {design.name}: {error}") from error


def begins(
    config: Matched, design: Design, seed: int, students: Students, parent: Path, blocks: Blocks
) -> tuple[Student, str, Schedule | None]:
    """An arm's start, where its blocks are, and what happens to it in training."""
    if design.start == "dense":
        start = Student(str(parent), folder_digest(parent))
    elif design.name == CUT or (design.start == "scratch" and students.schedule):
        start = students.ends[seed]
    else:
        start = students.starts[calibrated_on(design, config.steps), seed]
    schedule = None if design.name == CUT else students.scheduled(design, config.seed + seed)
    return start, blocks[design.start == "dense", design.data, seed][0], schedule


def units_of(
    config: Matched,
    planned: Plan,
    students: Students,
    parent: Path,
    blocks: Blocks,
    texts: Texts,
    suite: Suite,
    directory: Path,
) -> list[Unit]:
    """Every training, and the references, which train on nothing."""
    references = [Design(PARENT, "dense", "random"), Design(CUT, "cut", "curated", "curated")]
    units = []
    for design in [*references, *config.designs]:
        for seed in range(1 if design.name == PARENT else config.seeds):
            start, path, schedule = begins(config, design, seed, students, parent, blocks)
            tokens = planned.tokens.get(design.name, 0)
            recovery = recovery_of(config, design, seed)
            made_of = (
                start.identity,
                folder_digest(parent),
                texts.fingerprint,
                config.length,
                blocks[design.start == "dense", design.data, seed][1],
                tokens,
                schedule.identity() if schedule else "",
            )
            asked = (recovery.model_dump(mode="json"), suite.model_dump(mode="json"), design.name in config.keep)
            identity = fingerprint("arm", VERSION, design.start, *made_of, *asked)
            name = f"{design.name.replace(chr(39), '2')}-{seed}"
            result = Artifact(name, identity, Store(str(directory / name)))
            units.append(Unit(design, seed, start.folder, path, schedule, tokens, result))
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


def set_up(config: Matched, design: Design, seed: int, start: str, blocks: str, parent: str) -> Setup:
    """A training's model, blocks, teacher, masks and vocabulary."""
    model, _ = folder.load(Path(start))
    if design.start == "scratch":
        model = from_scratch(model, config.seed + seed)
    own = design.start != "dense"  # a parent that Tamis made smaller has masks of its own, which are not the student's
    masks = folder.masks(Path(start)) if own else {}
    kept = read_json(Path(start) / "student.json").get("vocabulary") if own else None
    return Setup(
        model,
        np.load(blocks, mmap_mode="r", allow_pickle=False),
        folder.load(Path(parent))[0] if design.taught else None,
        masks,
        None if kept is None else np.array(kept, np.int64),
    )


def _train(task: ArmTask, unit: Unit, directory: Path) -> None:
    import torch

    from pipeline.compress.healing import heal

    torch.set_num_threads(threads.cpus())
    config, design = task.config, unit.design
    setup = set_up(config, design, unit.seed, unit.start, unit.blocks, task.parent)
    model, masks = setup.student, dict(setup.masks)
    (dense, spoken), (_, tokenizer) = folder.load(Path(task.parent)), folder.load(Path(unit.start))
    assert spoken is not None  # the door saw to it
    assert tokenizer is not None
    facts: dict[str, Any] = {"tokens": 0, "spent": []}
    work: Path | None = None
    place = Path(unit.start)
    if unit.tokens:
        work = Path(unit.result.store.path).parent.parent / "training" / unit.result.fingerprint
        recovery = recovery_of(config, design, unit.seed)
        cost, shape, teacher = recovery.cost(model, dense), ModelShape.of(model), ModelShape.of(dense)
        done = heal(
            model,
            recovery,
            setup.blocks,
            unit.tokens,
            teacher=setup.teacher,
            masks=masks,
            vocabulary=setup.vocabulary,
            directory=work,
            callbacks=[unit.schedule] if unit.schedule else (),
        )
        model, masks = done.model, done.masks
        for tokens, told in spans(done.tokens, done.shapes):
            then = shape.resized(told) if told else shape
            each = per_token(cost, then, teacher, config.length, recovery.batch * config.length)
            facts["spent"].append([tokens, each])
        facts |= {"tokens": done.tokens}
        (directory / "metrics.jsonl").write_bytes(done.metrics.read_bytes())
        place = directory / "model"
        folder.save(model, tokenizer, place, {"arm": f"{design.name}: {design.about}", **facts}, masks)
    values = measure_all(model, tokenizer, task.suite, place)
    if (domains := list(task.suite.domains)) and tokenizer.get_vocab() == spoken.get_vocab():
        documents = task.suite.documents(POOL if POOL in domains else domains[0])
        values["kl"] = divergence(dense, model, tokenizer, documents)
    facts["measures"] = {n: {"axis": m.axis, "higher_is_better": m.higher_is_better} for n, m in values.items()}
    facts |= {"parameters": model.num_parameters(), "flops_per_token": ModelShape.of(model).forward(config.length)}
    facts |= {"zeros": sum(int((~mask).sum()) for mask in masks.values()) / model.num_parameters()}
    np.savez(directory / "values.npz", **{n: m.values for n, m in values.items()})  # type: ignore[arg-type]  # keywords are arrays
    (directory / "result.json").write_text(json.dumps(facts, indent=2))
    if work:
        shutil.rmtree(work)  # its checkpoints were for the case that this process ends before here
        if design.name not in config.keep:
            shutil.rmtree(place)  # it was written for its size


def cost_of_use(model: Student, wanted: Latency | None, note: Path) -> dict[str, float]:
    """Speed and memory of a model, measured in a process of its own with nothing else at work here; once."""
    if wanted is None:
        return {}
    identity = fingerprint("cost", VERSION, model.identity, wanted.model_dump(mode="json"), threads.cpus())
    done = read_json(note)
    if done.get("fingerprint") != identity:
        asked = (wanted.batches, wanted.prompt, wanted.repeats, wanted.threads or threads.cpus())
        done = {"fingerprint": identity, "medians": in_own_process(Path(model.folder), *asked)}
        note.parent.mkdir(exist_ok=True)
        note.write_text(json.dumps(done, indent=2))
    medians: dict[str, float] = done["medians"]
    return medians


def ledgers(
    config: Matched, planned: Plan, units: Sequence[Unit], dense: ModelShape, scored: Scored
) -> dict[str, Ledger]:
    """What every arm spent: what was planned before training, and the tokens that it trained on, shape by shape."""
    found, pretrained = {}, config.parent_tokens or 0.0
    if config.parent_tokens is None and isinstance(config.model, Small):
        pretrained = config.model.steps * config.model.batch * config.model.shape.context
    for line in planned.lines:
        arm, ledger = line.arm, Ledger(line.arm.name, config.reuse)
        for kind, flops in arm.fixed.items():
            ledger.charge(kind, scored.pool_tokens if kind == "scoring" else 0, flops)
        own = [u.result for u in units if u.design.name == arm.name and u.result]
        trained: dict[float, float] = {}
        for result in own:
            for tokens, each in read_json(Path(result.store.path) / "result.json")["spent"]:
                trained[each] = trained.get(each, 0.0) + tokens / len(own)
        for each, tokens in trained.items():
            ledger.charge("training", tokens, tokens * each, f"{each:.6g} FLOPs a token")
        if arm.parent:
            ledger.charge("pretraining", pretrained, full(dense, config.length) * pretrained)
        found[arm.name] = ledger
    return found
