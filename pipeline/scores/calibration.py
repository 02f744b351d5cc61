"""The calibration set that prunes best: of several random ones, that after which the model has changed least.

Source: NIRVANA, Ai et al. 2025, "Structured Pruning Reimagined for Large Language Models Compression", arXiv
2509.14230, `iDEA-iSAIL-Lab-UIUC/NIRVANA`. S sets of rows are drawn under S seeds, the model is pruned with each, and
the set with the least mean KL(p || q) over the tokens of a probe wins, p of the model and q of what pruning left of it,
in nats.

The unit is the set: rows of the winner score 1, those of the second set 1/2, of the third 1/3; rows that were never
drawn score 0. So a budget of the winner's rows keeps the winner. Artifact `<name>-sets`: `sets.json` (KL and standard
error of every set, mean and spread over all, whether they differ), `rows.parquet` (which rows are in which set) and
`sets.npz` (their tokens, and the KL of every probe sequence). Where best and worst are not three standard errors apart,
sequence by sequence of the probe, nothing was learned: the file says so and the first set is taken. (Means of eight
sets that do not differ at all lie further apart than one standard error of each nearly always.)

`pruner: wanda` (`pipeline.scores._wanda`) is built in; any other is named `module:function`, takes (model, ids (n,
tokens), sparsity) and prunes the model in place. NIRVANA's own pruner is not here.

Measured on tiny models at sparsity 0.5: rank correlation of 0.98 and more between a set's KL and the loss of the pruned
model on other text; at 0.3, where pruning hardly moves the loss, between -0.17 and 0.81.

What to know: the released code computes the KL but does not select by it; what it ships amounts to a choice of seed,
and nobody has shown why the least KL over random sets should be best. It costs S prunings. Judged on general text it
favours general text: give `probe` files of the domain that the model is for. From the code: 32 rows of 128 tokens, a
probe of 128 x 64, sparsity 0.5; the code does not say how many sets, 8 is ours. Rows shorter than a sequence are packed
end to end. A text that is in the probe is in no set. Of instructions the KL is that of the responses' tokens, and a
sequence of the probe in which there is none says nothing.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipeline.corpus.chat import TYPES
from pipeline.engine import threads
from pipeline.errors import ConfigError, TamisError
from pipeline.hashing import hash64, row_keys
from pipeline.models.causal import LONGEST, Encoder, check_model, context, load_causal, model_source
from pipeline.models.files import content_digest, folder_digest, folder_of
from pipeline.recipe import Column, Resources, State, Transform, fingerprint
from pipeline.sample import Sample, needs_fit, sampled, texts
from pipeline.scores._divergence import between, kl
from pipeline.scores._seeds import identify, locate, read_seeds
from pipeline.scores._targets import read_conversations
from pipeline.scores._wanda import wanda
from pipeline.scores.base import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.artifact import Artifact
    from pipeline.corpus.chat import Chat
    from pipeline.run import Run

log = logging.getLogger(__name__)

Rows = Mapping[str, pa.Array]
"""What a model reads of n rows, by its references."""
Pruner = Callable[["PreTrainedModel", np.ndarray, float], None]
FIELDS = pa.schema([("score", pa.float32()), ("candidate", pa.int32())])
SHARD, ROW = "address.shard", "address.row"
SETS, ROWS, TOKENS = "sets.json", "rows.parquet", "sets.npz"
OVERDRAWN = 8
"""Rows drawn for every sequence of a set: short ones are packed."""
APART = 3
"""A false alarm in 20 for eight sets: their range is studentized, and 4.29 / sqrt(2) = 3.03 (Tukey)."""
TOKEN_BYTES = 16
"""Bytes that a token stands for at the most; a text is cut there."""


class Calibration(Score):
    """Rows of the candidate set with which pruning changes the model least."""

    claim = "in the calibration set after which the pruned model is nearest to the original"
    cost = "S prunings and S + 1 passes over the probe, whatever the corpus; a hash a row and set"
    source = "Ai et al. 2025 (NIRVANA), arXiv 2509.14230; Sun et al. 2023 (Wanda), arXiv 2306.11695"
    kind: Literal["calibration"] = "calibration"
    model: str = Field(description="folder of the causal model to prune, or hf://org/name[@revision]")
    pruner: str = Field("wanda", pattern=r"^(wanda|[\w.]+:\w+)$", description="wanda, or module:function of your own")
    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the weights that the pruner takes away")
    candidates: int = Field(8, ge=2, description="sets to try")
    rows: int = Field(32, ge=1, description="sequences of a set")
    tokens: int = Field(128, ge=2, description="tokens of a sequence")
    probe: str | list[str] | None = Field(
        None, description="texts to judge on: Parquet, .jsonl or .txt files (default: a draw from the corpus)"
    )
    probe_rows: int = Field(128, ge=2, description="sequences of the probe")
    probe_tokens: int = Field(64, ge=2, description="tokens of a sequence of the probe")
    probe_text: str = Field("text", description="column of the probe's files that holds the text")
    seed: int | None = Field(None, description="seed of the draws (default: the run's)")

    @model_validator(mode="after")
    def _there(self) -> Self:
        check_model(self.kind, self.model)
        if self.pruner != "wanda":
            try:
                pruner_of(self.pruner)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"pruner {self.pruner!r} cannot be imported: {error}") from error
        return self

    def fit(self, run: Run) -> None:
        self._sets(run)

    def column(self, run: Run) -> Column:
        sets = self._sets(run)
        identity = fingerprint("calibration", self.version, sets.fingerprint)
        seeds = tuple(sample.seed for sample in self._samples(run))
        return Column(self.column_name, ("text",), FIELDS, partial(_open, sets, seeds), identity)

    def _sets(self, run: Run) -> Artifact:
        """The artifact with the sets and what became of them; tried once."""
        source = model_source(run, self.model)
        folder = folder_of(source)
        if (most := max(self.tokens, self.probe_tokens)) > context(folder):
            raise ConfigError(f"{self.column_name}.tokens: {most} is more than the model takes, {context(folder)}")
        files = locate([self.probe] if isinstance(self.probe, str) else self.probe, "probe") if self.probe else []
        samples = self._samples(run)
        asked = self.model_dump(mode="json", exclude={"name", "model", "probe", "seed"})
        module = self.pruner.partition(":")[0]
        code = content_digest(Path(str(importlib.import_module(module).__file__))) if ":" in self.pruner else ""
        precision = "bfloat16" if run.config.engine.gpus else "float32"
        told = [] if run.layout.chat is None else [run.layout.chat.identity]
        about = (
            *told,
            asked,
            samples[0].seed,
            folder_digest(folder),
            identify(files),
            code,
            precision,
            run.identity("text"),
        )
        name, identity = f"{self.column_name}-sets", fingerprint("calibration sets", self.version, *about)
        state: State = {}
        if needs_fit(run, name, identity):
            state = run.aggregate(Draws(tuple(samples)))
        probe = self._probe(files, run.layout.chat) if files and state else None
        resources = Resources(cpus=run.config.engine.cpus, gpus=run.config.engine.gpus)
        return run.artifact(name, identity, partial(_try_sets, self, source, precision, state, probe), resources)

    def _probe(self, files: Sequence[str], chat: Chat | None) -> Rows:
        if chat is None:
            return {"text": read_seeds(files, self.probe_text, "probe")}
        table = read_conversations(files, chat, "probe")
        return {name: table[name].combine_chunks() for name in table.column_names}

    def _samples(self, run: Run) -> list[Sample]:
        """The draw of every set and, last, that of the probe; each under a seed of its own."""
        seed = run.seed if self.seed is None else self.seed
        size = TOKEN_BYTES * max(self.tokens, self.probe_tokens)
        wanted = [self.rows] * self.candidates + [self.probe_rows]
        return [
            Sample((*run.layout.spoken, SHARD, ROW), OVERDRAWN * rows, run.rows, _seed_of(seed, number), "text", size)
            for number, rows in enumerate(wanted)
        ]


def _seed_of(seed: int, number: int) -> int:
    return int(fingerprint("calibration", seed, number)[:15], 16)


def pruner_of(name: str) -> Pruner:
    """`wanda`, or the function behind `module:function`. Raises ImportError and AttributeError."""
    if name == "wanda":
        return wanda
    module, _, function = name.partition(":")
    found: Pruner = getattr(importlib.import_module(module), function)
    return found


@dataclass(frozen=True)
class Draws:
    """Statistic: several samples in one pass; the i-th one's state with `i/` before its names."""

    samples: tuple[Sample, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r for sample in self.samples for r in sample.inputs))

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        return self._each(lambda i, sample: sample.update(part(state, i), batch))

    def merge(self, states: Sequence[State]) -> State:
        return self._each(lambda i, sample: sample.merge([part(state, i) for state in states]))

    def _each(self, made: Callable[[int, Sample], State]) -> State:
        found = ((i, made(i, sample)) for i, sample in enumerate(self.samples))
        return {f"{i}/{name}": values for i, of_i in found for name, values in of_i.items()}


