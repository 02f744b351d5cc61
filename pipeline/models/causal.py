"""What a causal language model says of every token: the column that perplexity, loss reduction and priming share.

Rows are tokenised together and cut to `max_tokens`; what looks like a special token in a text is read as plain text.
The rows of a batch are sorted by length and run in groups of one width, padded to the next of few widths: multiples of
8 up to 256, from there on 16 to 32 widths an octave. Padding stands behind a row, where a causal model does not look,
so no mask is needed and the neighbours of a row change its values by float noise only (below 1e-5 in float32).
Log-softmax is taken in float32 a few tokens at a time: at 50,000 pieces the logits of one group are the largest thing
in memory (`LOGIT_BYTES`).

float32 on CPUs, bfloat16 on GPUs (`engine.gpus`), where neighbours may change a value by bfloat16's own noise.
Weights are read from safetensors; code in a model's folder is never run.

Fields of the column, for T tokens of a row:

| field | type | values |
| --- | --- | --- |
| `ids` | list<int32>, T | the tokens |
| `logp` | list<float32>, T - 1 | natural log-probability of tokens 2 to T, prompts included |
| `target` | list<bool>, T - 1 | beside `logp`: whether the token is of a response; in a corpus of instructions alone |
| `entropy` | list<float32>, T - 1 | beside `logp`: nats of the distribution that the token is of; where asked for |

A corpus of texts has no `target`: every token from the second on counts. What a criterion reads is
`losses_of(column)`, which is (`logp`,) or (`logp`, `target`), and `row_losses` takes both. At least one token of a
row is a target: rows whose response is cut off whole by `max_tokens` are refused. How instructions are rendered, and
which tokens may be special in them, is in `pipeline.corpus.chat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import Artifact
from pipeline.corpus.chat import span_arrays, split_special
from pipeline.engine import threads
from pipeline.errors import TamisError
from pipeline.models.files import check_installed, existing, folder_digest, folder_of, is_hub, source_of
from pipeline.recipe import QUARANTINE, Column, Resources, Transform, fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.run import Run

FIELDS = pa.schema([("ids", pa.list_(pa.int32())), ("logp", pa.list_(pa.float32())), (QUARANTINE, pa.string())])
TARGET = pa.field("target", pa.list_(pa.bool_()))
ENTROPY = pa.field("entropy", pa.list_(pa.float32()))
MAX_CHARS = 16
"""Characters that a token of `max_tokens` may stand for on average: a text is cut there before it is tokenised."""
LOGIT_BYTES = 1 << 29
"""Most that the logits of one group of rows take, as far as one row alone does not take more."""
GROUP_TOKENS = 8192
CHUNK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits that are turned to log-probabilities at a time. What stays in a CPU's cache takes a third of the time: 1.0 ns
a logit instead of 3.2."""
LONGEST = 1 << 20
"""Tokens of a row where it is read whole."""
ONE_TOKEN = "one token, of which no model says how likely it is"
NOT_FINITE = "the model's loss is not finite"
NO_TARGET = "no token of the response is among those that are read: raise max_tokens"
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""How configurations name the tokens that a model takes at once."""


def check_model(kind: str, model: str) -> None:
    """Raises ValueError, for a validator, where torch is missing or a local folder holds no model."""
    check_installed(f"scores.{kind}", "models", "torch", "transformers", "safetensors")
    if not is_hub(model):
        existing(model, "config.json", "tokenizer.json", "*.safetensors")


def model_source(run: Run, model: str | Artifact) -> Artifact | Path:
    """Where a model's files are: those of an artifact, of a folder, or fetched from `hf://org/name`."""
    return model if isinstance(model, Artifact) else source_of(run, model, f"model-{fingerprint(model)[:12]}")


def token_column(run: Run, model: str | Artifact, max_tokens: int = 1024, entropy: bool = False) -> Column:
    """Support column of a model: `ids`, `logp` and, of instructions, `target`; see the module for what they hold.

    `entropy` adds that field, under a name of its own: a criterion that needs none does not pay for it.

    `model`: folder, `hf://org/name`, or an artifact with the files. The name, `lm-<12 hex digits>`, says which files
    and how many tokens, so criteria that ask for the same share it. A row's tokens are its first `max_tokens`, no more
    than the model's context; rows of one token, without a token of a response, or with a loss that is not finite are
    refused.
    """
    engine = run.config.engine
    source = model_source(run, model)
    folder = folder_of(source)
    max_tokens = min(max_tokens, context(folder))
    files = fingerprint("token log-probabilities", 1, folder_digest(folder), max_tokens, *([ENTROPY.name] * entropy))
    precision = "bfloat16" if engine.gpus else "float32"
    return Column(
        f"lm-{files[:12]}",
        run.layout.spoken,
        fields_of(run.layout.chat is not None, entropy),
        partial(_open, source, max_tokens, precision, entropy),
        fingerprint(files, precision),
        Resources(cpus=engine.cpus, gpus=engine.gpus),
    )


