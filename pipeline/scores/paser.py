"""PASER: rows that heal a pruned model. More of what it forgot, cheap rows before dear ones, no contradictions.

Source: He et al. 2025, "PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery", arXiv
2502.12594, `BokwaiHo/PASER`. Four steps:

1. Capabilities: clusters of a sample of vectors by S2RIC (`pipeline.scores._s2ric`). Every row of the corpus then goes
   to the capability with the nearest mean.
2. Degradation: JSD of the original's and the pruned model's next-token distributions, the mean over a row's tokens in
   nats. CDS_k is its mean over capability k.
3. Efficiency: IES = JSD / ln(1 + cost) ranks the rows of a capability.
4. Conflicts: down that ranking a row is turned away where two of its key phrases (`pipeline.scores._keyphrases`) have
   been seen, but never together; else it is taken.

The score of the r-th row (from 0) taken in capability k is share_k / (r + 1/2) with share_k = CDS_k / sum of all, the
quotient of Sainte-Lague's apportionment: the best B rows hold B share_k rows of every capability, rounded, whatever the
budget B is, and a capability that runs out leaves its room to the others. A row turned away has minus the inverse of
its quotient, below all that were taken; `floors: {paser: 0}` drops it. Artifact `<name>-degradation`: rows, CDS and
share of every capability.

What differs from the released code, and why. It sums the JSD over the tokens, so that long answers win: this is the
mean. It takes logarithms of zero: these are guarded. Its cost, which mixes tokens and characters, is the number of
tokens here, or its square with `price: squared`, the paper's. The paper encodes the instruction; the vectors here are
the run's, which are of the text. In a corpus of instructions the divergence is that of the responses' tokens. Where the
models do not differ at all, shares are those of the rows.

What to know: the filter depends on the order, turns away what is new between known things, and has not been compared
with a random one of the same strength; it looks at the first 100,000 rows of a capability and takes those behind as
they come. The paper reports that healing on all data is worse than no healing (35.64 against 57.78, LLaMA2-7B, 25 %),
which speaks of its training recipe: compare at equal steps. So does a toy (tests): ten gentle steps on the chosen rows
heal what was lost (loss 5.8 to 3.2, random rows 4.1) and spare the rest; thirty at three times the rate do not.
From the code: 10 capabilities, 256 tokens. Ours: 5 key phrases a row, a sample of 5,000.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.corpus.text import clean_text, is_text
from pipeline.engine import threads
from pipeline.engine.regroup import ROW, SHARD, key_groups, unopened
from pipeline.errors import ConfigError, CorpusError
from pipeline.models.causal import Scorer, check_model, context, load_causal, model_source
from pipeline.models.files import folder_digest, folder_of
from pipeline.recipe import QUARANTINE, Column, Resources, State, Transform, fingerprint
from pipeline.sample import Sample, draw, needs_fit
from pipeline.scores import _divergence as divergence
from pipeline.scores._keyphrases import english, key_phrases
from pipeline.scores._s2ric import s2ric
from pipeline.scores.base import Score
from pipeline.vectors import as_float32, flat_index, matrix, nearest

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

log = logging.getLogger(__name__)

VECTOR = "embed.vector"
FIELDS = pa.schema(
    [
        ("score", pa.float32()),
        ("capability", pa.int32()),
        ("jsd", pa.float32()),
        ("cost", pa.float32()),
        ("conflict", pa.bool_()),
    ]
)
JSD = pa.schema([("jsd", pa.float32()), ("tokens", pa.int32()), ("lost_mass", pa.float32()), (QUARANTINE, pa.string())])
PHRASES = pa.schema([("phrases", pa.list_(pa.uint64()))])
CAPABILITY = pa.schema([("capability", pa.int32())])
MEANS, NOTES, TABLE = "means.npy", "capabilities.json", "degradation.json"
FILTERED = 100_000
PHRASE_CHARS = 8192
"""Of a text, what key phrases are looked for in."""
LEAST_SHARE = 1e-9
NOT_UTF8 = "text is not UTF-8"


class Paser(Score):
    """Rows by degraded capability, efficiency and consistency; takes the model before and after pruning."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "vectors"
    claim = "on what the pruned model forgot, cheap, and in no conflict with the rows before it"
    cost = "a forward pass of both models, 4 N FLOPs a token, and T V for the divergence"
    source = "He et al. 2025, arXiv 2502.12594"
    kind: Literal["paser"] = "paser"
    original: str = Field(description="folder of the causal model before pruning, or hf://org/name[@revision]")
    pruned: str = Field(description="the same after pruning, with the original's tokenizer")
    prompt: str | None = Field(
        None, description="source column that comes before the text, on lines of its own; only the text is measured"
    )
    max_tokens: int = Field(256, ge=2, description="tokens of prompt and text that count, alike in both models")
    capabilities: int = Field(10, ge=1, description="clusters of the vectors")
    sample: int = Field(5000, ge=2, le=20_000, description="rows to find them on; time and memory grow as its square")
    price: Literal["tokens", "squared"] = Field("tokens", description="what a row costs to train on")
    phrases: int = Field(5, ge=0, le=32, description="key phrases of a row that may be in conflict; 0: no filter")
    stop_words: tuple[str, ...] | None = Field(
        None, description="where key phrases end (default: English; for other languages a list, or phrases: 0)"
    )
    seed: int | None = Field(None, description="seed of the sample and of NMF (default: the run's)")

    @model_validator(mode="after")
    def _there(self) -> Self:
        check_model(self.kind, self.original)
        check_model(self.kind, self.pruned)
        if not self.phrases and self.stop_words is not None:
            raise ValueError("phrases: 0 switches the filter off: remove stop_words")
        return self

    def support(self, run: Run) -> Sequence[Column]:
        jsd = self._jsd(run)
        if not self.phrases:
            return (jsd,)
        words = english() if self.stop_words is None else tuple(w.lower() for w in self.stop_words)
        identity = fingerprint("key phrases", 1, words, self.phrases)
        name = f"phrases-{identity[:12]}"
        return jsd, Column(name, ("text",), PHRASES, partial(_open_phrases, words, self.phrases), identity)

    def fit(self, run: Run) -> None:
        self._capabilities(run)

    def column(self, run: Run) -> Column:
        jsd, *phrases = (column.name for column in self.support(run))
        inputs = (f"{jsd}.jsd", f"{jsd}.tokens", *(f"{name}.phrases" for name in phrases))
        identity = fingerprint("paser", self.version, self.price, self.phrases)
        return Column(self.column_name, inputs, FIELDS, unopened, identity)

    def fill(self, run: Run) -> None:
        capability = self._capability(run)
        run.materialize([capability])
        column, key = self.column(run), f"{capability.name}.capability"
        shares = self._shares(run, key, column.inputs[0])
        run.regroup(column, key, partial(_rank, key, column.inputs, self.price == "squared", shares))

    def _jsd(self, run: Run) -> Column:
        """Support column of the two models; shared by whoever asks for the same."""
        sources = model_source(run, self.original), model_source(run, self.pruned)
        folders = folder_of(sources[0]), folder_of(sources[1])
        divergence.check_tokenizers(*folders, self.column_name)
        if self.prompt is not None:
            if run.layout.chat is not None:
                raise ConfigError(
                    f"{self.column_name}.prompt: the corpus says what is answered: remove the prompt here"
                )
            if self.prompt not in run.schema.names:
                there = ", ".join(run.schema.names)
                raise ConfigError(
                    f"{self.column_name}.prompt: the corpus has no column {self.prompt!r}; it has {there}"
                )
            if not is_text(kind := run.schema.field(self.prompt).type):
                raise ConfigError(f"{self.column_name}.prompt: column {self.prompt!r} is {kind}, not text")
        tokens = min(self.max_tokens, *map(context, folders))
        engine = run.config.engine
        precision = "bfloat16" if engine.gpus else "float32"
        identity = fingerprint("jsd", 1, [folder_digest(f) for f in folders], tokens, precision, self.prompt)
        prompt = None if self.prompt is None else f"corpus.{self.prompt}"
        return Column(
            f"jsd-{identity[:12]}",
            (*run.layout.spoken, *([prompt] if prompt else [])),
            JSD,
            partial(_open_jsd, *sources, prompt, tokens, precision),
            identity,
            Resources(cpus=engine.cpus, gpus=engine.gpus),
        )

    def _capabilities(self, run: Run) -> Artifact:
        """Artifact with the mean of every capability, (k, d) float32 unit vectors."""
        name, seed = f"{self.column_name}-capabilities", run.seed if self.seed is None else self.seed
        identity = fingerprint("capabilities", 1, self.capabilities, self.sample, seed, run.identity(VECTOR, "row.key"))
        sample = Sample((VECTOR,), self.sample, run.rows, seed)
        state = draw(run, sample) if needs_fit(run, name, identity) else {}
        return run.artifact(name, identity, partial(_find_capabilities, state, self.capabilities, seed))

    def _capability(self, run: Run) -> Column:
        means = self._capabilities(run)
        identity = fingerprint("capability", 1, means.fingerprint)
        name = f"{self.column_name}-capability"
        return Column(name, (VECTOR,), CAPABILITY, partial(_open_capability, means), identity)

    def _shares(self, run: Run, capability: str, jsd: str) -> np.ndarray:
        """Share of the budget of every capability; float64, sums to 1. Stored with what it is made of."""
        name = f"{self.column_name}-degradation"
        identity = fingerprint("degradation", 1, run.identity(capability, jsd))
        degradation = Degradation(capability, jsd, self.capabilities)
        state = run.aggregate(degradation) if needs_fit(run, name, identity) else {}
        artifact = run.artifact(name, identity, partial(_write_shares, state), resources=None)
        return np.array(json.loads((artifact.local() / TABLE).read_text())["share"])


