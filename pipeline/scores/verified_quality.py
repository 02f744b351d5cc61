"""Verified quality: of several seed sets, the one whose classifier's selection lowers a small model's loss on a target.

Source: Wang et al. 2025, "Ultra-FineWeb: Efficient Data Filtering and Verification for High-Quality LLM Training Data",
arXiv 2505.05427. What makes good seeds is not the accuracy of their classifier but what it does to a model that is
nearly trained: its learning rate is annealed on the usual data with `share` of something else mixed in, and compared
with the same anneal on the usual data alone. Here the nearly trained model is a small one of the corpus (`prior`), the
something else is what each pool's classifier keeps of a sample of the corpus (`verify: selection`) or the pool's
positives themselves (`verify: seeds`, the paper's question about a data set), and the judge is the loss on `target`
texts. Arms differ in nothing but these blocks: steps, order and the other blocks are the same, `repeats` times anew.

The classifier of the pool with the lowest loss scores the corpus. With `rounds` above 1 it is tried to do better: what
it keeps of the sample joins its positives, the other end its negatives, as long as the loss falls (the paper warns of
many rounds: they drift to the classifier's own taste). `verification.json` has every pool's loss, its gain on the usual
mix with a standard error over repeats, what the classifier measures on its held-out seeds, and the decision.

The paper accepts a pool that beats the usual mix, so where none does, none is verified: the run goes on with the best
of them, and log and card say so, as they do where the gain is less than twice its standard error. `require_better:
true` stops there instead; the verification stays, so lifting it again costs nothing.

What it trades away: a gain at this size says what helps this model on this target. It should be several times its
standard error. The score inherits the target as its aim, as it does the benchmarks in the paper.

Defaults: `share` 0.3 is from memory of the paper, unverified; the paper anneals a 1 B model over some 10 B tokens (from
memory, unverified) for 110 GPU hours, against 1,200 from scratch; steps, sizes, `keep` and `repeats` are ours, and an
anneal begins at the prior's highest rate. The classifier has DCLM's settings, as in `quality`, not the authors' (dim
256, 3-grams, over the pieces of a tokenizer: from memory, unverified).
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.artifact import Artifact
from pipeline.corpus.storage import Store
from pipeline.engine import threads
from pipeline.errors import ConfigError, TamisError
from pipeline.models.causal import load_causal
from pipeline.models.files import check_installed
from pipeline.models.training import lm_loss, pack, train_lm
from pipeline.recipe import Column, Recipe, State, fingerprint
from pipeline.sample import Sample, draw, needs_fit, texts
from pipeline.scores._contamination import warn_contained
from pipeline.scores._prior import MAX_BYTES, Training, neural, prior, seed_of
from pipeline.scores._seeds import identify, locate, read_seeds
from pipeline.scores._targets import listed, read_targets
from pipeline.scores.base import Score
from pipeline.scores.quality import FIELDS, FastText, open_classifier, train_classifier

if TYPE_CHECKING:
    from pipeline.run import Run

log = logging.getLogger(__name__)

TABLE = "verification.json"


class Pool(Recipe):
    """A candidate seed set."""

    positives: str | list[str] = Field(description="texts to be like: Parquet, .jsonl or .txt files")
    negatives: str | list[str] | None = Field(None, description="texts to be unlike (default: a draw from the corpus)")


class VerifiedQuality(Score):
    """P(positive) of the classifier that won the verification, in [0, 1]."""

    claim = "like the seeds whose selection taught a small model most about the target"
    cost = "that of quality; once, an anneal of a small model for every pool and repeat"
    source = "Wang et al. 2025 (Ultra-FineWeb), arXiv 2505.05427"
    kind: Literal["verified_quality"] = "verified_quality"
    pools: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Pool] = Field(
        min_length=1, description="candidate seed sets by name"
    )
    target: str | list[str] = Field(description="texts whose loss decides; not in the corpus, not in the seeds")
    seed_text: str = Field("text", description="column of seeds and target that holds the text")
    target_blocks: int = Field(256, ge=1, description="blocks of the target (of the prior's context) to measure on")
    verify: Literal["selection", "seeds"] = Field("selection", description="what is mixed in: see above")
    sample: int = Field(5000, ge=10, description="rows to select from, and as many to draw negatives from")
    keep: float = Field(0.1, gt=0, lt=1, description="share of the sample's tokens that a classifier's selection has")
    share: float = Field(0.3, gt=0, le=1, description="share of the anneal that is mixed in")
    anneal_steps: int = Field(100, ge=1, description="batches an anneal has")
    repeats: int = Field(3, ge=1, description="anneals an arm, with other draws")
    require_better: bool = Field(False, description="stop where no pool beats the usual mix, rather than warn")
    rounds: int = Field(1, ge=1, description="rounds of the loop; those after the first refine the winner")
    fasttext: FastText = Field(FastText(), description="how the classifiers are trained")
    prior: Training = Field(Training(), description="the nearly trained model")

    @model_validator(mode="after")
    def _installed(self) -> Self:
        check_installed("scores.verified_quality", "models", "torch", "transformers", "safetensors")
        return self

    def fit(self, run: Run) -> None:
        found = self._verification(run)
        doubtful = doubt(self.column_name, found)
        if self.require_better and not found["better_than_usual"]:
            raise TamisError(
                f"{doubtful}; give other pools, a longer verification (`anneal_steps`, `repeats`), or lift "
                "`require_better`"
            )
        if doubtful:
            log.warning("%s", doubtful)

    def caveats(self, run: Run) -> Sequence[str]:
        doubtful = doubt(self.column_name, self._verification(run))
        return [f"{doubtful}."] if doubtful else []

    def _verification(self, run: Run) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._winner(run).store.read(TABLE))
        return found

    def column(self, run: Run) -> Column:
        winner = self._winner(run)
        identity = fingerprint("verified_quality", self.version, winner.fingerprint)
        return Column(self.column_name, ("text",), FIELDS, partial(open_classifier, winner), identity)

    def _winner(self, run: Run) -> Artifact:
        """Artifact with the winner's `model.bin` and `model.json`, and `verification.json`."""
        role, seed = self.column_name, seed_of(run, self.prior)
        files = {
            name: (
                locate(listed(pool.positives), f"{role}.pools.{name}.positives"),
                locate(listed(pool.negatives), f"{role}.pools.{name}.negatives"),
            )
            for name, pool in self.pools.items()
        }
        target = locate(listed(self.target), f"{role}.target")
        base = prior(run, f"{role}-prior", self.prior)
        asked = self.model_dump(mode="json", exclude={"name", "pools", "target", "prior", "fasttext", "require_better"})
        asked |= self.fasttext.prints()
        prints = [identify(target), {n: [identify(good), identify(bad)] for n, (good, bad) in files.items()}]
        identity = fingerprint("verification", self.version, asked, prints, base.fingerprint)
        held_out, rows = pa.nulls(0), State()
        if needs_fit(run, role, identity):
            held_out = read_targets(target, self.seed_text, f"{role}.target")["text"].combine_chunks()
            warn_contained(run, held_out, f"{role}.target")
            rows = draw(run, Sample(("text",), 2 * self.sample, run.rows, seed, key="text", max_bytes=MAX_BYTES))
        trial = Trial(self, files, base, seed, run.config.engine.gpus > 0)
        return run.artifact(role, identity, partial(_verify, trial, held_out, rows), neural(run))


