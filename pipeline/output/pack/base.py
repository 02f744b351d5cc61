"""The contract of packing: curated rows to token sequences of one length, stored for a trainer to read as they are.

Packed sequences are stored, `<run>/packed/<name>/`, by default under the kind and the length (`best_fit-1024`):

    packed.json         what it is (below)
    part-00000.parquet  sequences; the packed set is the concatenation of the parts

| column of a part | type | meaning |
| --- | --- | --- |
| input_ids | fixed_size_list<int32>[length] | tokens; documents one after the other, the rest padding (`pad_id`) |
| position_ids | fixed_size_list<int32>[length] | position in the document, from 0 at its start; 0 on padding |
| document | fixed_size_list<int32>[length] | which document of the sequence a token is of, from 0 on; -1 on padding |
| loss_mask | fixed_size_list<bool>[length] | whether a token is learnt; false on padding, image tokens, prompts |
| rows | list<int64> | the curated row of every document: its ordinal over the curated files, in their order |

`packed.json`: `format` ("tamis-packed-1"), `name`, `kind`, `recipe`, `fingerprint`, `curated` (fingerprint of the
curated set, as in `order.json`), `order` (name and fingerprint of the order that was packed), `length`, `pad_id`,
`end_id`, `tokenizer`, `sequences`, `parts` ([{file, rows}]), and `about`: `documents`, `tokens` (without padding),
`utilisation` (tokens / (sequences x length)), `cropped` (share of tokens that are in no sequence), `split` (share of
the documents that are in several pieces), `truncated` (share of those no longer than a sequence that are in several
pieces) and `skipped` (rows that could not be packed, by reason).

The footer of a part carries a fingerprint that follows from that of the set (`part_mark`), and the loader refuses a
part that has another one, such as what a crash leaves of a set that was being packed anew.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipeline.corpus.storage import Store
from pipeline.corpus.text import clean_text
from pipeline.engine.parts import FINGERPRINT, part_name
from pipeline.errors import ConfigError, TamisError
from pipeline.output.feeding import CuratedSet, FedRun
from pipeline.output.order._arrange import FedPart, fed_parts
from pipeline.output.order.base import Name, StoredOrder
from pipeline.output.pack._tokens import Encoder, encoder, field_of, ragged
from pipeline.recipe import Recipe, fingerprint

FORMAT = "tamis-packed-1"
NOTES = b"tamis.packed"
BATCH_ROWS = 1024
GROUP_TOKENS = 1 << 20
"""Tokens of a row group, and of the sequences that are laid out at a time."""


@dataclass(frozen=True)
class Documents:
    """n tokenised documents, end to end."""

    ids: np.ndarray
    """int32, (tokens,)."""
    learnt: np.ndarray
    """bool, (tokens,)."""
    lengths: np.ndarray
    """int64, (n,), all above 0."""
    rows: np.ndarray
    """int64, (n,): ordinals in the curated set."""

    @classmethod
    def joined(cls, parts: Sequence[Documents]) -> Documents:
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("ids", "learnt", "lengths", "rows")))


@dataclass(frozen=True)
class Pieces:
    """m pieces of documents and the sequences that they go to; arrays int64 of shape (m,). What is in no piece is cut
    off. Pieces of one sequence come in the order given."""

    document: np.ndarray
    start: np.ndarray
    """First token, in the document."""
    length: np.ndarray
    sequence: np.ndarray
    """-1: no sequence is full of it yet, it goes to the next window."""


class Pack(Recipe, ABC):
    """A way to pack. Subclasses live in `pipeline/output/pack/<kind>.py` and fix `kind` to the module's name."""

    kind: str
    length: int = Field(2048, ge=2, description="tokens a sequence")
    tokenizer: str | None = Field(None, description="tokenizer.json, a folder that holds one, or a hub name")
    end: str | None = Field(None, description="token that closes a document (default: the tokenizer's eos_token)")
    pad: str | None = Field(None, description="token of the padding (default: the end token)")
    text: str | None = Field(None, description="text column (default: the corpus's text, or its conversations)")
    ids: str | None = Field(None, description="column with lists of tokens, in place of a tokenizer; no end is added")
    mask: str | None = Field(None, description="column with a list of flags a row: which of its tokens are learnt")
    end_id: int | None = Field(None, ge=0, description="with `ids`: the token of the padding")
    window: int = Field(1 << 24, ge=1, description="tokens that are packed together; a worker holds so many")
    name: Name | None = Field(None, description="what it is stored as below <run>/packed (default: kind and length)")
    seed: int | None = Field(None, description="seed of what is shuffled (default: the run's)")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.ids is None) == (self.tokenizer is None):
            raise ValueError("give a `tokenizer`, or `ids`: the column that holds tokens already")
        if self.ids is not None and self.end_id is None:
            raise ValueError("`ids` need an `end_id`: the token to pad with")
        if self.ids is not None and self.text is not None:
            raise ValueError("give `text` or `ids`, not both")
        return self

    @property
    def stored_as(self) -> str:
        return self.name or f"{self.kind}-{self.length}"

    def check(self, order: StoredOrder | None) -> None:
        """Raise ConfigError for an order that this way of packing would undo."""

    @abstractmethod
    def place(self, lengths: np.ndarray, last: bool) -> Pieces:
        """Cut n documents of so many tokens, int64 (n,), into pieces and put these into sequences numbered from 0.

        `last`: nothing comes after this window, so nothing can be left for the next.
        """

    @property
    def mixes(self) -> bool:
        """Whether the sequences of a window are shuffled."""
        return True

    def leading(self, batch: pa.RecordBatch, encode: Encoder) -> tuple[np.ndarray, int]:
        """How many tokens of one kind stand before every row's, int64 (n,), and which; such as those of an image."""
        return np.zeros(batch.num_rows, np.int64), 0

    def encoder(self, source: CuratedSet) -> Encoder:
        """Raises ConfigError and MissingExtra."""
        spoken = source.chat is not None and self.text is None and self.ids is None
        return encoder(self.tokenizer, self.end, self.pad, self.end_id, spoken)

    def columns(self, source: CuratedSet) -> list[str]:
        """Columns of the curated rows that are read. Raises ConfigError where they have no text."""
        named = self.ids or self.text or (None if source.chat else source.text)
        if named is None and source.chat is None:
            raise ConfigError("pack: the corpus has no text column: name `text`, or `ids`")
        said = [named] if named else list(source.chat.columns if source.chat else ())
        return [*said, *([self.mask] if self.mask else [])]


