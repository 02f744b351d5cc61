"""Documents to token blocks: what a model is calibrated, healed and measured on.

A source is a curated run (its `handoff.json` names a calibration and a recovery set) or Parquet files, which then serve
as both. Documents are texts or conversations: a run knows which, and how it writes them, of files the configuration
says so. They are tokenised without special tokens of their own, closed by the end token, and packed end to end into
blocks of one length, as pretraining does; nothing is padded. What is measured on is set apart by document before
anything else is drawn, so no text is on both sides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.compress.documents import closing, text_of, tokens_of
from pipeline.corpus.chat import Chat
from pipeline.corpus.content import Content
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
SCORE = "score to sort by"
BATCH_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """Documents in files: their column of texts or, where they are conversations, how these are written; the files'
    addresses, and a fingerprint of what they hold."""

    column: str | None
    chat: Chat | None = None
    files: tuple[str, ...] = ()
    fingerprint: str = ""

    def of(self, files: Sequence[str], held: Any) -> Self:
        """The same columns of other files, which hold what identifies them."""
        written = self.column if self.chat is None else self.chat.identity
        return replace(self, files=tuple(files), fingerprint=fingerprint(held, written))

    def at(self, paths: Sequence[str]) -> Self:
        """The same columns of Parquet files, directories and globs. Raises ConfigError where there are none."""
        try:
            listed = expand(list(paths))
        except (CorpusError, OSError, ValueError) as error:
            raise ConfigError(f"data: neither a curated run nor Parquet files: {', '.join(paths)}") from error
        return self.of([u for u, _, _ in listed], [[u, size] for u, size, _ in listed])

    @property
    def columns(self) -> dict[str, str]:
        """What `documents_in` reads of the files, by the names that it knows it by."""
        return {"text": str(self.column)} if self.chat is None else {name: name for name in self.chat.columns}

    def documents(self, refused: Counter[str] | None = None) -> Iterator[pa.Array]:
        """Usable documents, batch by batch in the files' order; rows that are not are counted by reason in `refused`.

        Raises CorpusError for unreadable files, and where no row is usable.
        """
        refused = Counter() if refused is None else refused
        usable = 0
        for batch in self.batches(self.columns):
            documents, reasons = self.documents_in(batch)
            if reasons is not None:
                for found in pc.value_counts(reasons.drop_null()).to_pylist():
                    refused[found["values"]] += found["counts"]
            usable += len(documents) - documents.null_count
            yield documents.drop_null()
        if refused and not usable:
            (reason, rows), *_ = refused.most_common(1)
            raise CorpusError(f"data: none of its {refused.total():,} rows is usable; {rows:,} of them: {reason}")

    def documents_in(self, rows: pa.RecordBatch) -> tuple[pa.Array, pa.Array | None]:
        """The document of every row, null where it is of no use, and the reasons (None where all are)."""
        if self.chat is None:
            texts, reasons = clean_text(rows.column("text"))
            return texts.cast(pa.large_string()), reasons
        found = self.chat.render({name: rows.column(name) for name in self.chat.columns})
        parts = {name: getattr(found, name) for name in self.chat.references}
        made = pa.StructArray.from_arrays(list(parts.values()), list(parts), mask=found.text.is_null())
        return made, found.reasons

    def batches(self, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows as they are stored: by the names that they are to have; `a.b` is a field."""
        for uri in self.files:
            try:
                read = self.opened(uri, columns)
                parts = {c: (c,) if c in read.schema.names else tuple(c.split(".")) for c in columns.values()}
                wanted = {name: ds.field(*parts[c]) for name, c in columns.items()}
                yield from read.to_batches(columns=wanted, batch_size=BATCH_ROWS)
            except (pa.ArrowException, OSError) as error:
                raise CorpusError(f"cannot read {uri}: {error}") from error

    def opened(self, uri: str, columns: Mapping[str, str]) -> ds.Dataset:
        """A file that has the columns. Raises ConfigError, CorpusError where it has not or cannot be read."""
        filesystem, path = resolve(uri)
        try:
            read = ds.dataset(path, filesystem=filesystem, format="parquet")
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"cannot read {uri}: {error}") from error
        if self.chat is not None:
            self.chat.check(read.schema, "data")
        fields = [*read.schema.names, *(f"{TAMIS}.{f}" for f in _struct(read.schema))]
        if missing := next((c for c in columns.values() if c not in fields), None):
            raise CorpusError(f"{uri} has no column {missing!r}; it has {', '.join(fields)}")
        return read


def _struct(schema: pa.Schema) -> list[str]:
    """Names of what the curated set says of its rows."""
    return [f.name for f in schema.field(TAMIS).type] if TAMIS in schema.names else []


