"""What a causal language model says of every token: the column that perplexity, loss reduction and priming share.

Rows are tokenised together and cut to `max_tokens`; what looks like a special token in a text is read as plain text.
The rows of a batch are sorted by length and run in groups of one width, padded to the next of few widths: multiples of
8 up to 256, from there on 16 to 32 widths an octave. Padding stands behind a row, where a causal model does not look,
so no mask is needed and the neighbours of a row change its values by float noise only (below 1e-5 in float32).
Log-softmax is taken in float32 a few tokens at a time: at 50,000 pieces the logits of one group are the largest thing
in memory (`LOGIT_BYTES`).

float32 on CPUs, bfloat16 on GPUs (`engine.gpus`), where neighbours may change a value by bfloat16's own noise.
Weights are read from safetensors; code in a model's folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import Artifact
from pipeline.engine import threads
from pipeline.errors import TamisError
from pipeline.models.files import check_installed, existing, folder_digest, folder_of, is_hub, source_of
from pipeline.recipe import QUARANTINE, Column, Resources, Transform, fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.run import Run

FIELDS = pa.schema([("ids", pa.list_(pa.int32())), ("logp", pa.list_(pa.float32())), (QUARANTINE, pa.string())])
MAX_CHARS = 16
"""Characters that a token of `max_tokens` may stand for on average: a text is cut there before it is tokenised."""
LOGIT_BYTES = 1 << 29
"""Most that the logits of one group of rows take, as far as one row alone does not take more."""
GROUP_TOKENS = 8192
CHUNK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits that are turned to log-probabilities at a time. What stays in a CPU's cache takes a third of the time: 1.0 ns
a logit instead of 3.2."""
ONE_TOKEN = "one token, of which no model says how likely it is"
NOT_FINITE = "the model's loss is not finite"
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


def token_column(run: Run, model: str | Artifact, max_tokens: int = 1024) -> Column:
    """Support column of a model: `ids` (T tokens of a row) and `logp` (T - 1 natural logs: of tokens 2 to T).

    `model`: folder, `hf://org/name`, or an artifact with the files. The name, `lm-<12 hex digits>`, says which files
    and how many tokens, so criteria that ask for the same share it. A row's tokens are its first `max_tokens`, no more
    than the model's context; rows of one token and those with a loss that is not finite are refused.
    """
    engine = run.config.engine
    source = model_source(run, model)
    folder = folder_of(source)
    max_tokens = min(max_tokens, context(folder))
    files = fingerprint("token log-probabilities", 1, folder_digest(folder), max_tokens)
    precision = "bfloat16" if engine.gpus else "float32"
    return Column(
        f"lm-{files[:12]}",
        ("text",),
        FIELDS,
        partial(_open, source, max_tokens, precision),
        fingerprint(files, precision),
        Resources(cpus=engine.cpus, gpus=engine.gpus),
    )


