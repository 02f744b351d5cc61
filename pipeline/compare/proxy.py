"""`tamis compare --proxy`: what a small language model learns from the selection of each criterion, and of chance.

Every score of a configuration ranks alone, at the same budget of tokens, with the quotas that it brings; so does a
random draw, a new one for every seed. On each selection a Llama of the same shape is trained from the same seeds for
the same steps on the same number of tokens, and its loss is measured on texts that no arm has trained on: those of
`target`, and a random share of the corpus (the mix). `pipeline.compare.verdict` says what follows.

Read `compare_proxy` first. What it leaves in the run: the columns of the scores as `tamis curate` would, `proxy-tokens`
and `proxy-held-out`; `artifacts/proxy-*` (tokenizer, blocks of each arm, a result a training), so a comparison that is
broken off continues; `compare/proxy.json` and `compare/proxy.md`.

What it trades away: a model of a few million parameters tells which selection teaches it more, no more. Which criterion
is best depends on the scale: larger models want weaker filters (BETR, Mizrahi et al. 2025). The learning rate is one
for all arms. Texts of `target` should be others than those that a criterion was fitted to. Floors of the configuration
are not applied. On GPUs, and with other threads, sums round otherwise and losses move in the last digits.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.artifact import Artifact, BuildTask
from pipeline.compare import costs, tokens
from pipeline.compare.held_out import MIX, HeldOut
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
from pipeline.models.files import check_installed
from pipeline.models.training import Shape, lm_loss, new_lm, train_lm
from pipeline.recipe import Resources, State, fingerprint
from pipeline.report.format import duration
from pipeline.run import Run
from pipeline.sample import needs_fit
from pipeline.scores._seeds import locate, read_seeds
from pipeline.scores.base import Score
from pipeline.scores.random import Random
from pipeline.select.config import Budget, Select
from pipeline.select.stage import stream

log = logging.getLogger(__name__)

HELD = "proxy-held-out"
REFERENCES = ("by", "importance")
"""Fields of recipes that name another score."""
BLOCKS, RESULT = "blocks.npz", "result.json"
VERSION = 1

Result = dict[str, float]
"""Of a training: losses `mix`, `target` and `train` (nats a token), `seconds`, `parameters`."""


class Proxy(BaseModel):
    """What is trained on every selection, and on what it is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str | list[str] | None = Field(None, description="texts to be good at: .parquet, .jsonl or .txt files")
    target_text: str = Field("text", description="column of the target that holds the text")
    at: tuple[float, ...] = Field((0.1, 0.25), min_length=1, description="budgets, as shares of the corpus's tokens")
    seeds: int = Field(3, ge=2, description="trainings of every arm; intervals are taken over them")
    steps: int = Field(1000, ge=2)
    batch: int = Field(16, ge=1, description="blocks a step")
    lr: float = Field(2e-3, gt=0)
    shape: Shape = Shape(hidden=192, layers=6, heads=6, kv_heads=3, mlp=512, vocab=4096, context=256)
    held_out: float = Field(0.02, gt=0, lt=0.5, description="share of the corpus to measure on")
    eval_tokens: int = Field(65_536, ge=64, description="tokens to measure on, at the most, of the target and the mix")

    @property
    def trained_tokens(self) -> int:
        """Tokens that every arm is trained on."""
        return self.steps * self.batch * self.shape.context


@dataclass(frozen=True)
class Arm:
    """A selection: its rows, the tokens gathered of it (at most what the longer arm takes), and what scoring cost."""

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


@dataclass(frozen=True)
class Compared:
    """The comparison: a line an arm and budget, random first, what was run, and where the files are."""

    lines: tuple[Line, ...]
    setting: str
    markdown: str
    json: str


