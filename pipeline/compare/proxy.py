"""`tamis compare --proxy`: what a small model learns from the selection of each criterion, and of chance.

Every score of a configuration ranks alone, at the same budget of tokens, with the quotas that it brings; so does a
random draw, a new one for every seed. On each selection a model of the same shape (`pipeline.compare.learners`: a Llama
for texts, a convolutional network for labelled images) is trained from the same seeds for the same steps on the same
number of examples, and measured on rows that no arm has trained on: a random share of the corpus (the mix), and texts
of a `target`. `pipeline.compare.verdict` says what follows. With a teacher every arm, chance among them, is trained a
second time from the answers of a model that was trained on all rows.

Read `compare_proxy` first. What it leaves in the run: the columns of the scores as `tamis curate` would, `proxy-tokens`
or `proxy-pixels`, and `proxy-held-out`; `artifacts/proxy-*` (tokenizer, examples of each arm, a result a training), so
a comparison that is broken off continues; `compare/proxy.json` and `compare/proxy.md`.

What it trades away: a model of a few million parameters tells which selection teaches it more, no more. Which criterion
is best depends on the scale: larger models want weaker filters (BETR, Mizrahi et al. 2025). The learning rate is one
for all arms. Texts of `target` should be others than those that a criterion was fitted to. Floors of the configuration
are not applied. On GPUs, and with other threads, sums round otherwise and losses move in the last digits.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from pipeline.artifact import Artifact, BuildTask
from pipeline.compare import costs
from pipeline.compare.held_out import MIX, HeldOut, Total
from pipeline.compare.learners.base import Arrays, Learner, Result, Teacher
from pipeline.compare.learners.images import Images
from pipeline.compare.learners.language import Language
from pipeline.compare.verdict import LONG, LONGER, RANDOM, Line, judge, markdown
from pipeline.concepts.assign import concept_column
from pipeline.config import Config
from pipeline.corpus.rows import row_column
from pipeline.corpus.storage import Store
from pipeline.curation import embedding, sieve
from pipeline.engine import threads
from pipeline.engine.connect import connect
from pipeline.engine.pool import Pool
from pipeline.errors import ConfigError, CorpusError, TamisError
from pipeline.recipe import Resources, State, fingerprint
from pipeline.report.format import duration
from pipeline.run import Run
from pipeline.sample import needs_fit
from pipeline.scores.base import Score
from pipeline.scores.random import Random
from pipeline.select.config import Budget, Select
from pipeline.select.stage import stream

log = logging.getLogger(__name__)

HELD = "proxy-held-out"
REFERENCES = ("by", "importance")
"""Fields of recipes that name another score."""
EXAMPLES, RESULT = "examples.npz", "result.json"
TEACHER = "teacher"
METRICS = ("target", "mix")
WHICH = {"at", "seeds", TEACHER}
"""Settings that say which models are trained: no model depends on them."""
VERSION = 2


@dataclass(frozen=True)
class Arm:
    """A selection: its rows, the examples gathered of it (in tokens, at most what the longer arm takes), and what
    scoring cost."""

    data: Artifact
    rows: int
    tokens: int
    cost: float | None


@dataclass(frozen=True)
class Training:
    """One model to train, and the artifact that takes the result."""

    arm: str
    at: float
    seed: int
    steps: int
    data: Artifact
    result: Artifact
    teacher: Artifact | None = None


@dataclass(frozen=True)
class Compared:
    """The comparison: a line an arm and budget, random first, what was run, and where the files are."""

    lines: tuple[Line, ...]
    setting: str
    measure: str
    markdown: str
    json: str


def compare_proxy(
    config: Config, learner: Learner, pool: Callable[[], Pool] | None = None, quiet: bool = False
) -> Compared:
    """Train a small model on the selection of each criterion and on random draws; write and return what came out.

    Raises ConfigError where there is nothing to compare or a budget is too small, and TamisError.
    """
    criteria, held = _arms_of(config, learner)
    opened = partial(Run, connect=pool or partial(connect, config.engine), quiet=quiet)
    with opened(arm_config(config, [*criteria, held], None)) as run:
        base = prepare(run, learner, held)

    def gathered(score: Score, at: float) -> Arm:
        with opened(arm_config(config, [*read_by(score, criteria), score, held], int(at * base.tokens))) as run:
            return gather(run, learner, at)

    seeds = range(learner.seeds)
    draws = [Random(name=f"proxy-random-{s}", seed=stream(config.seed, f"proxy {s}")) for s in seeds]
    trainings: list[Training] = []
    kept: dict[tuple[str, float], Arm] = {}
    for at in learner.at:
        for score in [*criteria, *draws]:
            arm = gathered(score, at)
            if isinstance(score, Random):
                kept[RANDOM, at] = arm
                trainings += [base.training(learner, n, at, draws.index(score), arm) for n in (RANDOM, LONG)]
            else:
                kept[score.column_name, at] = arm
                trainings += [base.training(learner, score.column_name, at, seed, arm) for seed in seeds]
    teacher = base.training(learner, TEACHER, 1.0, 0, gathered(draws[0], 1.0)) if True in learner.taught else None

    with opened(config) as run:
        results = train_all(run, learner, base.held, [*trainings, *([teacher] if teacher else [])])
        if teacher:
            results += train_all(run, learner, base.held, [base.taught(t, teacher) for t in trainings])
        seconds = [_seconds(results, learner.steps, taught) for taught in learner.taught]
        names = [RANDOM, *(s.column_name for s in criteria)]
        lines = [
            line
            for at in learner.at
            for taught, took in zip(learner.taught, seconds, strict=True)
            for line in _lines(learner, [(t, r) for t, r in results if t.at == at], kept, names, at, taught, took)
        ]
        setting = describe(config, learner, base, results[0][1]["parameters"], seconds[0])
        report = {
            "setting": setting,
            "proxy": learner.model_dump(mode="json"),
            "lines": [line.as_json() for line in lines],
            "trainings": [{"arm": t.arm, "at": t.at, "seed": t.seed, "steps": t.steps} | r for t, r in results],
        }
        run.store.write(json.dumps(report, indent=2).encode(), "compare", "proxy.json")
        run.store.write(markdown(lines, setting, learner.measure).encode(), "compare", "proxy.md")
        run.finish()
        files = [run.store.locate("compare", f"proxy.{suffix}") for suffix in ("md", "json")]
    return Compared(tuple(lines), setting, learner.measure, *files)


def _lines(
    learner: Learner,
    results: Sequence[tuple[Training, Result]],
    kept: Mapping[tuple[str, float], Arm],
    names: Sequence[str],
    at: float,
    taught: bool,
    seconds: float,
) -> list[Line]:
    """The lines of one budget, all with a teacher or all without, so that chance is compared with in the same way."""
    metrics = [m for m in METRICS if m in results[0][1]]

    def found(name: str) -> dict[str, list[float]]:
        told = [r for t, r in results if t.arm == (taught_name(name) if taught else name)]
        return {m: [r[m] for r in told] for m in metrics}

    losses = {name: found(name) for name in (*names, LONG)}
    free = kept[RANDOM, at].cost or 0.0  # what starting and selecting take of anybody
    lines = []
    for name in names:
        arm = kept[name, at]
        cost = None if arm.cost is None else max(0.0, arm.cost - free)
        line = judge(name, at, arm.rows, learner.consumed / arm.tokens, losses, cost, seconds)
        lines.append(replace(line, arm=taught_name(name)) if taught else line)
    return lines


def _seconds(results: Sequence[tuple[Training, Result]], steps: int, taught: bool) -> float:
    """Mean seconds of the trainings of so many steps, all with a teacher or all without."""
    return float(np.mean([r["seconds"] for t, r in results if t.steps == steps and bool(t.teacher) == taught]))


def taught_name(arm: str) -> str:
    """What an arm is called where a teacher taught it."""
    return f"{arm}, taught"


def _arms_of(config: Config, learner: Learner) -> tuple[list[Score], HeldOut]:
    """The criteria to compare and the score that holds rows out. Raises ConfigError."""
    learner.check(config)
    criteria = [s for s in config.scores if not isinstance(s, Random)]
    if not criteria:
        raise ConfigError("scores: there is nothing to compare with random draws: name a criterion")
    if taken := next((s.column_name for s in criteria if s.column_name in (RANDOM, LONG, TEACHER)), None):
        raise ConfigError(f"scores: {taken!r} is an arm of every comparison: give that criterion another `name`")
    held = HeldOut(
        name=HELD,
        share=learner.held_out,
        seed=stream(config.seed, "held out"),
        content=learner.content,
        target=learner.targets,
        target_text=getattr(learner, "target_text", "text"),
    )
    return criteria, held


def read_by(score: Score, criteria: Sequence[Score]) -> list[Score]:
    """The criteria that a score reads, such as the one that decides which copy stays, and those that these read."""
    names = {getattr(score, reference, None) for reference in REFERENCES}
    direct = [s for s in criteria if s.column_name in names and s is not score]
    found = [s for d in direct for s in (*read_by(d, criteria[: criteria.index(d)]), d)]
    return list({s.column_name: s for s in found}.values())


def arm_config(config: Config, scores: Sequence[Score], budget: int | None) -> Config:
    """The configuration with other scores, of which the last but one ranks alone and the last is a floor.

    Without a budget (of tokens) the selection stays as it is. Concepts are in it only where they are needed.
    """
    select = config.select
    if budget is not None:
        if budget < 1:
            raise ConfigError("at: a budget is less than one token of the corpus: raise it")
        select = Select(
            budget=Budget(tokens=budget),
            weights={scores[-2].column_name: 1.0},
            floors={scores[-1].column_name: 1.0},
            quotas=select.quotas,
            seed=select.seed,
        )
    bare = config.model_copy(update={"scores": list(scores), "select": select, "cluster": None})
    return bare.model_copy(update={"cluster": config.cluster}) if bare.needs_concepts else bare


@dataclass(frozen=True)
class Base:
    """What the arms share: how many tokens they choose from, and what all are measured on."""

    tokens: int
    held: Artifact
    store: Store

    def training(self, learner: Learner, name: str, at: float, seed: int, arm: Arm) -> Training:
        steps = LONGER * learner.steps if name in (LONG, TEACHER) else learner.steps
        asked = learner.model_dump(mode="json", exclude=WHICH | {"steps", "held_out"})
        identity = fingerprint("proxy", VERSION, asked, steps, seed, arm.data.fingerprint, self.held.fingerprint)
        return Training(name, at, seed, steps, arm.data, self._result(name, at, seed, identity))

    def taught(self, training: Training, teacher: Training) -> Training:
        """The same training from the answers of a teacher."""
        name = taught_name(training.arm)
        identity = fingerprint("proxy taught", training.result.fingerprint, teacher.result.fingerprint, training.at)
        result = self._result(name.replace(", ", "."), training.at, training.seed, identity)
        return replace(training, arm=name, result=result, teacher=teacher.result)

    def _result(self, name: str, at: float, seed: int, identity: str) -> Artifact:
        label = f"proxy-{name}-{at:g}-{seed}"
        return Artifact(label, identity, self.store.child("artifacts", label))


def prepare(run: Run, learner: Learner, held: HeldOut) -> Base:
    """Fill what the arms share (row sizes, examples, held-out rows, vectors, concepts); gather what is measured on.

    Vectors and concepts have a pass of their own here, so that their cost is known.
    """
    config, embed = run.config, embedding(run.config)
    plan_base(run, learner, held)
    if embed:
        started = time.monotonic()
        embed.fit(run)
        run.materialize([embed.column(run)])
        costs.note(run, ["embed"], time.monotonic() - started)
    if config.needs_concepts:
        started = time.monotonic()
        run.materialize([concept_column(run, config.cluster)])
        costs.note(run, ["concept"], time.monotonic() - started)

    total = run.aggregate(Total(f"{HELD}.score"))
    if not total or not total["train"][0]:
        raise CorpusError("the corpus has no row to train on that is not held out or a text of the target")
    if left_out := int(total["target"][0]):
        log.warning("target: %d rows of the corpus are texts of the target; no arm trains on them", left_out)
    mix = learner.kept(run, f"{HELD}.score", MIX, None, stream(run.seed, "proxy mix"))
    described = learner.model_dump(mode="json", exclude=WHICH | {"steps", "batch", "lr"})
    asked = (described, repr(mix), run.plans[HELD].column.identity)
    identity = fingerprint("proxy held", VERSION, *asked, run.identity(*mix.inputs))
    found = Artifact(HELD, identity, run.store.child("artifacts", HELD))
    if not found.stored():
        state = run.aggregate(mix)
        if not state or not state["rows"][0]:
            raise ConfigError("held_out: no row of the corpus is held out: raise the share")
        run.artifact(HELD, identity, partial(_write_held, learner.measured(state, run)), resources=None)
    return Base(int(total["train"][0]), found, run.store)


def plan_base(run: Run, learner: Learner, held: HeldOut) -> None:
    """Fill the columns that every arm reads, where they are not there."""
    corpus = run.config.corpus
    base = row_column(corpus.id is not None, corpus.tokenizer, corpus.has_text, corpus.image is not None)
    run.materialize([base, held.column(run), *learner.columns(run)])


def _write_held(measured: Mapping[str, Arrays], directory: Path) -> None:
    for metric, arrays in measured.items():
        np.savez(directory / f"{metric}.npz", **arrays)  # type: ignore[arg-type]  # keywords are arrays


def gather(run: Run, learner: Learner, at: float) -> Arm:
    """Select by one criterion as the main job does, note what that cost, and gather the examples of what is kept."""
    *read, score, held = run.config.scores
    assert isinstance(held, HeldOut)
    plan_base(run, learner, held)
    started, embed = time.monotonic(), embedding(run.config)
    if score.needs == "text" and not score.compares_rows:
        score.fit(run)
    if embed:
        embed.fit(run)
        run.materialize([embed.column(run)])
    began = time.monotonic()
    support = list(score.support(run))
    run.materialize(support)
    shared = time.monotonic() - began
    costs.note(run, [c.name for c in support], shared)
    selection = sieve(run)
    costs.note(run, [score.column_name], time.monotonic() - started - shared)

    kept = learner.kept(run, "select.keep", 1, LONGER * learner.consumed, stream(run.seed, "proxy data"))
    name = f"proxy-data-{score.column_name}-{at:g}"
    asked = learner.model_dump(mode="json", exclude=WHICH | {"lr", "held_out"})
    asked_for = (asked, repr(kept), selection.artifact.fingerprint)
    identity = fingerprint("proxy data", VERSION, *asked_for, run.identity(*kept.inputs))
    state = run.aggregate(kept) if needs_fit(run, name, identity) else {}
    data = run.artifact(name, identity, partial(_write_data, learner, state), resources=None)
    about = json.loads((data.local() / "about.json").read_text())
    used = [score.column_name, *(c.name for c in support), *(s.column_name for s in read)]
    used += ["embed"] * run.config.needs_vectors + ["concept"] * run.config.needs_concepts
    return Arm(data, about["rows"], about["tokens"], costs.cost(run, used))


def _write_data(learner: Learner, kept: State, directory: Path) -> None:
    found, tokens = learner.examples(kept)
    np.savez(directory / EXAMPLES, **found)  # type: ignore[arg-type]  # keywords are arrays
    (directory / "about.json").write_text(json.dumps({"rows": int(kept["rows"][0]), "tokens": tokens}))


def train_all(
    run: Run, learner: Learner, held: Artifact, trainings: Sequence[Training]
) -> list[tuple[Training, Result]]:
    """Train what has no result yet, a model a worker, and return all results."""
    engine = run.config.engine
    todo = [t for t in trainings if not t.result.stored()]
    task = TrainTask(learner, held)
    for outcome in run.map("train", task, todo, Resources(cpus=engine.cpus, gpus=engine.gpus)):
        if outcome.error:
            raise TamisError(f"a training of {todo[outcome.index].arm} failed: {outcome.error}")
    return [(t, json.loads((t.result.local() / RESULT).read_text())) for t in trainings]


@dataclass
class TrainTask:
    """Train one model and publish what it came to."""

    learner: Learner
    held: Artifact

    def __call__(self, training: Training, attempt: int) -> dict[str, Any]:
        return BuildTask(training.result, partial(_train, self.learner, self.held, training))(None, attempt)


def _train(learner: Learner, held: Artifact, training: Training, directory: Path) -> None:
    import torch

    torch.set_num_threads(threads.cpus())
    teacher = Teacher(training.teacher.local(), training.at) if training.teacher else None
    measured = {file.stem: _arrays(file) for file in sorted(held.local().glob("*.npz"))}
    data = _arrays(training.data.local() / EXAMPLES)
    result = learner.train(data, measured, training.steps, training.seed, directory, teacher)
    if not np.isfinite([*result.values()]).all():
        raise TamisError(f"the loss of {training.arm} is not finite: lower `lr`")
    (directory / RESULT).write_text(json.dumps(result, indent=2))


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def describe(config: Config, learner: Learner, base: Base, parameters: float, seconds: float) -> str:
    """What was run, in a paragraph."""
    cpus = f"{config.engine.cpus:g} core{'s' * (config.engine.cpus != 1)}"
    unit = "images" if not config.corpus.has_text else f"tokens ({config.corpus.tokenizer or 'bytes / 4'})"
    return (
        f"Corpus {', '.join(config.corpus.paths)}: {base.tokens:,} {unit} to choose from. "
        f"{learner.describe(parameters)}; learning rate {learner.lr:g}, {learner.seeds} seeds, {duration(seconds)} a "
        f"training on {cpus}. With 95 % intervals over the seeds."
    )


def settings(config: Config, options: Sequence[str], **given: Any) -> Learner:
    """What learns from a corpus: from `a.b=c` options and from what is given and not None. Raises ConfigError."""
    kind = Language if config.corpus.has_text else Images
    if foreign := sorted(name for name, value in given.items() if value and name not in kind.model_fields):
        raise ConfigError(f"--{foreign[0]}: belongs to corpora of texts: leave it out")
    data = {name: field.get_default() for name, field in kind.model_fields.items()}
    data = kind.model_construct(**data).model_dump()
    for option in options:
        key, separator, value = option.partition("=")
        *parents, last = key.split(".")
        place: Any = data
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not separator or not isinstance(place, dict):
            raise ConfigError(f"--with {option}: write key=value, such as --with steps=500 or --with shape.layers=4")
        place[last] = yaml.safe_load(value)
    try:
        return kind.model_validate(data | {k: v for k, v in given.items() if v})
    except ValidationError as error:
        told = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError("\n".join(told)) from error
