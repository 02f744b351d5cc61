"""What the arms of a comparison begin with: texts, the students that are cut, blocks of tokens.

Read `gather` first: random rows are a curation of their own, and what is measured on is set apart from all of it.
Where tokens go, they are counted in random rows, unless the step says where: then no arm speaks in a vocabulary that
curation made.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.compare.arms import Data, Design, by_chance, counts, scheduled_by_chance
from pipeline.compare.config import Matched
from pipeline.compare.flops import ModelShape
from pipeline.compare.measures.suite import CONVERSATION, Suite
from pipeline.compare.proxy import read_by
from pipeline.compare.trajectory import Moment, rehearse, retraced
from pipeline.compress import folder
from pipeline.compress.compression import shrink
from pipeline.compress.data import Source, curated, pack_blocks, set_apart
from pipeline.compress.documents import conversations, text_of
from pipeline.compress.place import read_json
from pipeline.compress.recover.base import Setup
from pipeline.compress.schedule._stepped import Stepped
from pipeline.compress.schedule.base import Schedule
from pipeline.compress.steps._tokenizer import trimmed_fast
from pipeline.compress.steps.sparse import Sparse
from pipeline.compress.steps.stun import Stun
from pipeline.compress.steps.vocab import Vocab
from pipeline.config import Config, HandoffConfig, OutputConfig, parse
from pipeline.corpus.storage import Store
from pipeline.curation import curate
from pipeline.errors import ConfigError
from pipeline.models.files import folder_digest
from pipeline.recipe import fingerprint
from pipeline.scores.random import Random
from pipeline.select.config import Budget, Select

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

VERSION = 2
DUPLICATES = ("exact_duplicates", "fuzzy_duplicates", "semantic_duplicates")
"""Scores that random rows pass as well, so that curation is not credited for deduplication."""
DOMAIN_BYTES = 400_000
"""Text of each held-out domain that is measured on, at the most."""
POOL = "pool"
SOURCE = "source of a row"


@dataclass(frozen=True)
class Texts:
    """Documents. What is trained on: curated ones, and a draw of random ones a seed. What is measured on: by domain."""

    curated: pa.Array
    random: tuple[pa.Array, ...]
    held_out: Mapping[str, pa.Array]
    fingerprint: str

    def of(self, data: Data, seed: int) -> pa.Array:
        return self.curated if data == "curated" else self.random[seed]


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
        kept.at([curate(by_luck(config, sieved, int(selected["tokens"]), s, directory), quiet=quiet).path])
        for s in range(config.seeds)
    ]
    split = [set_apart(source.documents(), config.held_out, config.seed) for source in (kept, *drawn)]
    if not all(len(rest) for _, rest in split):
        raise ConfigError("curated: nothing is left of it beside what is measured on: lower held_out")
    held_out = domains(config, sieved, kept, drawn)
    prints = fingerprint([kept.fingerprint, *(d.fingerprint for d in drawn)], config.held_out, config.seed)
    return Texts(split[0][1], tuple(rest for _, rest in split[1:]), held_out, prints)


def by_luck(config: Matched, sieved: Config, tokens: int, seed: int, directory: Path) -> Config:
    """A curation of the same corpus by chance, deduplicated where the curated run was."""
    copies = [s for s in sieved.scores if s.kind in DUPLICATES]
    names = {s.column_name for s in copies}
    read = [r for s in copies for r in (*read_by(s, sieved.scores), s)]  # which copy stays may be up to another score
    scores = list({s.column_name: s for s in read}.values())
    select = Select(
        budget=Budget(tokens=tokens),
        weights={"random": 1.0},
        floors={name: floor for name, floor in sieved.select.floors.items() if name in names},
        seed=config.seed + seed,
    )
    own = {
        "scores": [*scores, Random(seed=config.seed + seed)],
        "select": select,
        "output": OutputConfig(scores=False),  # its own place: never that of the curated set
        "handoff": HandoffConfig(calibration_rows=0, recovery_tokens=0),
        "run": str(directory / f"random-{seed}"),
        "engine": config.engine,
    }
    if all(s.needs == "text" for s in scores):
        own |= {"embed": None, "cluster": None}
    return sieved.model_copy(update=own)


def domains(config: Matched, sieved: Config, kept: Source, drawn: Sequence[Source]) -> dict[str, pa.Array]:
    """Held-out documents by domain: of the curated set, of the pool, and of each of its sources where they are named.

    Raises ConfigError where the share leaves nothing to measure on.
    """
    column = sieved.corpus.source
    if sieved.corpus.columns is not None and column not in sieved.corpus.columns:
        column = None  # it was not carried into the curated files
    apart = partial(set_apart, share=config.held_out, seed=config.seed)
    found = {"curated": apart(kept.documents())[0]}
    pool = distinct([rows for source in drawn for rows in sourced(source, column)])
    found[POOL] = apart(iter(pool["document"].chunks))[0]
    for name in sorted(pool["source"].drop_null().unique().to_pylist()):
        found[f"pool, {name}"] = apart(iter(pool.filter(pc.equal(pool["source"], name))["document"].chunks))[0]
    if missing := next((name for name in ("curated", POOL) if not len(found[name])), None):
        raise ConfigError(f"held_out: no text of the {missing} set is left to measure on: raise the share")
    return {name: texts for name, texts in found.items() if len(texts)}


def sourced(source: Source, column: str | None) -> Iterator[pa.Table]:
    """Usable documents of a source with what they are of, by the column that says so: null without one."""
    for batch in source.batches(source.columns | ({SOURCE: column} if column else {})):
        of = batch.column(SOURCE).cast(pa.string()) if column else pa.nulls(len(batch), pa.string())
        rows = pa.table({"document": source.documents_in(batch)[0], "source": of})
        yield rows.filter(rows["document"].is_valid())


def distinct(tables: Sequence[pa.Table]) -> pa.Table:
    """A row that several seeds drew counts once: where it comes first."""
    rows = pa.concat_tables(tables).combine_chunks()
    keys = {"text": text_of(rows["document"].chunk(0)), "source": rows["source"], "row": np.arange(rows.num_rows)}
    first = pa.table(keys).group_by(["text", "source"]).aggregate([("row", "min")])["row_min"]
    return rows.take(first.sort())


def suite_of(config: Matched, held_out: Mapping[str, pa.Array], directory: Path) -> Suite:
    """What is measured: the configured suite; without domains of its own the held-out ones, a Parquet file each."""
    if config.evaluate.domains:
        return config.evaluate
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for i, (name, documents) in enumerate(held_out.items()):
        sizes = np.cumsum(pc.binary_length(text_of(documents)).to_numpy())
        few = documents.slice(0, max(1, int(np.searchsorted(sizes, DOMAIN_BYTES))))
        paths[name] = (str(directory / f"{i:02d}.parquet"),)
        pq.write_table(pa.table({CONVERSATION if conversations(few) else "text": few}), paths[name][0])
    said = tuple(name for name, documents in held_out.items() if conversations(documents))
    return config.evaluate.model_copy(update={"domains": paths, "text": "text", "conversations": said})


@dataclass(frozen=True)
class Student:
    """A cut model on disk (the parent, where nothing is cut before training), what identifies it, and the tokens that
    were run to cut it."""

    folder: str
    identity: str
    passes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Students:
    """What arms begin with, by what it is calibrated on (or `chance`) and seed; all of one shape.

    `ends`: what they come to by seed, unhealed: themselves, but where a schedule cuts or masks while it trains. Then
    its `moments`, and of each the `shapes` behind it and the tokens that were run to choose (`passes`).
    """

    starts: dict[tuple[str, int], Student]
    ends: tuple[Student, ...]
    schedule: Schedule | None = None
    moments: tuple[Moment, ...] = ()
    shapes: tuple[dict[str, Any], ...] = ()
    passes: tuple[dict[str, int], ...] = ()

    def scheduled(self, design: Design, seed: int) -> Schedule | None:
        """What happens to an arm while it trains."""
        if self.schedule is None or design.start not in ("cut", "chance"):
            return None
        if design.start != "chance":
            return self.schedule
        assert isinstance(self.schedule, Stepped)  # of the others nothing is drawn: R is refused at the door
        return scheduled_by_chance(self.schedule, seed)


def calibrated_on(design: Design, steps: Sequence[Any]) -> str:
    """Which of the students an arm begins with, or has its shape and masks from."""
    if design.start == "chance":
        return "chance"
    masked = any(isinstance(step, Sparse | Stun) for step in steps)
    return design.calibration or (design.data if masked and design.start == "scratch" else "curated")


def make_students(
    config: Matched, parent: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Texts, directory: Path
) -> Students:
    """Cut what the arms begin with, and rehearse what happens to it in training. Raises ConfigError."""
    starts = cut_students(config, parent, model, tokenizer, texts, directory)
    if not config.schedules:
        return Students(starts, tuple(starts["curated", seed] for seed in range(config.seeds)))
    schedule, ends = config.schedules[0], []
    first: dict[str, Any] = {}
    for seed in range(config.seeds):
        start, place = Path(starts["curated", seed].folder), directory / f"end-{seed}"
        made_of = (starts["curated", seed].identity, texts.fingerprint, config.length, config.recover.identity())
        identity = fingerprint("end", VERSION, schedule.identity(), *made_of)
        done = read_json(place / "student.json")
        if done.get("fingerprint") != identity:
            own, spoken = folder.load(start)
            rows = max(config.recover.batch, getattr(schedule, "rows", 1))
            blocks = pack_blocks(texts.curated, spoken, config.length, rows * config.length, config.seed + seed)
            end = rehearse(schedule, config.recover, Setup(own, blocks))
            folder.save(end.model, spoken, place, {"rehearsed": schedule.kind}, end.masks)
            done = {"fingerprint": identity, "shapes": end.shapes, "passes": end.passes}
            done |= {"moments": [m.model_dump() for m in end.moments]}
            (place / "student.json").write_text(json.dumps(done, indent=2))
        first = first or done
        schedule = retraced(config.schedules[0], [Moment(**m) for m in first["moments"]])
        ends.append(Student(str(place), identity))
    moments = tuple(Moment(**m) for m in first["moments"])
    return Students(starts, tuple(ends), schedule, moments, tuple(first["shapes"]), tuple(first["passes"]))


def cut_students(
    config: Matched, parent: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Texts, directory: Path
) -> dict[tuple[str, int], Student]:
    """Every student that the arms begin with. The shape is that of the first curated calibration; the others get its
    counts. Raises ConfigError where theirs differ nonetheless."""
    needed = {calibrated_on(d, config.steps) for d in config.designs if d.start != "dense"}
    ways = [w for w in ("curated", "random", "chance") if w == "curated" or w in needed]
    length = config.calibration.length or config.length
    asked: Sequence[Any] = counting(config, texts, directory)
    steps, shape = asked, ""
    found: dict[tuple[str, int], Student] = {}
    for way in ways:
        for seed in range(config.seeds):
            if not steps:
                found[way, seed] = Student(str(parent), folder_digest(parent))
                continue
            own = by_chance(steps, config.seed + seed) if way == "chance" else steps
            place = directory / f"{way}-{seed}"
            data: Data = "random" if way == "random" else "curated"
            described = [s.model_dump(mode="json") for s in own]
            calibration = config.calibration.model_dump(mode="json")
            made_of = (folder_digest(parent), texts.fingerprint)
            identity = fingerprint("student", VERSION, described, calibration, length, *made_of)
            done = read_json(place / "student.json")
            if done.get("fingerprint") != identity:
                wanted, drawn = config.calibration, texts.of(data, seed)
                blocks = pack_blocks(drawn, tokenizer, length, wanted.rows * length, wanted.seed + seed)
                smaller = shrink(copy.deepcopy(model), own, blocks, config.calibration.batch)
                spoken, kept = tokenizer, smaller.vocabulary
                if kept is not None:
                    spoken = trimmed_fast(tokenizer, kept)
                folder.save(smaller.model, spoken, place, {"steps": smaller.steps}, smaller.masks)
                done = {"fingerprint": identity, "passes": dict(smaller.passes), "steps": smaller.steps}
                done |= {"shape": ModelShape.of(smaller.model).digest}
                done |= {"vocabulary": kept.tolist()} if kept is not None else {}
                (place / "student.json").write_text(json.dumps(done, indent=2))
            if not found:
                steps, shape = [counts(s, r) for s, r in zip(asked, done["steps"], strict=True)], done["shape"]
            if done["shape"] != shape:
                raise ConfigError(
                    f"steps: the student that is calibrated on {way} data, seed {seed}, has another shape than the "
                    "first: what goes depends on the data; name steps of one kind, or in another order"
                )
            found[way, seed] = Student(str(place), identity, done["passes"])
    return found


def counting(config: Matched, texts: Texts, directory: Path) -> list[Any]:
    """The steps, of which one for the vocabulary counts tokens in random rows that are trained on, unless it says
    where."""
    if not any(isinstance(s, Vocab) and s.corpus is None for s in config.steps):
        return list(config.steps)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "counted.parquet"
    pq.write_table(pa.table({"text": text_of(texts.random[0])}), path)
    here = {"corpus": [str(path)], "text": "text"}
    return [s.model_copy(update=here) if isinstance(s, Vocab) and s.corpus is None else s for s in config.steps]


Blocks = Mapping[tuple[bool, Data, int], tuple[str, int]]
"""Where blocks are and how many tokens they hold, by whether they are the parent's tokens, data and seed."""


def write_blocks(
    config: Matched,
    tokenizers: Mapping[bool, PreTrainedTokenizerFast],
    texts: Texts,
    tokens: int,
    directory: Path,
) -> Blocks:
    """Blocks as .npy, in the parent's tokens (True) and in the student's where they are others: at most `tokens`, in an
    order a seed."""
    directory.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[bool, Data, int], tuple[str, int]] = {}
    same = tokenizers[True].get_vocab() == tokenizers[False].get_vocab()
    for data in ("curated", "random"):
        for seed in range(config.seeds):
            for dense in (True, False):
                if same and not dense:
                    found[False, data, seed] = found[True, data, seed]
                    continue
                of = texts.of(data, seed)
                blocks = pack_blocks(of, tokenizers[dense], config.length, tokens, config.seed + seed)
                path = directory / f"{data}-{seed}{'' if dense else '-trimmed'}.npy"
                np.save(path, blocks, allow_pickle=False)
                found[dense, data, seed] = (str(path), blocks.size)
    return found
