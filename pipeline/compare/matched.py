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

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifact import Artifact, BuildTask
from pipeline.compare.arms import CUT, PARENT, Data, Design, from_scratch, per_token
from pipeline.compare.config import Matched
from pipeline.compare.flops import ModelShape, full, gradients, hessian, hessian_solve, layerwise, statistics
from pipeline.compare.ledger import Arm, Ledger, Plan, plan
from pipeline.compare.material import POOL, Student, Texts, cut_students, gather, sieve_of, suite_of, write_blocks
from pipeline.compare.measures.language import divergence
from pipeline.compare.measures.latency import latency
from pipeline.compare.measures.suite import Latency, Suite, measure_all
from pipeline.compare.results import Results, judge
from pipeline.compare.scoring import Scored, scoring_cost
from pipeline.compress import folder
from pipeline.compress.config import Small
from pipeline.compress.parent import parent_folder
from pipeline.compress.place import read_json, working_in
from pipeline.compress.steps.width import Width
from pipeline.config import EngineConfig
from pipeline.corpus.storage import Store
from pipeline.engine import threads
from pipeline.engine.connect import connect
from pipeline.engine.progress import stage
from pipeline.errors import TamisError
from pipeline.models.files import folder_digest
from pipeline.recipe import Resources, fingerprint

if TYPE_CHECKING:
    from torch import nn

VERSION = 1
GRAM = {"obs", "refit", "scalar"}
"""Parts of a width step that take Gram matrices."""


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
    with working_in(config.run, config.engine.cpus) as directory:
        return _compare(config, directory, quiet, only_plan, show)


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
    for design in config.designs:
        model, shape = shapes["dense" if design.start == "dense" else "student"]
        recovery = config.distill if design.taught else config.recover
        fixed: dict[Any, float] = {}
        if design.calibration:
            passes = [s.passes for (way, _), s in students.items() if way == design.calibration]
            fixed["importance"] = max(importance_cost(config.steps, p, dense, length) for p in passes)
        if "curated" in (design.data, design.calibration):
            fixed["scoring"] = scored.total
        cost = recovery.cost(model, shapes["dense"][0])
        if cost.measured:  # blocks that go forward before the training
            before = cost.measured * config.length * shape.forward(config.length)
            fixed["importance"] = fixed.get("importance", 0.0) + before
        arms.append(
            Arm(
                design.name,
                per_token(cost, shape, dense, config.length, recovery.batch * config.length),
                fixed,
                min(size for (data, _), (_, size) in blocks.items() if data == design.data),
                "" if design.start == "dense" else shape.digest,
                parent=design.start != "scratch" or design.taught,
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
    for design in [*references, *config.designs]:
        for seed in range(1 if design.name == PARENT else config.seeds):
            way = "chance" if design.start == "chance" else (design.calibration or "curated")
            start = str(parent) if design.start == "dense" else students[way, seed].folder
            path, size = blocks[design.data, seed]
            tokens = planned.tokens.get(design.name, 0)
            recovery = recovery_of(config, design, seed)
            made_of = (
                folder_digest(Path(start)),
                folder_digest(parent),
                texts.fingerprint,
                config.length,
                size,
                tokens,
            )
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
    work: Path | None = None
    if unit.tokens:
        work = Path(unit.result.store.path).parent.parent / "training" / unit.result.fingerprint
        recovery = recovery_of(config, design, unit.seed)
        done = heal(model, recovery, blocks, unit.tokens, teacher=dense if design.taught else None, directory=work)
        model = done.model
        facts |= {"tokens": done.tokens}
        (directory / "metrics.jsonl").write_bytes(done.metrics.read_bytes())
    if design.name in config.keep:
        folder.save(model, tokenizer, directory / "model", {"arm": f"{design.name}: {design.about}", **facts})
    values = measure_all(model, tokenizer, task.suite)
    if domains := list(task.suite.domains):
        texts = task.suite.texts(POOL if POOL in domains else domains[0])
        values["kl"] = divergence(dense, model, tokenizer, texts)
    facts["measures"] = {n: {"axis": m.axis, "higher_is_better": m.higher_is_better} for n, m in values.items()}
    facts |= {"parameters": model.num_parameters(), "flops_per_token": ModelShape.of(model).forward(config.length)}
    np.savez(directory / "values.npz", **{n: m.values for n, m in values.items()})  # type: ignore[arg-type]  # keywords are arrays
    (directory / "result.json").write_text(json.dumps(facts, indent=2))
    if work:
        shutil.rmtree(work)  # its checkpoints were for the case that this process ends before here


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
        tokens = float(np.mean([read_json(Path(u.result.store.path) / "result.json")["tokens"] for u in own]))
        ledger.charge("training", tokens, tokens * arm.per_token)
        if arm.parent:
            ledger.charge("pretraining", pretrained, full(dense, config.length) * pretrained)
        found[arm.name] = ledger
    return found