@dataclass(frozen=True)
class Degradation:
    """Statistic: by capability `rows` (k,) int64 and the sum of `jsd` (k,) float64."""

    capability: str
    jsd: str
    count: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.capability, self.jsd)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        capability = batch.column(self.capability).to_numpy()
        new = {
            "rows": np.bincount(capability, minlength=self.count),
            "jsd": np.bincount(capability, batch.column(self.jsd).to_numpy(), self.count),
        }
        return self.merge([state, new]) if state else new

    def merge(self, states: Sequence[State]) -> State:
        return {name: np.sum([s[name] for s in states], axis=0) for name in states[0]}


def shares(rows: np.ndarray, cds: np.ndarray) -> np.ndarray:
    """CDS_k / sum CDS over (k,) capabilities; those of the rows where nothing has degraded."""
    weight = np.where(rows > 0, cds, 0) if cds.any() else rows
    return np.asarray(weight / max(float(weight.sum()), LEAST_SHARE))


def efficiency(jsd: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """IES; float64. The paper's JSD / ln(cost) divides by zero at a cost of 1."""
    return np.asarray(jsd / np.log1p(cost), np.float64)


def conflicts(phrases: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows turned away, (n,) bool, out of the key phrases of every row in their order.

    Phrases of a row that was taken are known, and joined with one another; a row with two known phrases that are not
    joined is turned away, and leaves no trace.
    """
    known: set[int] = set()
    joined: set[tuple[int, int]] = set()
    away = np.zeros(len(phrases), bool)
    for i, of_row in enumerate(phrases):
        pairs = list(combinations(sorted(of_row), 2))
        away[i] = any(a in known and b in known and (a, b) not in joined for a, b in pairs)
        if not away[i]:
            known.update(of_row)
            joined.update(pairs)
    return away


def quotients(away: np.ndarray, share: float) -> np.ndarray:
    """Scores of the rows of one capability in their order, float32: share / (rank + 1/2) of those taken, and below 0,
    still in order, of those turned away, which count on from the taken."""
    rank = np.empty(len(away))
    rank[np.argsort(away, kind="stable")] = np.arange(len(away))
    quotient = max(share, LEAST_SHARE) / (rank + 0.5)
    return np.where(away, -1 / quotient, quotient).astype(np.float32)


def _rank(capability: str, inputs: tuple[str, ...], squared: bool, share: np.ndarray, table: pa.Table) -> pa.Table:
    """What `regroup` finds: the column's values of the rows of some capabilities."""
    jsd_of, tokens_of, *phrases_of = inputs
    jsd, cost = table[jsd_of].to_numpy(), table[tokens_of].to_numpy().astype(np.float32)
    cost = cost**2 if squared else cost
    score, away = np.empty(len(table), np.float32), np.zeros(len(table), bool)
    start = 0
    for group in key_groups(table, capability):
        rows = slice(start, start + len(group))
        order = np.argsort(-efficiency(jsd[rows], cost[rows]), kind="stable")
        turned = np.zeros(len(group), bool)
        for name in phrases_of:
            turned[:FILTERED] = conflicts(group[name].take(pa.array(order[:FILTERED])).to_pylist())
        score[start + order] = quotients(turned, float(share[group[capability][0].as_py()]))
        away[start + order] = turned
        start += len(group)
    values = [score, table[capability], jsd, cost, away]
    found = table.select([SHARD, ROW])
    for field, value in zip(FIELDS, values, strict=True):
        found = found.append_column(field, value if isinstance(value, pa.ChunkedArray) else pa.array(value))
    return found


def _find_capabilities(state: State, k: int, seed: int, directory: Path) -> None:
    if not state:
        raise CorpusError("paser: no row has a vector; see quarantine/embed for the reasons")
    x = as_float32(state[VECTOR])
    label, error = s2ric(x, k, seed)
    found = np.unique(label)
    means = np.stack([x[label == j].mean(axis=0) for j in found])
    np.save(directory / MEANS, means / np.linalg.norm(means, axis=1, keepdims=True))
    rows = [int((label == j).sum()) for j in found]
    (directory / NOTES).write_text(json.dumps({"sample": len(x), "rows": rows, "nmf_error": error}, indent=2))


def _write_shares(state: State, directory: Path) -> None:
    if not state:
        raise CorpusError("paser: no row has both a vector and a divergence; see quarantine/ for the reasons")
    cds = state["jsd"] / np.maximum(state["rows"], 1)
    if not cds.any():
        log.warning("paser: the two models do not differ on any row: capabilities are weighed by their rows")
    share = shares(state["rows"], cds)
    table = {"rows": state["rows"].tolist(), "cds": cds.tolist(), "share": share.tolist()}
    (directory / TABLE).write_text(json.dumps(table, indent=2))


def _open_capability(means: Artifact) -> Transform:
    points = np.load(means.local() / MEANS)
    index = flat_index(points)

    def assign(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([pa.array(nearest(matrix(batch.column(VECTOR)), points, index)[0])], schema=CAPABILITY)

    return assign


def _open_phrases(stop_words: tuple[str, ...], most: int) -> Transform:
    def find(batch: pa.RecordBatch) -> pa.RecordBatch:
        text = pc.utf8_slice_codeunits(batch.column("text"), 0, PHRASE_CHARS)
        return pa.record_batch([key_phrases(text, stop_words, most)], schema=PHRASES)

    return find


def _open_jsd(
    original: Artifact | Path, pruned: Artifact | Path, prompt: str | None, max_tokens: int, precision: str
) -> Transform:
    import torch

    torch.set_num_threads(threads.cpus())
    dense = Scorer(folder_of(original), max_tokens, precision)
    sparse, _ = load_causal(folder_of(pruned))
    sparse = sparse.to(dense.device, dense.model.dtype)
    known = min(divergence.vocabulary(dense.model), divergence.vocabulary(sparse))

    def measure(batch: pa.RecordBatch) -> pa.RecordBatch:
        n, why = len(batch), np.full(len(batch), "", object)
        read = dense.read({name: batch.column(name) for name in batch.schema.names if name != prompt})
        ids, offsets = read.ids, read.offsets
        begin = np.ones(n, np.int64)  # nothing predicts the first token
        if prompt is not None:
            before, reasons = clean_text(batch.column(prompt))
            if reasons is not None:
                why[pc.fill_null(pc.equal(reasons, NOT_UTF8), False).to_numpy(zero_copy_only=False)] = (
                    "prompt is not UTF-8"
                )
            ending, nothing = pa.scalar("\n", pa.large_string()), pa.scalar("", pa.large_string())
            before = pc.binary_join_element_wise(before.cast(pa.large_string()), ending, nothing)
            ids, offsets, begin = joined(*dense.tokenize(pc.fill_null(before, nothing)), ids, offsets, max_tokens)
        lengths = np.diff(offsets)
        row = np.repeat(np.arange(n), lengths)
        told = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths) >= np.repeat(begin, lengths)
        told = told if read.target is None else told & read.target
        count = np.bincount(row[told], minlength=n)
        why[count == 0] = f"no token of the text is predicted within {max_tokens} tokens"
        why[np.unique(row[ids >= known])] = "a token is not in the pruned model's vocabulary"
        run = why == ""
        value, lost = np.zeros((2, len(ids)), np.float32)
        kept = np.append(0, np.cumsum(lengths[run]))
        value[run[row]], lost[run[row]] = divergence.between(dense.model, sparse, ids[run[row]], kept, divergence.jsd)
        mean, mass = (np.bincount(row[told], v[told], n) / np.maximum(count, 1) for v in (value, lost))
        why[run & ~np.isfinite(mean)] = "the divergence of the models is not finite"
        bad = why != ""
        values = [mean.astype(np.float32), lengths.astype(np.int32), mass.astype(np.float32)]
        return pa.record_batch(
            [*(pa.array(v, mask=bad) for v in values), pa.array(why, pa.string(), mask=~bad)], schema=JSD
        )

    return measure


def joined(
    head: np.ndarray, bounds: np.ndarray, ids: np.ndarray, offsets: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of prompt and text of n rows, `most` at the most: ids, offsets (n + 1,), and where each text begins (n,).

    `head` and `ids`: tokens end to end, between `bounds` and `offsets` (n + 1,). A text begins at 1 where it has no
    prompt, since nothing predicts its first token.
    """
    of_head = np.minimum(np.diff(bounds), most)
    length = of_head + np.minimum(np.diff(offsets), most - of_head)
    ends = np.append(0, np.cumsum(length))
    row = np.repeat(np.arange(len(length)), length)
    at = np.arange(ends[-1]) - ends[row]
    is_head = at < of_head[row]
    out = np.empty(len(row), np.int32)
    out[is_head] = head[(bounds[row] + at)[is_head]]
    out[~is_head] = ids[(offsets[row] + at - of_head[row])[~is_head]]
    return out, ends, np.maximum(of_head, 1)