def compare_proxy(
    config: Config, proxy: Proxy, pool: Callable[[], Pool] | None = None, quiet: bool = False
) -> Compared:
    """Train a small model on the selection of each criterion and on random draws; write and return what came out.

    Raises ConfigError where there is nothing to compare or a budget is too small, and TamisError.
    """
    criteria, held = _arms_of(config, proxy)
    opened = partial(Run, connect=pool or partial(connect, config.engine), quiet=quiet)
    with opened(arm_config(config, [*criteria, held], None)) as run:
        base = prepare(run, proxy, held)

    seeds = range(proxy.seeds)
    draws = [Random(name=f"proxy-random-{s}", seed=stream(config.seed, f"proxy {s}")) for s in seeds]
    trainings: list[Training] = []
    kept: dict[tuple[str, float], Arm] = {}
    for at in proxy.at:
        for score in [*criteria, *draws]:
            scores = [*read_by(score, criteria), score, held]
            with opened(arm_config(config, scores, int(at * base.tokens))) as run:
                arm = gather(run, proxy, at)
            if isinstance(score, Random):
                kept[RANDOM, at] = arm
                trainings += [base.training(proxy, n, at, draws.index(score), arm) for n in (RANDOM, LONG)]
            else:
                kept[score.column_name, at] = arm
                trainings += [base.training(proxy, score.column_name, at, seed, arm) for seed in seeds]

    with opened(config) as run:
        results = train_all(run, proxy, base.held, trainings)
        seconds = float(np.mean([r["seconds"] for t, r in results if t.arm != LONG]))
        lines: list[Line] = []
        for at in proxy.at:
            names = [RANDOM, *(s.column_name for s in criteria)]
            losses = {
                name: {m: [r[m] for t, r in results if (t.arm, t.at) == (name, at)] for m in base.metrics}
                for name in (*names, LONG)
            }
            free = kept[RANDOM, at].cost or 0.0  # what starting and selecting take of anybody
            for name in names:
                arm = kept[name, at]
                cost = None if arm.cost is None else max(0.0, arm.cost - free)
                lines.append(judge(name, at, arm.rows, proxy.trained_tokens / arm.tokens, losses, cost, seconds))
        setting = describe(config, proxy, base, results[0][1]["parameters"], seconds)
        report = {
            "setting": setting,
            "proxy": proxy.model_dump(mode="json"),
            "lines": [line.as_json() for line in lines],
            "trainings": [{"arm": t.arm, "at": t.at, "seed": t.seed, "steps": t.steps} | r for t, r in results],
        }
        run.store.write(json.dumps(report, indent=2).encode(), "compare", "proxy.json")
        run.store.write(markdown(lines, setting).encode(), "compare", "proxy.md")
        run.finish()
        files = [run.store.locate("compare", f"proxy.{suffix}") for suffix in ("md", "json")]
    return Compared(tuple(lines), setting, *files)