def part(state: State, number: int) -> State:
    """State of one of the samples of `Draws`."""
    prefix = f"{number}/"
    return {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}


def choose(kl: np.ndarray) -> tuple[list[int], bool]:
    """Sets from best to worst and whether they differ, from the KL (sets, probe sequences).

    A set whose KL is not finite is left out. They differ where the worst is more than `APART` standard errors of the
    paired difference above the best; else the first comes first. Raises TamisError where no set is left.
    """
    usable = np.flatnonzero(np.isfinite(kl).all(axis=1))
    if not len(usable):
        raise TamisError("calibration: the KL of every set is not finite: lower the sparsity, or look at the pruner")
    order = usable[np.argsort(kl[usable].mean(axis=1), kind="stable")].tolist()
    apart = kl[order[-1]] - kl[order[0]]
    differ = bool(apart.mean() > APART * apart.std() / np.sqrt(len(apart)))
    return (order if differ else [int(usable[0]), *(s for s in order if s != usable[0])]), differ


def packed(
    rows: Sequence[Sequence[int] | np.ndarray], count: int, tokens: int, end: int | None
) -> tuple[np.ndarray, int]:
    """Sequences (m <= count, tokens) int32 of rows end to end, and how many rows went in.

    A row gives its first `tokens` tokens; a shorter one is closed by `end`.
    """
    stream: list[int] = []
    used = 0
    for row in rows:
        if len(stream) >= count * tokens:
            break
        stream.extend(row[:tokens] if len(row) >= tokens or end is None else [*row, end])
        used += 1
    whole = min(count, len(stream) // tokens)
    return np.array(stream[: whole * tokens], np.int32).reshape(whole, tokens), used


def divergence_of(
    model: PreTrainedModel,
    sets: Sequence[np.ndarray],
    probe: np.ndarray,
    pruner: Pruner,
    sparsity: float,
    told: np.ndarray | None = None,
) -> np.ndarray:
    """Mean KL in nats a token of every sequence of the probe (n, tokens), after pruning with each set; (sets, n).

    `told`: bool (n, tokens), the tokens that the mean is of (default: all but the first), at least one a sequence.
    """
    offsets = np.arange(0, probe.size + 1, probe.shape[1])
    found = []
    for ids in sets:
        pruned = copy.deepcopy(model)
        pruner(pruned, ids, sparsity)
        value, _ = between(model, pruned, probe.ravel(), offsets, kl)
        counts = True if told is None else told[:, 1:]
        found.append(value.reshape(probe.shape)[:, 1:].mean(axis=1, dtype=np.float64, where=counts))
    return np.stack(found)


def _try_sets(
    recipe: Calibration,
    source: Artifact | Path,
    precision: str,
    state: State,
    probe_rows: Rows | None,
    directory: Path,
) -> None:
    import torch

    if not state:
        raise TamisError("calibration: the corpus has no text to draw from; see quarantine/row for the reasons")
    torch.set_num_threads(threads.cpus())
    model, tokenizer = load_causal(folder_of(source))
    model = model.to("cuda" if precision == "bfloat16" else "cpu", getattr(torch, precision))
    encoder = Encoder(tokenizer, LONGEST)

    def cut(rows: Rows, count: int, tokens: int, what: str) -> tuple[np.ndarray, np.ndarray | None, int]:
        """Sequences, which of their tokens are of a response, and how many rows they take."""
        read = encoder.read(rows)
        ids, used = packed(np.split(read.ids, read.offsets[1:-1]), count, tokens, tokenizer.eos_token_id)
        if len(ids) < count:
            raise ConfigError(
                f"calibration: {len(rows['text']):,} rows fill {len(ids):,} of the {count:,} sequences of {tokens:,} "
                f"tokens that {what} needs: ask for fewer or shorter ones"
            )
        if read.target is None:
            return ids, None, used
        end = None if tokenizer.eos_token_id is None else 0
        told, _ = packed(np.split(read.target, read.offsets[1:-1]), count, tokens, end)
        return ids, told > 0, used

    probe_rows = probe_rows or _rows(part(state, recipe.candidates))
    probe, told, used = cut(probe_rows, recipe.probe_rows, recipe.probe_tokens, "the probe")
    if told is not None:
        heard = told[:, 1:].any(axis=1)
        if heard.sum() < 2:
            raise ConfigError("calibration: next to no sequence of the probe holds a response: raise probe_tokens")
        probe, told = probe[heard], told[heard]
    size = TOKEN_BYTES * max(recipe.tokens, recipe.probe_tokens)
    held_out = {_cut(text, size) for text in probe_rows["text"].slice(0, used).to_pylist()}
    sets, members = [], []
    for number in range(recipe.candidates):
        of_set = part(state, number)
        apart = [i for i, text in enumerate(texts(of_set)) if _cut(text, size) not in held_out]
        rows = {name: values.take(pa.array(apart, pa.int64())) for name, values in _rows(of_set).items()}
        ids, _, used = cut(rows, recipe.rows, recipe.tokens, "a set")
        sets.append(ids)
        members.append({name: of_set[name][apart[:used]] for name in ("hash", SHARD, ROW)})
    found = divergence_of(model, sets, probe, pruner_of(recipe.pruner), recipe.sparsity, told)
    _write(directory, found, sets, members, probe)


def _rows(state: State) -> Rows:
    return {name: sampled(state, name) for name in TYPES if name in state}


def _cut(text: str, size: int) -> str:
    """What a draw keeps of a text."""
    return text.encode()[:size].decode(errors="ignore")


def _write(directory: Path, found: np.ndarray, sets: list[np.ndarray], members: list[State], probe: np.ndarray) -> None:
    order, differ = choose(found)
    for broken in sorted(set(range(len(sets))) - set(order)):
        log.warning("calibration: set %d is left out: the KL after pruning with it is not finite", broken)
    if not differ:
        log.warning("calibration: the sets do not differ by more than the probe's noise: the first is taken")
    mean, error = found.mean(axis=1), found.std(axis=1) / np.sqrt(found.shape[1])
    rows = [len(of_set["hash"]) for of_set in members]
    facts = {
        "chosen": order[0],
        "order": order,
        "differ": differ,
        "mean_kl": float(mean[order].mean()),
        "spread_of_kl": float(mean[order].std()),
        "sets": [
            {"rows": n, "kl": float(m), "standard_error": float(e)} if number in order else {"rows": n}
            for number, (n, m, e) in enumerate(zip(rows, mean, error, strict=True))
        ],
    }
    (directory / SETS).write_text(json.dumps(facts, indent=2))
    np.savez(directory / TOKENS, ids=np.stack(sets), kl=found, probe=probe)
    columns = {name: np.concatenate([of_set[name] for of_set in members]) for name in ("hash", SHARD, ROW)}
    table = {"candidate": np.repeat(np.arange(len(sets), dtype=np.int32), rows)} | columns
    pq.write_table(pa.table(table), directory / ROWS)


def _open(sets: Artifact, seeds: tuple[int, ...]) -> Transform:
    order = json.loads((sets.local() / SETS).read_text())["order"]
    table = pq.read_table(sets.local() / ROWS)
    candidate, hashes = table["candidate"].to_numpy(), table["hash"].to_numpy()

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        keys = row_keys(batch.column("text"))
        value, which = np.zeros(len(batch), np.float32), np.full(len(batch), -1, np.int32)
        for place, number in reversed(list(enumerate(order))):  # the best set that holds a row has the last word
            held = np.isin(hash64(keys, seeds[number]), hashes[candidate == number])
            value[held], which[held] = 1 / (1 + place), number
        return pa.record_batch([pa.array(value), pa.array(which)], schema=FIELDS)

    return score