def fields_of(target: bool, entropy: bool) -> pa.Schema:
    """The column's fields: those of every one, `target` and `entropy` where there are any, the reason of quarantine."""
    *of_all, reason = FIELDS
    return pa.schema([*of_all, *([TARGET] if target else []), *([ENTROPY] if entropy else []), reason])


def losses_of(tokens: Column) -> tuple[str, ...]:
    """References of what `row_losses` reads of a token column."""
    return tuple(f"{tokens.name}.{name}" for name in ("logp", TARGET.name) if name in tokens.fields.names)


def row_losses(logp: pa.ListArray, target: pa.ListArray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean negative log-probability of n rows in nats a token (float64), and how many tokens it is the mean of (int64):
    of all, or of those that are a `target`. No row is null or empty, or without one."""
    tokens = logp.value_lengths().to_numpy().astype(np.int64)
    starts = np.cumsum(tokens) - tokens
    values = logp.flatten().to_numpy().astype(np.float64)
    if target is not None:
        counts = as_mask(target)
        values, tokens = np.where(counts, values, 0), np.add.reduceat(counts.astype(np.int64), starts)
    return -np.add.reduceat(values, starts) / tokens, tokens


def as_mask(target: pa.ListArray) -> np.ndarray:
    """The values of lists of booleans end to end; (N,) bool."""
    return np.asarray(target.flatten().to_numpy(zero_copy_only=False), bool)


def context(folder: Path) -> int:
    """Tokens that a model takes at once, as its configuration says; a million where it does not."""
    config = json.loads((folder / "config.json").read_text())
    return int(next((config[name] for name in CONTEXTS if config.get(name)), 1 << 20))


def load_causal(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model (float32, on the CPU, for inference) and tokenizer of a folder, of one that Tamis cut as well. Raises
    TamisError where there are none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from pipeline.compress.folder import SHAPES, load

    logging.disable_progress_bar()  # the engine shows its own
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if (folder / SHAPES).exists():
            model, _ = load(folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise TamisError(f"{folder} cannot be read as a causal language model: {error}") from error
    if not tokenizer.is_fast:
        raise TamisError(f"{folder} has no fast tokenizer (tokenizer.json)")
    return model.float().eval(), tokenizer


def _open(source: Artifact | Path, max_tokens: int, precision: str, entropy: bool = False) -> Transform:
    import torch

    torch.set_num_threads(threads.cpus())
    scorer = Scorer(folder_of(source), max_tokens, precision)

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        read = scorer.read({name: batch.column(name) for name in batch.schema.names})
        doubt = np.zeros(len(read.ids), np.float32) if entropy else None
        return token_batch(read.ids, read.offsets, scorer(read.ids, read.offsets, doubt), read.target, doubt)

    return score


def token_batch(
    ids: np.ndarray,
    offsets: np.ndarray,
    logp: np.ndarray,
    target: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
) -> pa.RecordBatch:
    """The column's values: `ids` (N,) between `offsets` (n + 1,), `logp` (N,) with nothing meant at first tokens, and
    where there are responses whether a token is of one, `target` (N,); `entropy` (N,) where it was asked for."""
    lengths = np.diff(offsets)
    follows = np.ones(len(ids), bool)
    follows[offsets[:-1][lengths > 0]] = False
    within = np.concatenate([[0], np.cumsum(follows)])[offsets]
    broken = np.add.reduceat(np.append(follows & ~np.isfinite(logp), False), offsets[:-1]) > 0
    broken &= lengths > 0
    short = pa.array(lengths < 2)
    refused = pc.or_(short, pa.array(broken))
    why = pc.if_else(short, ONE_TOKEN, pc.if_else(pa.array(broken), NOT_FINITE, None))
    stored = [(offsets, ids), (within, logp[follows])]
    if target is not None:
        counted = np.concatenate([[0], np.cumsum(target & follows)])[offsets]
        silent = pa.array(np.diff(counted) == 0)
        refused, why = pc.or_(refused, silent), pc.coalesce(why, pc.if_else(silent, NO_TARGET, None))
        stored.append((within, target[follows]))
    if entropy is not None:
        stored.append((within, entropy[follows]))
    lists = [
        pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(values), mask=refused)
        for bounds, values in stored
    ]
    schema = fields_of(target is not None, entropy is not None)
    return pa.record_batch([*lists, why.cast(pa.string())], schema=schema)


@dataclass(frozen=True)
class Read:
    """Tokens of n rows end to end, `ids` (N,) int32 between `offsets` (n + 1,) int64; which are of a response, `target`
    (N,) bool, None where the rows are texts."""

    ids: np.ndarray
    offsets: np.ndarray
    target: np.ndarray | None = None


class Encoder:
    """A tokenizer that reads the first `max_tokens` of a row, and in what a row says no special token.

    `adds_special`: whether rows get the special tokens that the tokenizer puts around a text, where no template did.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int, adds_special: bool = True) -> None:
        self.tokenizer = tokenizer.backend_tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.encode_special_tokens = True
        self.max_tokens, self.max_chars = max_tokens, MAX_CHARS * max_tokens
        self.adds_special = adds_special
        self.special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def tokenize(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of n texts end to end (N,) int32, and n + 1 offsets (int64) between which each text's lie."""
        cut = pc.utf8_slice_codeunits(texts, 0, self.max_chars).to_pylist()
        rows = [e.ids for e in self.tokenizer.encode_batch_fast(cut, add_special_tokens=self.adds_special)]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)]), offsets

    def read(self, row: Mapping[str, pa.Array]) -> Read:
        """Tokens of n rows by what was read of them: `text` alone, or with `targets` and `markup` (`Layout.spoken`)."""
        if "targets" not in row:
            return Read(*self.tokenize(row["text"]))
        return self.conversations(row["text"], row["targets"], row.get("markup"))

    def conversations(self, texts: pa.Array, targets: pa.ListArray, markup: pa.ListArray | None) -> Read:
        """Tokens of n rendered conversations.

        With `markup` the special tokens in it, those of this model's vocabulary, are special and no others, and none is
        added. A token is of a response where it shares a character with one.
        """
        cut = pc.utf8_slice_codeunits(texts, 0, self.max_chars).to_pylist()
        self.tokenizer.encode_special_tokens = markup is None
        rows = self.tokenizer.encode_batch(cut, add_special_tokens=markup is None and self.adds_special)
        self.tokenizer.encode_special_tokens = True
        found = [(row.ids, row.offsets) for row in rows]
        if markup is not None:
            for i in np.flatnonzero(self._forged(found, markup)).tolist():
                spans = [(span["start"], span["end"]) for span in markup[i].as_py()]
                found[i] = self._pieced(cut[i], spans)
        ids, offsets, places = joined(found)
        return Read(ids, offsets, touched(places, offsets, targets))

    def _forged(self, rows: list[tuple[list[int], list[tuple[int, int]]]], markup: pa.ListArray) -> np.ndarray:
        """Rows (n,) in which a token came out special that the template has not written."""
        ids, offsets, places = joined(rows)
        special = np.isin(ids, list(self.special.values()))
        row = np.repeat(np.arange(len(rows)), np.diff(offsets))
        outside = special & ~inside(places, offsets, markup)
        return np.asarray(np.bincount(row[outside], minlength=len(rows)) > 0)

    def _pieced(self, text: str, markup: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of one text, read between the special tokens of its markup as plain text."""
        pattern = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        for start, piece, is_special in split_special(text, markup, pattern):
            if is_special:
                ids.append(self.special[piece])
                places.append((start, start + len(piece)))
                continue
            encoded = self.tokenizer.encode(piece, add_special_tokens=False)
            ids += encoded.ids
            places += [(a + start, b + start) for a, b in encoded.offsets]
        return ids[: self.max_tokens], places[: self.max_tokens]


class Scorer(Encoder):
    """A loaded model: texts to tokens, tokens to log-probabilities."""

    def __init__(self, folder: Path, max_tokens: int, precision: str = "float32") -> None:
        import torch

        model, tokenizer = load_causal(folder)
        super().__init__(tokenizer, max_tokens)
        self.device = torch.device("cuda" if precision == "bfloat16" else "cpu")
        self.model = model.to(self.device, getattr(torch, precision))
        vocab = model.config.get_text_config().vocab_size
        self.group_tokens = min(GROUP_TOKENS, LOGIT_BYTES // (vocab * self.model.dtype.itemsize))
        self.chunk = max(1, CHUNK_VALUES[self.device.type] // vocab)

    def __call__(self, ids: np.ndarray, offsets: np.ndarray, entropy: np.ndarray | None = None) -> np.ndarray:
        """Natural log-probability of every token (N,) float32 given those before it in its row; first tokens have 0.

        `entropy` (N,) is filled with that of the distributions that the tokens are of, in nats.
        """
        import torch

        logp = np.zeros(len(ids), np.float32)
        lengths = np.diff(offsets)
        with torch.inference_mode():
            for rows, width in groups(lengths, self.group_tokens):
                inside = np.arange(width) < lengths[rows, None]
                where = offsets[rows, None] + np.arange(width)
                block = np.zeros((len(rows), width), np.int64)
                block[inside] = ids[where[inside]]
                read, told = where[:, 1:][inside[:, 1:]], inside[:, 1:]
                given, doubt = self._forward(torch.from_numpy(block).to(self.device), entropy is not None)
                logp[read] = given[:, :-1][told]
                if entropy is not None:
                    entropy[read] = doubt[:, :-1][told]
        return logp

    def _forward(self, block: torch.Tensor, entropy: bool) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability (rows, width) of each position's next token, of no meaning at the last one; and the entropy
        of each position's distribution, or (rows, 0) where it is not asked for."""
        import torch

        # The last position stays, for without it the logits would be copied: they are the largest thing in memory.
        logits = self.model(input_ids=block, use_cache=False).logits.flatten(0, 1)
        after = block.roll(-1, dims=1).flatten()
        pieces = [
            -torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
            for part, target in zip(logits.split(self.chunk), after.split(self.chunk), strict=True)
        ]
        doubts = [entropy_of(part) for part in logits.split(self.chunk)] if entropy else [logits.new_zeros(0)]
        given, doubt = (torch.cat(found).view(len(block), -1).cpu().numpy() for found in (pieces, doubts))
        return given, doubt


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of n distributions in nats, float32 (n,), from logits (n, V)."""
    import torch

    logp = logits.float().log_softmax(-1)
    return torch.special.entr(logp.exp()).sum(-1)


def joined(rows: list[tuple[list[int], list[tuple[int, int]]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids (N,) of rows end to end, offsets (n + 1,), and the characters of its row that a token stands for, (N, 2)."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(ids) for ids, _ in rows], out=offsets[1:])
    ids = np.concatenate([np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for ids, _ in rows)])
    places = [np.asarray(places, np.int64).reshape(-1, 2) for _, places in rows]
    return ids, offsets, np.concatenate([np.zeros((0, 2), np.int64), *places])


def touched(places: np.ndarray, offsets: np.ndarray, spans: pa.ListArray) -> np.ndarray:
    """Which tokens share a character with a span of their row; (N,) bool."""
    (start, end), (first, last) = _on_one_line(places, offsets, spans)
    at = np.searchsorted(last, start, side="right")
    here = np.append(first, np.iinfo(np.int64).max)[at]
    return np.asarray((here < end) & (start < end))


def inside(places: np.ndarray, offsets: np.ndarray, spans: pa.ListArray) -> np.ndarray:
    """Which tokens lie in a span of their row with all their characters; (N,) bool."""
    (start, end), (first, last) = _on_one_line(places, offsets, spans)
    at = np.searchsorted(first, start, side="right")
    return np.asarray(end <= np.append(-1, last)[at])


def _on_one_line(
    places: np.ndarray, offsets: np.ndarray, spans: pa.ListArray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Characters of tokens and of spans as if all rows were one text, with room between them."""
    start, end, bounds = span_arrays(spans)
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    of_span = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    room = 1 + max(int(places.max(initial=0)), int(end.max(initial=0)))
    return (places[:, 0] + row * room, places[:, 1] + row * room), (start + of_span * room, end + of_span * room)


def groups(lengths: np.ndarray, tokens: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows (indices) to run together and the width to pad them to, at most `tokens` in all where a row allows it."""
    widths = padded(lengths)
    runnable = np.flatnonzero(lengths > 1)
    for width in np.unique(widths[runnable]):
        members = runnable[widths[runnable] == width]
        step = max(1, tokens // int(width))
        for start in range(0, len(members), step):
            yield members[start : start + step], int(width)


def padded(lengths: np.ndarray) -> np.ndarray:
    """The next multiple of 8 up to 256 tokens, of 16 up to 512, of 32 up to 1024 and so on."""
    octave = np.ceil(np.log2(np.maximum(lengths, 256) / 256)).astype(np.int64)
    step = 8 << octave
    return np.asarray(-(-lengths // step) * step)