def _arms_of(config: Config, proxy: Proxy) -> tuple[list[Score], HeldOut]:
    """The criteria to compare and the score that holds rows out. Raises ConfigError."""
    try:
        check_installed("tamis compare --proxy", "models", "torch", "transformers", "tokenizers")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    criteria = [s for s in config.scores if not isinstance(s, Random)]
    if not criteria:
        raise ConfigError("scores: there is nothing to compare with random draws: name a criterion")
    if RANDOM in {s.column_name for s in criteria}:
        raise ConfigError(f"scores: {RANDOM!r} is the baseline of a comparison: give that criterion another `name`")
    files = [proxy.target] if isinstance(proxy.target, str) else proxy.target
    held = HeldOut(
        name=HELD,
        share=proxy.held_out,
        seed=stream(config.seed, "held out"),
        target=tuple(locate(files, "target")) if files else (),
        target_text=proxy.target_text,
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
    """What the arms share: how many tokens they choose from, and the blocks that all are measured on."""

    tokens: int
    held: Artifact
    metrics: tuple[str, ...]
    store: Store

    def training(self, proxy: Proxy, name: str, at: float, seed: int, arm: Arm) -> Training:
        steps = LONGER * proxy.steps if name == LONG else proxy.steps
        asked = proxy.model_dump(mode="json", include={"batch", "lr", "shape"})
        identity = fingerprint("proxy", VERSION, asked, steps, seed, arm.data.fingerprint, self.held.fingerprint)
        label = f"proxy-{name}-{at:g}-{seed}"
        return Training(
            name, at, seed, steps, arm.data, Artifact(label, identity, self.store.child("artifacts", label))
        )


def prepare(run: Run, proxy: Proxy, held: HeldOut) -> Base:
    """Fill what the arms share (row sizes, tokens, held-out rows, vectors, concepts); gather what they are measured on.

    Vectors and concepts have a pass of their own here, so that their cost is known.
    """
    config, embed = run.config, embedding(run.config)
    pieces = plan_base(run, proxy, held)
    if embed:
        started = time.monotonic()
        embed.fit(run)
        run.materialize([embed.column(run)])
        costs.note(run, ["embed"], time.monotonic() - started)
    if config.needs_concepts:
        started = time.monotonic()
        run.materialize([concept_column(run, config.cluster)])
        costs.note(run, ["concept"], time.monotonic() - started)

    total = run.aggregate(tokens.Total(f"{HELD}.score"))
    if not total or not total["train"][0]:
        raise CorpusError("the corpus has no row to train on that is not held out or a text of the target")
    if left_out := int(total["target"][0]):
        log.warning("target: %d rows of the corpus are texts of the target; no arm trains on them", left_out)
    mix = tokens.Kept(f"{HELD}.score", MIX, proxy.eval_tokens, stream(run.seed, "proxy mix"))
    asked = (asdict(mix), proxy.shape.context, run.plans[HELD].column.identity)
    identity = fingerprint("proxy held", VERSION, *asked, run.identity(*mix.inputs))
    state = run.aggregate(mix) if needs_fit(run, HELD, identity) else {}
    found = run.artifact(HELD, identity, partial(_write_held, state, proxy, held, pieces), resources=None)
    return Base(int(total["train"][0]), found, ("target", "mix") if held.target else ("mix",), run.store)


def plan_base(run: Run, proxy: Proxy, held: HeldOut) -> Artifact:
    """Fill the columns that every arm reads, where they are not there; returns the tokenizer."""
    pieces = tokens.tokenizer(run, proxy.shape.vocab)
    corpus = run.config.corpus
    run.materialize(
        [row_column(corpus.id is not None, corpus.tokenizer), held.column(run), tokens.tokens_column(pieces)]
    )
    return pieces


def _write_held(mix: State, proxy: Proxy, held: HeldOut, pieces: Artifact, directory: Path) -> None:
    if not mix or not len(mix["ids"]):
        raise ConfigError("held_out: no row of the corpus is held out: raise the share")
    found = {"mix": tokens.blocks(tokens.lists(mix), proxy.shape.context, proxy.eval_tokens)}
    if held.target:
        texts = read_seeds(held.target, held.target_text, "target")
        found["target"] = tokens.blocks(tokens.encoder(pieces)(texts), proxy.shape.context, proxy.eval_tokens)
    np.savez(directory / BLOCKS, **found)  # type: ignore[arg-type]  # keywords are arrays


def gather(run: Run, proxy: Proxy, at: float) -> Arm:
    """Select by one criterion as the main job does, note what that cost, and gather the tokens of what is kept."""
    *read, score, held = run.config.scores
    assert isinstance(held, HeldOut)
    plan_base(run, proxy, held)
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

    kept = tokens.Kept("select.keep", 1, LONGER * proxy.trained_tokens, stream(run.seed, "proxy data"))
    name = f"proxy-data-{score.column_name}-{at:g}"
    asked = (asdict(kept), proxy.shape.context, selection.artifact.fingerprint)
    identity = fingerprint("proxy data", VERSION, *asked, run.identity(*kept.inputs))
    state = run.aggregate(kept) if needs_fit(run, name, identity) else {}
    data = run.artifact(name, identity, partial(_write_data, state, proxy.shape.context), resources=None)
    about = json.loads((data.local() / "about.json").read_text())
    used = [score.column_name, *(c.name for c in support), *(s.column_name for s in read)]
    used += ["embed"] * run.config.needs_vectors + ["concept"] * run.config.needs_concepts
    return Arm(data, about["rows"], about["tokens"], costs.cost(run, used))


def _write_data(kept: State, context: int, directory: Path) -> None:
    found = tokens.blocks(tokens.lists(kept), context, len(kept["ids"]) + len(kept["length"]))
    np.savez(directory / BLOCKS, data=found)
    about = {"rows": int(kept["rows"][0]), "tokens": len(kept["ids"])}
    (directory / "about.json").write_text(json.dumps(about))


def train_all(run: Run, proxy: Proxy, held: Artifact, trainings: Sequence[Training]) -> list[tuple[Training, Result]]:
    """Train what has no result yet, a model a worker, and return all results."""
    engine = run.config.engine
    todo = [t for t in trainings if not t.result.stored()]
    task = TrainTask(proxy, held)
    for outcome in run.map("train", task, todo, Resources(cpus=engine.cpus, gpus=engine.gpus)):
        if outcome.error:
            raise TamisError(f"a training of {todo[outcome.index].arm} failed: {outcome.error}")
    return [(t, json.loads((t.result.local() / RESULT).read_text())) for t in trainings]


@dataclass
class TrainTask:
    """Train one model and publish its losses."""

    proxy: Proxy
    held: Artifact

    def __call__(self, training: Training, attempt: int) -> dict[str, Any]:
        return BuildTask(training.result, partial(_train, self.proxy, self.held, training))(None, attempt)


def _train(proxy: Proxy, held: Artifact, training: Training, directory: Path) -> None:
    import torch

    torch.set_num_threads(threads.cpus())
    model = new_lm(proxy.shape, training.seed)
    if torch.cuda.is_available():
        model.cuda()
    data = _arrays(training.data)["data"]
    started = time.monotonic()
    losses = train_lm(model, data, training.steps, proxy.batch, proxy.lr, training.seed)
    result: Result = {"seconds": time.monotonic() - started, "parameters": sum(p.numel() for p in model.parameters())}
    result |= {metric: lm_loss(model, found) for metric, found in _arrays(held).items()}
    result["train"] = float(losses[-max(1, len(losses) // 20) :].mean())
    if not np.isfinite([*result.values()]).all():
        raise TamisError(f"the loss of {training.arm} is not finite: lower `lr`")
    (directory / RESULT).write_text(json.dumps(result, indent=2))


def _arrays(artifact: Artifact) -> dict[str, np.ndarray]:
    with np.load(artifact.local() / BLOCKS, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def describe(config: Config, proxy: Proxy, base: Base, parameters: float, seconds: float) -> str:
    """What was run, in a paragraph."""
    shape, files = proxy.shape, [proxy.target] if isinstance(proxy.target, str) else proxy.target
    target = f"target {', '.join(files)}" if files else "no target"
    cpus = f"{config.engine.cpus:g} core{'s' * (config.engine.cpus != 1)}"
    return (
        f"Corpus {', '.join(config.corpus.paths)}: {base.tokens:,} tokens ({config.corpus.tokenizer or 'bytes / 4'}) "
        f"to choose from, {target}. Llama of {parameters / 1e6:.2f} M parameters ({shape.layers} layers, width "
        f"{shape.hidden}, {shape.vocab:,} pieces, context {shape.context}), {proxy.steps:,} steps of {proxy.batch} "
        f"blocks: {proxy.trained_tokens:,} tokens for every arm, learning rate {proxy.lr:g}, {proxy.seeds} seeds, "
        f"{duration(seconds)} a training on {cpus}. Losses are nats a token, with 95 % intervals over the seeds."
    )


def settings(options: Sequence[str], **given: Any) -> Proxy:
    """The settings from `a.b=c` options and from what is given and not None. Raises ConfigError."""
    data = Proxy().model_dump()
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
        return Proxy.model_validate(data | {k: v for k, v in given.items() if v})
    except ValidationError as error:
        told = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError("\n".join(told)) from error