def sources(data: str | Sequence[str], content: Content) -> tuple[Source, Source]:
    """Where to calibrate from and where to recover on: a curated run's hand-off, or the same Parquet files twice, whose
    rows are what `content` says.

    Raises ConfigError where there is neither, or where a run has not been curated or wrote an empty set.
    """
    if isinstance(data, str):
        described = handoff(data)
        if described is not None:
            if content.chat_columns:
                raise ConfigError(f"data: the run {data} knows what its rows are: remove the columns and `template`")
            return _handed(data, described, "calibration"), _handed(data, described, "recovery")
    found = parquet([data] if isinstance(data, str) else data, content)
    return found, found


def parquet(paths: Sequence[str], content: Content) -> Source:
    """Parquet files, directories and globs as a source of texts or conversations. Raises ConfigError where there are
    none, or a tokenizer has no chat template; CorpusError where the first lacks a column or cannot be read."""
    if not content.has_text:
        raise ConfigError("data: a row needs a content: name the column of `text` or of `messages`")
    found = Source(content.text, content.chat("data")).at(paths)
    found.opened(found.files[0], found.columns)
    return found


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
    files = [store.locate(f["file"].rpartition("/")[2]) for f in part["files"]]
    return _written(run, described).of(files, part["fingerprint"])


def curated(run: str) -> Source:
    """The curated set of a run. Raises ConfigError where it was not curated."""
    described = handoff(run)
    if described is None:
        raise ConfigError(f"data: {run} is not a curated run: run `tamis curate` first")
    manifest = json.loads(Store(run).read("manifest.json"))
    return _written(run, described).at([manifest["curated"]["path"]])


def _written(run: str, described: dict[str, Any]) -> Source:
    """What the rows of a run are: a source without files. Raises ConfigError for rows that say nothing."""
    chat = Chat.stored(described["chat"]) if "chat" in described else None
    if described["text_column"] is None and chat is None:
        raise ConfigError(
            f"data: the rows of {run} are images, and a model is cut and healed on texts or conversations: name a run "
            "or Parquet files that have some"
        )
    return Source(described["text_column"], chat)


def by_score(source: Source, score: str) -> pa.Array:
    """Documents of a curated set, the highest of a score first. Raises CorpusError where the files do not carry it."""
    rows = pa.Table.from_batches(list(source.batches(source.columns | {SCORE: f"{TAMIS}.{score}"})))
    best = rows.take(pc.sort_indices(rows, sort_keys=[(SCORE, "descending")]))
    return pa.concat_arrays([source.documents_in(batch)[0] for batch in best.to_batches()]).drop_null()


def pack_blocks(
    documents: pa.Array, tokenizer: PreTrainedTokenizerFast, length: int, tokens: int, seed: int | None = 0
) -> np.ndarray:
    """Blocks (n, length) int32 of at most `tokens` tokens: documents in an order drawn from the seed (None: as they
    come), each closed by the end token, one after the other. The ids say what is to be predicted: `read_ids`.

    What is left at the end and fills no block is dropped, unless there is no full block. Raises CorpusError where there
    is no document.
    """
    if not len(documents):
        raise CorpusError("data: there is no text in it")
    if seed is not None:
        documents = documents.take(pa.array(np.random.default_rng(seed).permutation(len(documents))))
    end = np.array([closing(documents, tokenizer)], np.int32)
    pieces: list[np.ndarray] = []
    have = 0
    for start in range(0, len(documents), BATCH_ROWS):
        for ids in tokens_of(documents.slice(start, BATCH_ROWS), tokenizer):
            pieces += [ids, end]
            have += len(ids) + 1
        if have >= tokens:
            break
    stream = np.concatenate(pieces)[: max(tokens, length)]
    blocks = len(stream) // length
    return stream[: blocks * length].reshape(blocks, length) if blocks else np.resize(stream, (1, length))


def set_apart(documents: Iterator[pa.Array], share: float, seed: int) -> tuple[pa.Array, pa.Array]:
    """Documents split in two by a hash of their content: `share` of them to measure on, and the rest.

    Equal ones stay together, in whatever set they are met, so nobody trains on what is measured. Both parts are held in
    memory: this is for sets to heal on, not for corpora.
    """
    parts = [d for d in documents if len(d)]
    if not parts:
        raise CorpusError("data: there is no text in it")
    whole = pa.concat_arrays(parts)
    apart = pa.array(uniform(row_keys(text_of(whole)), seed) < share)
    return whole.filter(apart), whole.filter(pc.invert(apart))