@dataclass(frozen=True)
class Trial:
    """What is compared: the files of each pool's positives and negatives, and the model to anneal."""

    recipe: VerifiedQuality
    files: dict[str, tuple[list[str], list[str]]]
    base: Artifact
    seed: int
    gpu: bool


@dataclass(frozen=True)
class Candidate:
    """A pool with its seeds and its classifier's files."""

    name: str
    positives: pa.Array
    negatives: pa.Array
    classifier: Artifact


@dataclass(frozen=True)
class Tried:
    """A candidate and the losses (repeats,) of the anneals with it."""

    candidate: Candidate
    losses: np.ndarray


def _verify(trial: Trial, target: pa.Array, rows: State, directory: Path) -> None:
    recipe = trial.recipe
    if not rows:
        raise ConfigError(f"{recipe.column_name}: the corpus has no text to select from")
    drawn = pa.array(texts(rows), pa.large_string())
    corpus, others = drawn[: len(drawn) // 2 + 1], drawn[len(drawn) // 2 :]
    anneal = Anneal(trial, target, corpus)
    usual = anneal.losses(None)

    def tried(candidate: Candidate) -> Tried:
        mixed = candidate.positives if recipe.verify == "seeds" else _best(candidate, corpus, recipe.keep)
        return Tried(candidate, anneal.losses(mixed))

    with tempfile.TemporaryDirectory() as scratch:
        arms = [tried(candidate) for candidate in _pools(trial, others, Path(scratch))]
        winner = min(arms, key=lambda arm: arm.losses.mean())
        for round_ in range(2, recipe.rounds + 1):
            arms.append(tried(_refined(winner.candidate, corpus, recipe, round_, Path(scratch))))
            if arms[-1].losses.mean() >= winner.losses.mean():
                break
            winner = arms[-1]
        table = [{"pool": arm.candidate.name} | _compared(arm.losses, usual) | _facts(arm.candidate) for arm in arms]
        for file in winner.candidate.classifier.local().iterdir():
            shutil.copyfile(file, directory / file.name)
    better = bool(winner.losses.mean() < usual.mean())
    found = {
        "target_blocks": len(anneal.target),
        "kept": winner.candidate.name,
        "better_than_usual": better,
        "loss": "nats a token on the target",
        "verify": recipe.verify,
        "steps": {"prior": recipe.prior.steps, "anneal": recipe.anneal_steps},
        "usual": {"loss": float(usual.mean()), "losses": usual.tolist()},
        "pools": table,
    }
    (directory / TABLE).write_text(json.dumps(found, indent=2))
    said = "%s: pool %s is kept, loss %.4f on the target against %.4f of the usual mix"
    log.info(said, recipe.column_name, winner.candidate.name, winner.losses.mean(), usual.mean())


def doubt(name: str, found: dict[str, Any]) -> str:
    """What speaks against the winner of a `verification.json`, without a full stop; "" where nothing does."""
    winner = next(pool for pool in found["pools"] if pool["pool"] == found["kept"])
    error = winner["gain_error"]
    gain = f"{winner['gain']:+.4f} nats a token" + (f" with a standard error of {error:.4f}" if error else "")
    if not found["better_than_usual"]:
        return f"{name}: no pool taught the model more than the usual mix did, the best ({found['kept']}) {gain}"
    if error is not None and winner["gain"] < 2 * error:
        return f"{name}: the gain of pool {found['kept']} on the usual mix, {gain}, may be chance"
    return ""


class Anneal:
    """The nearly trained model, and its losses on the target after an anneal with something mixed in."""

    def __init__(self, trial: Trial, target: pa.Array, usual: pa.Array) -> None:
        import torch

        torch.set_num_threads(threads.cpus())
        self.recipe, self.seed = trial.recipe, trial.seed
        model, self.tokenizer = load_causal(trial.base.local())
        self.model = model.to("cuda" if trial.gpu else "cpu")
        self.target, self.usual = self._blocks(target)[: trial.recipe.target_blocks], self._blocks(usual)

    def losses(self, mixed: pa.Array | None) -> np.ndarray:
        """Loss of every repeat, (repeats,); `mixed` None anneals on the usual mix alone."""
        other = None if mixed is None else self._blocks(mixed)
        return np.array([self._anneal(other, repeat) for repeat in range(self.recipe.repeats)])

    def _anneal(self, other: np.ndarray | None, repeat: int) -> float:
        recipe, training = self.recipe, self.recipe.prior
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, repeat])
        count = recipe.anneal_steps * training.batch
        blocks = self.usual[np.resize(rng.permutation(len(self.usual)), count)]
        replaced = rng.permutation(count)[: max(1, round(recipe.share * count))]
        if other is not None:
            blocks[replaced] = other[np.resize(rng.permutation(len(other)), len(replaced))]
        model = copy.deepcopy(self.model)
        train_lm(model, blocks, recipe.anneal_steps, training.batch, training.lr, repeat, warmup=1)
        return lm_loss(model, self.target)

    def _blocks(self, values: pa.Array) -> np.ndarray:
        tokens = self.tokenizer.backend_tokenizer.encode_batch_fast(values.to_pylist(), add_special_tokens=False)
        return pack([t.ids for t in tokens], self.recipe.prior.shape.context, 0)


