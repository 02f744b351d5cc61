"""`tamis compress`, from a model and a curated run to a smaller model that was healed on it: read `compress` first.

What it leaves in the run directory:

    parent/        the model to begin with, where it was fetched or trained here
    blocks/        token blocks: calibration, recovery, held_out (.npy)
    cut/           the smaller model before it is healed
    recover/       metrics.jsonl (a line a step) and checkpoints
    model/         the result: safetensors, tokenizer, model card
    compress.json  what was asked, what went where, what it measured

The same command continues where it was broken off: `cut/` carries the fingerprint of what made it, the recovery its
checkpoints.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.compare.measures.language import bits_per_byte
from pipeline.compress import folder
from pipeline.compress.calibration import Calibration
from pipeline.compress.choice import choose
from pipeline.compress.config import Compress
from pipeline.compress.data import Source, by_score, curated, handoff, pack_blocks, set_apart, sources
from pipeline.compress.documents import conversations, shortened
from pipeline.compress.parent import parent_folder
from pipeline.compress.place import read_json, working_in
from pipeline.compress.steps._tokenizer import trimmed_fast
from pipeline.compress.steps.base import Step
from pipeline.compress.steps.vocab import Vocab
from pipeline.corpus.content import Content
from pipeline.corpus.storage import Store
from pipeline.engine.progress import stage
from pipeline.errors import ConfigError
from pipeline.models.files import folder_digest
from pipeline.recipe import fingerprint

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerFast

VERSION = 1
HELD_OUT_TOKENS = 65_536
UNSEEN_DOCUMENTS, UNSEEN_CHARS = 256, 4000
"""Documents, and characters of each, that bits per byte are measured on, at the most."""
REASONS = 20
"""Why rows are unusable, the most frequent: a chat template gives its own."""


@dataclass(frozen=True)
class Blocks:
    """Token blocks (n, length) int32 of one source: to choose calibration rows from, to heal on, to measure on."""

    calibration: np.ndarray
    recovery: np.ndarray
    held_out: np.ndarray
    unseen: pa.Array
    """Documents of `held_out`, some of them, to measure on."""
    fingerprint: str
    unusable: Counter[str]
    """Rows to heal on that were left out, by reason."""


@dataclass
class Smaller:
    """A model after its steps: masks of what must stay zero, the report of every step, tokens that were run."""

    model: nn.Module
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    vocabulary: np.ndarray | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    passes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Compressed:
    """Where the result is, parameters before and after, and what the parent, the cut and the healed model (None where
    nothing was healed) say of unseen texts of the data: bits per byte, which do not depend on the vocabulary. Rows of
    the data that were left out, by reason."""

    folder: str
    report: str
    parameters: tuple[float, float]
    dense: float
    cut: float
    healed: float | None
    unusable: Counter[str]


def compress(config: Compress, quiet: bool = False) -> Compressed:
    """Make a model smaller and heal it, as a configuration says. Raises TamisError for all that a user can mend."""
    with working_in(config.run, config.engine.cpus) as directory:
        return _compress(config, directory, quiet)


def _compress(config: Compress, directory: Path, quiet: bool) -> Compressed:
    began = time.monotonic()
    data = sources(config.data, config)
    with stage("parent", quiet):
        parent = parent_folder(config.model, directory / "parent", config.held_out, config.seed)
        model, tokenizer = folder.load(parent)
    blocks = gather(config, data, tokenizer)
    dense = language(model, tokenizer, blocks.unseen)
    before = folder.count(model)

    steps = [counting_in(step, config) for step in config.steps]
    asked = {"steps": [s.model_dump(mode="json") for s in steps], "by": config.calibration.model_dump()}
    identity = fingerprint("cut", VERSION, asked, folder_digest(parent), blocks.fingerprint)
    place = directory / "cut"
    report = read_json(place / "tamis.json")
    if report.get("fingerprint") != identity:
        with stage("cut", quiet):
            chosen = choose(config.calibration, model, steps, draws(config, tokenizer, blocks), blocks.held_out)
            smaller = shrink(copy.deepcopy(model), steps, chosen.blocks, config.calibration.batch)
        smaller.passes.update(chosen.passes)
        report = {
            "fingerprint": identity,
            "steps": smaller.steps,
            "calibration": chosen.about,
            "passes": dict(smaller.passes),
        }
        if smaller.vocabulary is not None:
            tokenizer = trimmed_fast(tokenizer, smaller.vocabulary)
            report["vocabulary"] = smaller.vocabulary.tolist()
        report["language"] = language(smaller.model, tokenizer, blocks.unseen)
        card = _card(config, parent, blocks, before, folder.count(smaller.model, smaller.masks), report, dense)
        folder.save(smaller.model, tokenizer, place, card, smaller.masks)
        (place / "tamis.json").write_text(json.dumps(report, indent=2))
    student, tokenizer = folder.load(place)
    masks = folder.masks(place)
    after = folder.count(student, masks)
    vocabulary = np.array(report["vocabulary"], np.int64) if "vocabulary" in report else None
    if vocabulary is not None:
        blocks = gather(config, data, tokenizer)  # in the new tokens

    healed = None
    if config.recover:
        from pipeline.compress.healing import heal

        with stage("heal", quiet):
            given = heal(
                student,
                config.recover,
                blocks.recovery,
                config.tokens,
                teacher=model if config.recover.needs_teacher else None,
                masks=masks,
                vocabulary=vocabulary,
                held_out=blocks.held_out,
                directory=directory / "recover",
                engine=config.engine,
                callbacks=config.schedules,
            )
        student, masks, after = given.model, given.masks, folder.count(given.model, given.masks)
        healed = language(student, tokenizer, blocks.unseen)
    report |= {"healed": healed}
    folder.save(
        student, tokenizer, directory / "model", _card(config, parent, blocks, before, after, report, dense), masks
    )
    whole = report | {
        "config": config.model_dump(mode="json"),
        "data": blocks.fingerprint,
        "unusable_rows": dict(blocks.unusable.most_common(REASONS)),
        "dense": dense,
        "before": before,
        "after": after,
        "seconds": round(time.monotonic() - began, 1),
    }
    Store(str(directory)).write(json.dumps(whole, indent=2).encode(), "compress.json")
    where = (str(directory / "model"), str(directory / "compress.json"))
    parameters = (before["all"] or 0, after["all"] or 0)
    return Compressed(*where, parameters, dense, report["language"], healed, blocks.unusable)


def gather(config: Compress, data: tuple[Source, Source], tokenizer: PreTrainedTokenizerFast) -> Blocks:
    """The blocks of what there is to calibrate from and to heal on; what is measured on is in neither of the others."""
    to_calibrate, to_recover = data
    length = config.calibration.length or config.length
    unusable: Counter[str] = Counter()
    measured, rest = set_apart(to_recover.documents(unusable), config.held_out, config.seed)
    unseen = shortened(measured.slice(0, UNSEEN_DOCUMENTS), UNSEEN_CHARS)
    if not len(unseen):
        raise ConfigError("held_out: no text of the data is set apart to measure on: raise the share")
    calibration = rest
    if to_calibrate != to_recover:
        _, calibration = set_apart(to_calibrate.documents(), config.held_out, config.seed)
    wanted = config.calibration.rows * length * max(1, config.calibration.draws)
    return Blocks(
        pack_blocks(calibration, tokenizer, length, wanted, config.calibration.seed),
        pack_blocks(rest, tokenizer, config.length, config.tokens, config.seed),
        pack_blocks(measured, tokenizer, config.length, HELD_OUT_TOKENS, config.seed),
        unseen,
        fingerprint(to_calibrate.fingerprint, to_recover.fingerprint, config.length, length, config.held_out),
        unusable,
    )


def shrink(model: nn.Module, steps: Sequence[Step], calibration: np.ndarray, batch: int) -> Smaller:
    """Apply steps to a model, in place, each measuring on the calibration blocks what the one before left."""
    done, batches = Smaller(model), Calibration.of_blocks(model, calibration, batch).batches
    for step in steps:
        measured = Calibration(done.model, batches)
        began = time.monotonic()
        outcome = step.apply(done.model, measured)
        batches = measured.batches  # in other tokens, where the step changed the vocabulary
        standing = _standing(outcome.model, done.masks, step.kind)
        new = {name: mask & standing[name] if name in standing else mask for name, mask in outcome.masks.items()}
        done.model, done.masks = outcome.model, standing | new
        done.vocabulary = outcome.vocabulary if outcome.vocabulary is not None else done.vocabulary
        done.passes.update(measured.passes)
        about = {"kind": step.kind, "seconds": round(time.monotonic() - began, 2), "dropped_rows": measured.dropped}
        done.steps.append(about | outcome.report)
    return done


def _standing(model: nn.Module, masks: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Masks of earlier steps whose zeros this one left. Raises ConfigError where it cut what they lie on."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ConfigError(f"steps: {kind} cuts {name}, which a step before it masks: put steps that mask last")
    return {name: mask for name, mask in masks.items() if not parameters[name][~mask].any()}


def counting_in(step: Step, config: Compress) -> Step:
    """A vocabulary step counts tokens in the data that heal the model, unless it says where."""
    if isinstance(step, Vocab) and step.corpus is None:
        return step.model_copy(update={"corpus": config.data} | {n: getattr(config, n) for n in Content.model_fields})
    return step


def language(model: nn.Module, tokenizer: PreTrainedTokenizerFast, documents: pa.Array) -> float:
    """Bits per byte, mean over texts, or over the responses of conversations."""
    items = documents if conversations(documents) else documents.to_pylist()
    return bits_per_byte(model, tokenizer, items, "unseen")[0].mean


def draws(config: Compress, tokenizer: PreTrainedTokenizerFast, blocks: Blocks) -> dict[tuple[str, int], np.ndarray]:
    """Calibration blocks for every way to choose them that the configuration names.

    Random ones are drawn from the blocks, those of a score packed from the best rows of the run's curated set. Raises
    ConfigError for a score that the run does not have.
    """
    wanted, found = config.calibration, {}
    for way, seed in wanted.choices:
        if way == "random":
            order = np.random.default_rng(seed).permutation(len(blocks.calibration))
            found[way, seed] = blocks.calibration[order[: wanted.rows]]
            continue
        if not isinstance(config.data, str) or handoff(config.data) is None:
            raise ConfigError(
                f"calibration.by: {way!r}: only a curated run knows scores of its rows: name one as `data`"
            )
        length = blocks.calibration.shape[1]
        best = set_apart(iter([by_score(curated(config.data), way)]), config.held_out, config.seed)[1]
        found[way, seed] = pack_blocks(best, tokenizer, length, wanted.rows * length, seed=None)
    return found


def _card(
    config: Compress, parent: Path, blocks: Blocks, before: Any, after: Any, report: Mapping[str, Any], dense: float
) -> dict[str, Any]:
    return {
        "parent": config.model if isinstance(config.model, str) else parent.name,
        "data": config.data if isinstance(config.data, str) else ", ".join(config.data),
        "data_fingerprint": blocks.fingerprint,
        "measured_on": "unseen responses" if conversations(blocks.unseen) else "unseen texts",
        "before": before,
        "after": after,
        "steps": report["steps"],
        "bits_per_byte": {"dense": dense, "cut": report["language"], "healed": report.get("healed")},
        "recovered": config.recover.kind if config.recover else None,
        "tokens": config.tokens if config.recover else 0,
    }
