"""What arms of a comparison are trained on: every row's tokens, computed once, and those of the rows that an arm kept.

The tokenizer is trained on a sample of the corpus, so that all arms speak in the same pieces whatever they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import Artifact
from pipeline.hashing import hash64
from pipeline.models.training import pack, train_tokenizer
from pipeline.recipe import Column, State, Transform, fingerprint
from pipeline.run import Run
from pipeline.sample import Sample, draw, needs_fit, texts

NAME, IDS = "proxy-tokens", "proxy-tokens.ids"
FIELDS = pa.schema([("ids", pa.list_(pa.int32()))])
MAX_CHARS = 1 << 16
"""A document counts up to here."""
SAMPLE_ROWS = 5000
TOKENIZER = "tokenizer.json"
EOS = 0
"""Id of the special token that ends a document."""


def tokenizer(run: Run, vocab: int) -> Artifact:
    """Artifact `proxy-tokenizer`: byte-level BPE of at most `vocab` pieces."""
    sample = Sample(("text",), SAMPLE_ROWS, run.rows, run.seed, key="text")
    name, identity = "proxy-tokenizer", fingerprint("proxy tokenizer", 1, vocab, asdict(sample), run.identity("text"))
    state = draw(run, sample) if needs_fit(run, name, identity) else {}
    return run.artifact(name, identity, partial(_train, state, vocab))


def tokens_column(artifact: Artifact) -> Column:
    """The tokens of every row by a tokenizer: field `ids`, list of int32."""
    identity = fingerprint("proxy tokens", 1, artifact.fingerprint)
    return Column(NAME, ("text",), FIELDS, partial(_open, artifact), identity)


def _train(sample: State, vocab: int, directory: Path) -> None:
    train_tokenizer(texts(sample), vocab).save(str(directory / TOKENIZER))


def _open(artifact: Artifact) -> Transform:
    encode = encoder(artifact)
    return lambda batch: pa.record_batch([encode(batch.column("text"))], schema=FIELDS)


def encoder(artifact: Artifact) -> Callable[[pa.Array], pa.Array]:
    """From n texts to their tokens: list of int32 (n,)."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(artifact.local() / TOKENIZER))
    loaded.encode_special_tokens = True  # what looks like the end of a text is not one

    def encode(values: pa.Array) -> pa.Array:
        cut = pc.utf8_slice_codeunits(values, 0, MAX_CHARS).to_pylist()
        found = [e.ids for e in loaded.encode_batch_fast(cut, add_special_tokens=False)]
        return pa.array(found, pa.list_(pa.int32()))

    return encode


@dataclass(frozen=True)
class Kept:
    """Statistic: tokens of the rows where `flag` is `value`, in the order of their hashes, up to about `most` tokens.

    State: `hash` (m,) uint64 ascending, `length` (m,) int64, `ids` (sum of length,) int32, `rows` (1,) int64: all rows
    where it is. The last row is the one that reaches `most`.
    """

    flag: str
    value: float
    most: int
    seed: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.flag, "row.key", IDS)

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        batch = batch.filter(pc.equal(batch.column(self.flag).cast(pa.float32()), self.value))
        ids = batch.column(IDS)
        new = {
            "hash": hash64(batch.column("row.key"), self.seed),
            "length": ids.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64),
            "ids": ids.flatten().to_numpy(),
            "rows": np.array([batch.num_rows]),
        }
        return self.merge([state, new] if state else [new])

    def merge(self, states: Sequence[State]) -> State:
        joined = {name: np.concatenate([s[name] for s in states]) for name in ("hash", "length", "ids")}
        order = np.argsort(joined["hash"], kind="stable")
        total = np.cumsum(joined["length"][order])
        order = order[: int(np.searchsorted(total, self.most)) + 1]
        ids = lists(joined).take(pa.array(order)).flatten().to_numpy()
        rows = np.sum([s["rows"] for s in states], axis=0)
        return {"hash": joined["hash"][order], "length": joined["length"][order], "ids": ids, "rows": rows}


def lists(state: State) -> pa.LargeListArray:
    """The tokens of a state, a list a row."""
    offsets = np.concatenate([[0], np.cumsum(state["length"], dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(state["ids"], pa.int32()))


def blocks(rows: pa.Array, context: int, most: int) -> np.ndarray:
    """Rows of tokens as (n, context) int32 blocks, of at most `most` tokens (but one block at least)."""
    return pack((row.values.to_numpy() for row in rows), context, EOS)[: max(1, most // context)]