def write_packed(run: FedRun, pack: Pack, order: StoredOrder | None) -> dict[str, Any]:
    """Pack the curated rows in an order (None: as they lie). Returns `packed.json`. Raises ConfigError, TamisError."""
    pack.check(order)
    seed = run.seed if pack.seed is None else pack.seed
    encode = pack.encoder(run.curated)  # what is wrong with it is said before any work
    columns = pack.columns(run.curated)
    missing = [c for c in columns if c.partition(".")[0] not in run.curated.schema.names]
    if missing:
        raise ConfigError(
            f"pack: the curated set has no column {missing[0]!r}; it has {', '.join(run.curated.schema.names)}"
        )
    parts = fed_parts(run, order)
    identity = fingerprint(FORMAT, pack.identity(), seed, encode.identity, [p.fingerprint for p in parts])
    store = run.store.child("packed", pack.stored_as)
    task = PackTask(store, pack, seed, tuple(columns), identity)
    results = run.each(f"pack {pack.stored_as}", task, parts)
    notes: dict[str, int] = {}
    for name in ("documents", "tokens", "cropped", "split", "truncated", "short", "sequences"):
        notes[name] = sum(r["notes"][name] for r in results)
    if not notes["sequences"]:
        raise TamisError(f"pack: no row has a token to pack; {_skipped(results)}")
    documents, given = max(notes["documents"], 1), notes["tokens"] + notes["cropped"]
    described = {
        "format": FORMAT,
        "name": pack.stored_as,
        "kind": pack.kind,
        "recipe": pack.model_dump(mode="json"),
        "fingerprint": identity,
        "curated": run.curated.fingerprint,
        "order": {"name": order.name, "fingerprint": order.fingerprint} if order else None,
        "length": pack.length,
        "pad_id": encode.pad_id,
        "end_id": encode.end_id,
        "tokenizer": pack.tokenizer,
        "sequences": notes["sequences"],
        "parts": [
            {"file": part_name(p.number), "rows": r["notes"]["sequences"]} for p, r in zip(parts, results, strict=True)
        ],
        "about": {
            "documents": notes["documents"],
            "tokens": notes["tokens"],
            "utilisation": notes["tokens"] / (notes["sequences"] * pack.length),
            "cropped": notes["cropped"] / max(given, 1),
            "split": notes["split"] / documents,
            "truncated": notes["truncated"] / max(notes["short"], 1),
            "skipped": _skipped(results),
        },
    }
    for name in set(store.files()) - {part_name(p.number) for p in parts} - {"packed.json"}:
        store.remove(name)
    store.write(json.dumps(described, indent=2).encode(), "packed.json")
    return described


