"""Texts to token blocks: what a model is calibrated, healed and measured on.

A source is a curated run (its `handoff.json` names a calibration and a recovery set) or Parquet files, which then serve
as both. Documents are tokenised without special tokens of their own, closed by the end token, and packed end to end
into blocks of one length, as pretraining does; nothing is padded. What is measured on is set apart by document before
anything else is drawn, so no text is on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.corpus.listing import expand
from pipeline.corpus.storage import Store, resolve
from pipeline.corpus.text import clean_text
from pipeline.errors import ConfigError, CorpusError
from pipeline.hashing import row_keys, uniform
from pipeline.output.write import TAMIS
from pipeline.recipe import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HANDOFF = "handoff.json"
BATCH_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """Texts in files: their addresses, the column, and a fingerprint of what they hold."""

    files: tuple[str, ...]
    column: str
    fingerprint: str

    def texts(self) -> Iterator[pa.Array]:
        """Usable texts (large_string), batch by batch in the files' order. Raises CorpusError for unreadable files."""
        for batch in self.batches({"text": self.column}):
            yield clean_text(batch.column(0))[0].cast(pa.large_string()).drop_null()

    def batches(self, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows as they are stored: by the names that they are to have; `a.b` is a field."""
        for uri in self.files:
            filesystem, path = resolve(uri)
            try:
                read = ds.dataset(path, filesystem=filesystem, format="parquet")
                fields = [*read.schema.names, *(f"{TAMIS}.{f}" for f in _struct(read.schema))]
                if missing := next((c for c in columns.values() if c not in fields), None):
                    raise CorpusError(f"{uri} has no column {missing!r}; it has {', '.join(fields)}")
                wanted = {name: ds.field(*c.split(".")) for name, c in columns.items()}
                yield from read.to_batches(columns=wanted, batch_size=BATCH_ROWS)
            except (pa.ArrowException, OSError) as error:
                raise CorpusError(f"cannot read {uri}: {error}") from error


def _struct(schema: pa.Schema) -> list[str]:
    """Names of what the curated set says of its rows."""
    return [f.name for f in schema.field(TAMIS).type] if TAMIS in schema.names else []


def sources(data: str | Sequence[str], column: str = "text") -> tuple[Source, Source]:
    """Where to calibrate from and where to recover on: a curated run's hand-off, or the same Parquet files twice.

    Raises ConfigError where there is neither, or where a run has not been curated or wrote an empty set.
    """
    if isinstance(data, str):
        described = handoff(data)
        if described is not None:
            return _handed(data, described, "calibration"), _handed(data, described, "recovery")
    found = parquet([data] if isinstance(data, str) else data, column)
    return found, found


def parquet(paths: Sequence[str], column: str) -> Source:
    """Parquet files, directories and globs as a source. Raises ConfigError where there are none."""
    try:
        listed = expand(list(paths))
    except (CorpusError, OSError, ValueError) as error:
        raise ConfigError(f"data: neither a curated run nor Parquet files: {', '.join(paths)}") from error
    return Source(tuple(u for u, _, _ in listed), column, fingerprint([[u, size] for u, size, _ in listed], column))


def handoff(run: str) -> dict[str, Any] | None:
    """What a run hands to compression; None where the location is not a run that was curated."""
    try:
        described: dict[str, Any] = json.loads(Store(run).read(HANDOFF))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return described


def _handed(run: str, described: dict[str, Any], name: str) -> Source:
    part = described.get(name)
    if not part or not part.get("num_samples"):
        why = (part or {}).get("why", f"handoff.{name} is switched off in its configuration")
        raise ConfigError(f"data: {run} hands over no {name} set: {why}")
    store = Store(run).child("handoff", name)
    files = tuple(store.locate(f["file"].rpartition("/")[2]) for f in part["files"])
    return Source(files, _text_column(run, described), part["fingerprint"])


def curated(run: str) -> Source:
    """The curated set of a run. Raises ConfigError where it was not curated."""
    described = handoff(run)
    if described is None:
        raise ConfigError(f"data: {run} is not a curated run: run `tamis curate` first")
    manifest = json.loads(Store(run).read("manifest.json"))
    return parquet([manifest["curated"]["path"]], _text_column(run, described))


def _text_column(run: str, described: dict[str, Any]) -> str:
    name: str | None = described["text_column"]
    if name is None:
        raise ConfigError(
            f"data: the rows of {run} are conversations or images, and a model is cut and healed on a column of texts: "
            "name Parquet files that have one"
        )
    return name


def by_score(source: Source, score: str) -> pa.Array:
    """Texts of a curated set, the highest of a score first. Raises CorpusError where the files do not carry it."""
    columns = {"text": source.column, "score": f"{TAMIS}.{score}"}
    rows = pa.Table.from_batches(list(source.batches(columns)))
    best = rows.take(pc.sort_indices(rows, sort_keys=[("score", "descending")]))
    return clean_text(best["text"].combine_chunks())[0].cast(pa.large_string()).drop_null()


def tokens_of(texts: pa.Array, tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Token ids (int32) of every text, without special tokens; what looks like one in a text is read as plain text."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    encoded = backend.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
    return [np.asarray(e.ids, np.int32) for e in encoded]


def end_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that closes a document. Raises ConfigError where a tokenizer has none."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("model: its tokenizer names no end token: set eos_token in tokenizer_config.json")
    return int(end)


def pack_blocks(
    texts: pa.Array, tokenizer: PreTrainedTokenizerFast, length: int, tokens: int, seed: int | None = 0
) -> np.ndarray:
    """Blocks (n, length) int32 of at most `tokens` tokens: documents in an order drawn from the seed (None: as they
    come), each closed by the end token, one after the other.

    What is left at the end and fills no block is dropped, unless there is no full block. Raises CorpusError where there
    is no text.
    """
    if not len(texts):
        raise CorpusError("data: there is no text in it")
    if seed is not None:
        texts = texts.take(pa.array(np.random.default_rng(seed).permutation(len(texts))))
    end = np.array([end_of(tokenizer)], np.int32)
    pieces: list[np.ndarray] = []
    have = 0
    for start in range(0, len(texts), BATCH_ROWS):
        for ids in tokens_of(texts.slice(start, BATCH_ROWS), tokenizer):
            pieces += [ids, end]
            have += len(ids) + 1
        if have >= tokens:
            break
    stream = np.concatenate(pieces)[: max(tokens, length)]
    blocks = len(stream) // length
    return stream[: blocks * length].reshape(blocks, length) if blocks else np.resize(stream, (1, length))


def set_apart(texts: Iterator[pa.Array], share: float, seed: int) -> tuple[pa.Array, pa.Array]:
    """Texts split in two by a hash of their content: `share` of them to measure on, and the rest.

    Equal texts stay together, in whatever set they are met, so nobody trains on what is measured. Both parts are held
    in memory: this is for sets to heal on, not for corpora.
    """
    parts = [t for t in texts if len(t)]
    if not parts:
        raise CorpusError("data: there is no text in it")
    whole = pa.concat_arrays(parts)
    apart = pa.array(uniform(row_keys(whole), seed) < share)
    return whole.filter(apart), whole.filter(pc.invert(apart))