def row_losses(logp: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean negative log-probability of n rows, none of them null or empty, in nats a token (float64), and how many
    tokens it is the mean of (int64)."""
    tokens = logp.value_lengths().to_numpy().astype(np.int64)
    starts = np.cumsum(tokens) - tokens
    return -np.add.reduceat(logp.flatten().to_numpy().astype(np.float64), starts) / tokens, tokens


def context(folder: Path) -> int:
    """Tokens that a model takes at once, as its configuration says; a million where it does not."""
    config = json.loads((folder / "config.json").read_text())
    return int(next((config[name] for name in CONTEXTS if config.get(name)), 1 << 20))


def load_causal(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model (float32, on the CPU, for inference) and tokenizer of a folder. Raises TamisError where there are none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the engine shows its own
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise TamisError(f"{folder} cannot be read as a causal language model: {error}") from error
    if not tokenizer.is_fast:
        raise TamisError(f"{folder} has no fast tokenizer (tokenizer.json)")
    return model.float().eval(), tokenizer


def _open(source: Artifact | Path, max_tokens: int, precision: str) -> Transform:
    import torch

    torch.set_num_threads(threads.cpus())
    scorer = Scorer(folder_of(source), max_tokens, precision)

    def score(batch: pa.RecordBatch) -> pa.RecordBatch:
        ids, offsets = scorer.tokenize(batch.column("text"))
        return token_batch(ids, offsets, scorer(ids, offsets))

    return score


def token_batch(ids: np.ndarray, offsets: np.ndarray, logp: np.ndarray) -> pa.RecordBatch:
    """The column's values: `ids` (N,) between `offsets` (n + 1,), `logp` (N,) with nothing meant at first tokens."""
    lengths = np.diff(offsets)
    follows = np.ones(len(ids), bool)
    follows[offsets[:-1][lengths > 0]] = False
    within = np.concatenate([[0], np.cumsum(follows)])[offsets]
    broken = np.add.reduceat(np.append(follows & ~np.isfinite(logp), False), offsets[:-1]) > 0
    broken &= lengths > 0
    short = pa.array(lengths < 2)
    refused = pc.or_(short, pa.array(broken))
    why = pc.if_else(short, ONE_TOKEN, pc.if_else(pa.array(broken), NOT_FINITE, None))
    lists = [
        pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(values), mask=refused)
        for bounds, values in ((offsets, ids), (within, logp[follows]))
    ]
    return pa.record_batch([*lists, why.cast(pa.string())], schema=FIELDS)


class Scorer:
    """A loaded model: texts to tokens, tokens to log-probabilities."""

    def __init__(self, folder: Path, max_tokens: int, precision: str = "float32") -> None:
        import torch

        model, tokenizer = load_causal(folder)
        self.device = torch.device("cuda" if precision == "bfloat16" else "cpu")
        self.model = model.to(self.device, getattr(torch, precision))
        self.tokenizer = tokenizer.backend_tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.encode_special_tokens = True
        self.max_chars = MAX_CHARS * max_tokens
        vocab = model.config.get_text_config().vocab_size
        self.group_tokens = min(GROUP_TOKENS, LOGIT_BYTES // (vocab * self.model.dtype.itemsize))
        self.chunk = max(1, CHUNK_VALUES[self.device.type] // vocab)

    def tokenize(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of n texts end to end (N,) int32, and n + 1 offsets (int64) between which each text's lie."""
        cut = pc.utf8_slice_codeunits(texts, 0, self.max_chars).to_pylist()
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(cut)]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return np.concatenate([np.asarray(row, np.int32) for row in rows]), offsets

    def __call__(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Natural log-probability of every token (N,) float32 given those before it in its row; first tokens have 0."""
        import torch

        logp = np.zeros(len(ids), np.float32)
        lengths = np.diff(offsets)
        with torch.inference_mode():
            for rows, width in groups(lengths, self.group_tokens):
                inside = np.arange(width) < lengths[rows, None]
                where = offsets[rows, None] + np.arange(width)
                block = np.zeros((len(rows), width), np.int64)
                block[inside] = ids[where[inside]]
                given = self._forward(torch.from_numpy(block).to(self.device))
                logp[where[:, 1:][inside[:, 1:]]] = given[:, :-1][inside[:, 1:]]
        return logp

    def _forward(self, block: torch.Tensor) -> np.ndarray:
        """Log-probability (rows, width) of each position's next token; of no meaning at the last one."""
        import torch

        # The last position stays, for without it the logits would be copied: they are the largest thing in memory.
        logits = self.model(input_ids=block, use_cache=False).logits.flatten(0, 1)
        after = block.roll(-1, dims=1).flatten()
        pieces = [
            -torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
            for part, target in zip(logits.split(self.chunk), after.split(self.chunk), strict=True)
        ]
        out: np.ndarray = torch.cat(pieces).view(len(block), -1).cpu().numpy()
        return out


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