def _pools(trial: Trial, drawn: pa.Array, scratch: Path) -> Iterator[Candidate]:
    """The pools with their classifiers; a pool without negatives has as many drawn texts as it has positives."""
    recipe = trial.recipe
    for name, (good, bad) in trial.files.items():
        role = f"{recipe.column_name}.pools.{name}"
        positives = read_seeds(good, recipe.seed_text, f"{role}.positives")
        negatives = read_seeds(bad, recipe.seed_text, f"{role}.negatives") if bad else drawn[: len(positives)]
        yield _trained(name, positives, negatives, recipe, scratch / f"pool-{name}")


def _trained(name: str, good: pa.Array, bad: pa.Array, recipe: VerifiedQuality, directory: Path) -> Candidate:
    directory.mkdir()
    try:
        train_classifier(good, bad, recipe.fasttext, directory)
    except ConfigError as error:
        raise ConfigError(f"{recipe.column_name}.pools.{name}: {error}") from error
    return Candidate(name, good, bad, Artifact(name, "", Store(str(directory))))


def _refined(winner: Candidate, corpus: pa.Array, recipe: VerifiedQuality, round_: int, scratch: Path) -> Candidate:
    """The winner with what it keeps of the corpus among its positives, and as much of the other end as negatives."""
    good = pa.concat_arrays([winner.positives, _best(winner, corpus, recipe.keep)])
    bad = pa.concat_arrays([winner.negatives, _best(winner, corpus, recipe.keep, worst=True)])
    name = f"{winner.name.partition(' refined')[0]} refined in round {round_}"
    return _trained(name, good, bad, recipe, scratch / f"round-{round_}")


def _best(candidate: Candidate, corpus: pa.Array, keep: float, worst: bool = False) -> pa.Array:
    """The texts that the classifier puts first (or last), up to a share of the bytes, at least one."""
    score = open_classifier(candidate.classifier)(pa.record_batch([corpus], ["text"]))["score"].to_numpy()
    order = np.argsort(score if worst else -score, kind="stable")
    size = pc.binary_length(corpus).to_numpy()[order].cumsum()
    return corpus.take(pa.array(order[: max(1, int(np.searchsorted(size, keep * size[-1], "right")))]))


def _compared(losses: np.ndarray, usual: np.ndarray) -> dict[str, Any]:
    """`gain`: how far the loss is below that of the usual mix; its standard error is over repeats, null of one."""
    gain = usual - losses
    error = float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else None
    return {"loss": float(losses.mean()), "gain": float(gain.mean()), "gain_error": error, "losses": losses.tolist()}


def _facts(candidate: Candidate) -> dict[str, Any]:
    facts = json.loads((candidate.classifier.local() / "model.json").read_text())
    return {"trained_on": facts["trained_on"], "held_out": facts["held_out"]}