def _skipped(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Rows that could not be packed, by reason."""
    reasons: dict[str, int] = {}
    for result in results:
        for reason, count in result["notes"]["skipped"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    return reasons


def schema_of(length: int) -> pa.Schema:
    """Fields of a part of packed sequences."""
    numbers = pa.list_(pa.int32(), length)
    fields = [(name, numbers) for name in ("input_ids", "position_ids", "document")]
    return pa.schema([*fields, ("loss_mask", pa.list_(pa.bool_(), length)), ("rows", pa.list_(pa.int64()))])


def part_mark(packed: str, part: int) -> str:
    """Fingerprint in the footer of a part. `packed`: that of the packed set, which changes with all that is in it."""
    return fingerprint(packed, part)


def cu_seqlens(document: np.ndarray) -> np.ndarray:
    """Boundaries of the documents of one sequence, as kernels for variable lengths take them: int32, 0 first, the
    number of tokens without padding last. `document`: (length,)."""
    used = int((document >= 0).sum())
    inside = np.flatnonzero(np.diff(document[:used])) + 1
    return np.concatenate([[0], inside, [used]]).astype(np.int32)


@dataclass
class PackTask:
    """Pack one part of the fed rows into one file of sequences."""

    store: Store
    pack: Pack
    seed: int
    columns: tuple[str, ...]
    identity: str

    def __call__(self, part: FedPart, attempt: int) -> dict[str, Any]:
        mark, name = part_mark(self.identity, part.number), part_name(part.number)
        if (done := _notes(self.store, name, mark)) is not None:
            return {"rows": part.rows, "bytes": 0, "notes": done}
        pack = self.pack
        encode = pack.encoder(part.curated)
        notes: dict[str, Any] = dict.fromkeys(
            ("documents", "tokens", "cropped", "split", "truncated", "short", "sequences"), 0
        ) | {"skipped": {}}
        schema = schema_of(pack.length).with_metadata({FINGERPRINT: mark.encode()})
        size = 0
        with self.store.sink(name) as sink:
            writer = pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False)
            try:
                for number, (documents, pieces) in enumerate(self._windows(part, encode, notes)):
                    drawn = np.random.default_rng([self.seed & 0xFFFFFFFF, part.number, number])
                    shuffled = drawn if pack.mixes else None
                    for batch in lay_out(documents, pieces, pack.length, encode.pad_id, shuffled):
                        writer.write_batch(batch.cast(schema), row_group_size=batch.num_rows)
                        size += batch.nbytes
                writer.add_key_value_metadata({NOTES.decode(): json.dumps(notes)})
                writer.close()
            finally:
                writer.is_open = False  # after an error the sink is gone: collecting this must not write a footer
        return {"rows": part.rows, "bytes": size, "notes": notes}

    def _windows(self, part: FedPart, encode: Encoder, notes: dict[str, Any]) -> Iterator[tuple[Documents, Pieces]]:
        """Windows of documents and where their pieces go, counted in `notes`."""
        left, carried = None, 0
        for documents, last in _with_last(self._gathered(part, encode, notes)):
            if left is not None:
                documents = Documents.joined([left, documents])
            if not len(documents.lengths):
                return
            pieces = self.pack.place(documents.lengths, last)
            _count(notes, documents, pieces, carried, self.pack.length)
            waits = pieces.sequence < 0
            left = _taken(documents, pieces, waits) if waits.any() else None
            carried = 0 if left is None else len(left.lengths)
            yield documents, Pieces(*(getattr(pieces, f)[~waits] for f in ("document", "start", "length", "sequence")))

    def _gathered(self, part: FedPart, encode: Encoder, notes: dict[str, Any]) -> Iterator[Documents]:
        held: list[Documents] = []
        for batch, ordinals in part.batches(list(self.columns), BATCH_ROWS):
            held.append(documents_of(self.pack, batch, ordinals, encode, part.curated, notes["skipped"]))
            if sum(len(d.ids) for d in held) >= self.pack.window:
                yield Documents.joined(held)
                held = []
        if held:
            yield Documents.joined(held)


def documents_of(
    pack: Pack,
    batch: pa.RecordBatch,
    ordinals: np.ndarray,
    encode: Encoder,
    source: CuratedSet,
    skipped: dict[str, int],
) -> Documents:
    """The rows of a batch as tokens. A row that cannot be packed is left out and counted under its reason."""
    said, reasons = texts_of(pack, batch, source)
    usable = reasons.is_null()
    batch, ordinals = batch.filter(usable), ordinals[usable.to_numpy(zero_copy_only=False)]
    if pack.ids:
        ids, lengths = ragged(field_of(batch, pack.ids), np.int32)
        learnt = np.ones(len(ids), bool)
    else:
        ids, lengths, learnt = encode({name: values.filter(usable) for name, values in said.items()})
    refused = np.where(lengths == 0, "no token", "").astype(object)
    if pack.mask:
        flags, counts = ragged(field_of(batch, pack.mask), bool)
        # The end token is packing's own: a mask of the text's tokens says nothing of it, and it is learnt.
        fits = (counts == lengths) | ((counts == lengths - 1) & (pack.ids is None))
        refused[~fits] = "mask and tokens differ in length"
        n = np.where(fits, counts, 0)
        at, flag = _spans(np.cumsum(lengths) - lengths, n), _spans(np.cumsum(counts) - counts, n)
        learnt[at] &= flags[flag]
    lead, filler = pack.leading(batch, encode)
    if lead.any():
        ids, whole = _behind(lead, filler, ids, lengths)
        learnt, lengths = _behind(lead, False, learnt, lengths)[0], whole
    for reason in (*reasons.drop_null().to_pylist(), *refused[refused != ""]):
        skipped[reason] = skipped.get(reason, 0) + 1
    good = refused == ""
    of_good = np.repeat(good, lengths)
    return Documents(ids[of_good], learnt[of_good], lengths[good], ordinals[good])


def texts_of(pack: Pack, batch: pa.RecordBatch, source: CuratedSet) -> tuple[dict[str, pa.Array], pa.Array]:
    """What is read of every row, `text` and in a corpus of instructions `targets` and `markup`, and why nothing is."""
    if pack.ids:
        return {}, pc.if_else(field_of(batch, pack.ids).is_null(), "no token", None)
    if source.chat is not None and pack.text is None:
        rendered = source.chat.render({name: batch.column(name) for name in source.chat.columns})
        return {name: getattr(rendered, name) for name in source.chat.references}, rendered.reasons
    text, why = clean_text(field_of(batch, str(pack.text or source.text)))
    return {"text": text}, pa.nulls(len(text), pa.string()) if why is None else why


def _behind(lead: np.ndarray, filler: int, values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every row `lead` times the filler and then its values; and how many these are."""
    whole = lead + lengths
    joined = np.full(int(whole.sum()), filler, values.dtype)
    joined[_spans(np.cumsum(whole) - lengths, lengths)] = values
    return joined, whole


def _with_last(windows: Iterator[Documents]) -> Iterator[tuple[Documents, bool]]:
    held = next(windows, None)
    while held is not None:
        following = next(windows, None)
        yield held, following is None
        held = following


def _taken(documents: Documents, pieces: Pieces, which: np.ndarray) -> Documents:
    """Some pieces as documents of their own."""
    document, start, length = (getattr(pieces, f)[which] for f in ("document", "start", "length"))
    at = _spans((np.cumsum(documents.lengths) - documents.lengths)[document] + start, length)
    return Documents(documents.ids[at], documents.learnt[at], length, documents.rows[document])


def _spans(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Indices of spans, one after the other: int64 (sum of lengths,)."""
    return np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())


def _count(notes: dict[str, Any], documents: Documents, pieces: Pieces, carried: int, length: int) -> None:
    """Add a window to the totals; its first `carried` documents are rests of the window before."""
    placed = pieces.sequence >= 0
    of = np.bincount(pieces.document, minlength=len(documents.lengths))[carried:]
    short = documents.lengths[carried:] <= length
    notes["documents"] += len(of)
    notes["tokens"] += int(pieces.length[placed].sum())
    notes["cropped"] += int(documents.lengths.sum() - pieces.length.sum())
    notes["split"] += int((of > 1).sum())
    notes["short"] += int(short.sum())
    notes["truncated"] += int((short & (of > 1)).sum())
    notes["sequences"] += int(pieces.sequence.max(initial=-1)) + 1


def lay_out(
    documents: Documents, pieces: Pieces, length: int, pad: int, shuffled: np.random.Generator | None
) -> Iterator[pa.RecordBatch]:
    """Sequences, in an order drawn from `shuffled` (None: as they are numbered), as batches of `schema_of(length)`."""
    count = int(pieces.sequence.max(initial=-1)) + 1
    rank = np.arange(count)
    if shuffled is not None:
        rank = shuffled.permutation(count)
    sequence = rank[pieces.sequence]
    order = np.lexsort((np.arange(len(sequence)), sequence))
    sequence, of, start, size = (v[order] for v in (sequence, pieces.document, pieces.start, pieces.length))
    source = (np.cumsum(documents.lengths) - documents.lengths)[of] + start
    edges = np.searchsorted(sequence, np.arange(count + 1))
    before = np.cumsum(size) - size
    step = max(1, GROUP_TOKENS // length)
    for first in range(0, count, step):
        end = min(first + step, count)
        here = slice(edges[first], edges[end])
        opening = edges[sequence[here]]
        into = (sequence[here] - first) * length + before[here] - before[opening]
        n = size[here]
        at, to = _spans(source[here], n), _spans(into, n)
        shape = (end - first) * length
        ids, position, document = np.full(shape, pad, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        learnt = np.zeros(shape, bool)
        ids[to], learnt[to] = documents.ids[at], documents.learnt[at]
        position[to] = _spans(np.zeros(len(n), np.int64), n)
        document[to] = np.repeat(np.arange(edges[first], edges[end]) - opening, n)
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(v), length) for v in (ids, position, document, learnt)]
        offsets = pa.array((edges[first : end + 1] - edges[first]).astype(np.int32))
        rows = pa.ListArray.from_arrays(offsets, pa.array(documents.rows[of[here]]))
        yield pa.RecordBatch.from_arrays([*lists, rows], schema=schema_of(length))


def _notes(store: Store, name: str, mark: str) -> dict[str, Any] | None:
    """What a finished part says of itself; None where it is not there or of something else."""
    try:
        with store.filesystem.open_input_file(store.at(name)) as source:
            found = pq.read_metadata(source).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    if found.get(FINGERPRINT, b"").decode() != mark or NOTES not in found:
        return None
    notes: dict[str, Any] = json.loads(found[NOTES])
    return notes
