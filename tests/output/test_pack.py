"""Packing: the specification's bins, boundaries that hold, nothing lost, and what cannot be packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import parse_as
from pipeline.errors import ConfigError, TamisError
from pipeline.output.commands import Feeding
from pipeline.output.order import base as orders
from pipeline.output.order.base import write_order
from pipeline.output.order.shuffled import Shuffled
from pipeline.output.pack import base as packing
from pipeline.output.pack._bins import best_fit_decreasing
from pipeline.output.pack.base import Documents, Pack, Pieces, cu_seqlens, lay_out, write_packed
from pipeline.output.pack.best_fit import BestFit
from pipeline.output.pack.concat import Concat
from pipeline.output.pack.pairs import Pairs
from tests.output.feeding_runs import curated, kept, opened, ordinals, rows

END, IMAGE = "<|end|>", "<image>"
WORDS = ["[UNK]", "row", "of", "word", *map(str, range(240))]
END_ID, IMAGE_ID = len(WORDS), len(WORDS) + 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A word a token."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    made = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens([AddedToken(END, special=True), AddedToken(IMAGE, special=True)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"__type": "AddedToken", "content": END}}))
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return curated(tmp_path_factory.mktemp("pack"))


def packed(run: str, pack: Pack, ordered: bool = False) -> tuple[dict[str, Any], pa.Table]:
    with opened(run) as fed:
        order = write_order(fed, Shuffled(name="for-packing")) if ordered else None
        described = write_packed(fed, pack, order)
    place = Path(run) / "packed" / described["name"]
    return described, pa.concat_tables(pq.read_table(place / p["file"]) for p in described["parts"])


def matrix(table: pa.Table, name: str) -> np.ndarray:
    return np.stack(table[name].combine_chunks().to_numpy(zero_copy_only=False))


def documents(table: pa.Table) -> dict[int, list[tuple[list[int], list[int], list[bool]]]]:
    """Pieces (tokens, positions, loss mask) of every curated row, as they come."""
    arrays = [matrix(table, n) for n in ("input_ids", "position_ids", "loss_mask", "document")]
    found: dict[int, list[tuple[list[int], list[int], list[bool]]]] = {}
    for ids, positions, learnt, of, of_row in zip(*arrays, table["rows"].to_pylist(), strict=True):
        assert sorted(set(of.tolist()) - {-1}) == list(range(len(of_row)))
        assert (np.diff(of[of >= 0]) >= 0).all()
        assert (of[(of >= 0).sum() :] == -1).all()  # padding comes last
        for number, row in enumerate(of_row):
            here = of == number
            found.setdefault(row, []).append((ids[here].tolist(), positions[here].tolist(), learnt[here].tolist()))
    return found


# ---- bins


def test_the_toy_of_open_qwen2vl() -> None:
    lengths = np.array([203, 1043, 1443, 183, 2143, 3143, 643, 843])
    bins = best_fit_decreasing(lengths, 4096)
    held = [sorted(lengths[bins == b].tolist(), reverse=True) for b in range(3)]
    assert held == [[3143, 843], [2143, 1443, 203, 183], [1043, 643]]
    fills = np.bincount(bins, lengths)
    assert fills.tolist() == [3986, 3972, 1686]
    assert fills.sum() / (3 * 4096) == pytest.approx(0.7848, abs=5e-5)


def test_an_item_above_the_capacity_has_a_bin_alone() -> None:
    assert best_fit_decreasing(np.array([5000, 10]), 4096).tolist() == [0, 1]


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """How full the bins are that a search over single bins fills."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(r, i) for i, r in enumerate(room) if r >= length]
        if fitting:
            room[min(fitting)[1]] -= length
        else:
            room.append(capacity - length)
    return sorted(capacity - r for r in room)


@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
@settings(max_examples=60)
def test_bins_are_those_of_a_search_over_single_ones(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    fills = np.bincount(bins, lengths) if lengths else np.empty(0)
    assert sorted(fills.tolist()) == one_by_one(lengths, capacity)
    assert all(a + b > capacity for i, a in enumerate(fills) for b in fills[:i])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
@settings(max_examples=30)
def test_no_more_than_eleven_ninths_of_the_fewest_bins(lengths: list[int]) -> None:
    best = _fewest(tuple(sorted(lengths, reverse=True)), (), 12)
    assert 1 + best_fit_decreasing(np.array(lengths), 12).max() <= 11 / 9 * best + 6 / 9


def _fewest(lengths: tuple[int, ...], room: tuple[int, ...], capacity: int) -> int:
    if not lengths:
        return len(room)
    first, rest = lengths[0], lengths[1:]
    tried = [
        _fewest(rest, tuple(sorted((*room[:i], r - first, *room[i + 1 :]))), capacity)
        for i, r in enumerate(room)
        if r >= first and r not in room[:i]
    ]
    return min([*tried, _fewest(rest, tuple(sorted((*room, capacity - first))), capacity)])


# ---- pieces


@given(st.sampled_from(["best_fit", "concat"]), st.lists(st.integers(1, 50), min_size=1, max_size=40), st.booleans())
@settings(max_examples=60)
def test_every_token_is_in_one_piece_and_no_sequence_is_over_full(kind: str, lengths: list[int], last: bool) -> None:
    pack = {"best_fit": BestFit, "concat": Concat}[kind](length=16, ids="ids", end_id=0)
    pieces = pack.place(np.array(lengths), last)
    for document, length in enumerate(lengths):
        of = pieces.document == document
        spans = sorted(zip(pieces.start[of].tolist(), pieces.length[of].tolist(), strict=True))
        assert [s for s, _ in spans] == np.cumsum([0, *(n for _, n in spans[:-1])]).tolist()
        assert sum(n for _, n in spans) == length
        if kind == "best_fit" and length <= 16:
            assert len(spans) == 1
    placed = pieces.sequence >= 0
    fills = np.bincount(pieces.sequence[placed], pieces.length[placed])
    assert (fills > 0).all()
    assert (fills <= 16).all()
    if kind == "concat":
        assert (fills[: len(fills) - last] == 16).all()
        assert placed.all() or not last


def test_the_layout_of_a_sequence() -> None:
    made = Documents(
        np.arange(10, 17, dtype=np.int32), np.array([1, 1, 0, 1, 1, 1, 1], bool), np.array([3, 4]), np.array([7, 5])
    )
    pieces = Pieces(np.array([0, 1]), np.array([0, 0]), np.array([3, 4]), np.array([0, 0]))
    batch = next(lay_out(made, pieces, 8, pad=99, shuffled=None))
    assert batch.to_pylist() == [
        {
            "input_ids": [10, 11, 12, 13, 14, 15, 16, 99],
            "position_ids": [0, 1, 2, 0, 1, 2, 3, 0],
            "document": [0, 0, 0, 1, 1, 1, 1, -1],
            "loss_mask": [True, True, False, True, True, True, True, False],
            "rows": [7, 5],
        }
    ]
    assert cu_seqlens(np.array([0, 0, 0, 1, 1, 1, 1, -1])).tolist() == [0, 3, 7]


def test_sequences_are_shuffled_where_packing_by_length_has_sorted_them() -> None:
    made = Documents(np.zeros(100, np.int32), np.ones(100, bool), np.ones(100, np.int64), np.arange(100))
    pieces = Pieces(np.arange(100), np.zeros(100, np.int64), np.ones(100, np.int64), np.arange(100))

    def laid(seed: int | None) -> list[int]:
        drawn = None if seed is None else np.random.default_rng(seed)
        return [row for b in lay_out(made, pieces, 2, 0, drawn) for (row,) in b["rows"].to_pylist()]

    assert laid(None) == list(range(100))
    assert sorted(laid(0)) == list(range(100))
    assert laid(0) == laid(0) != laid(1)
    assert laid(0) != list(range(100))


# ---- runs


@pytest.mark.parametrize("kind", [BestFit, Concat])
@pytest.mark.parametrize("window", [300, 1 << 24])
def test_every_row_is_packed_whole(
    run: str, tokenizer: str, kind: type[Pack], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_ROWS", 16)  # a window is whole batches
    described, table = packed(run, kind(length=32, tokenizer=tokenizer, window=window), ordered=True)
    found = documents(table)
    texts = kept(run)["text"].to_pylist()
    assert sorted(found) == list(range(200))
    for row, pieces in found.items():
        pieces.sort(key=lambda p: -len(p[0])) if kind is BestFit else None
        tokens = [t for p in pieces for t in p[0]]
        assert len(tokens) == len(texts[row].split()) + 1
        assert tokens.count(END_ID) == 1
        for ids, positions, learnt in pieces:
            assert positions == list(range(len(ids)))
            assert all(learnt)
    about = described["about"]
    tokens = sum(len(t.split()) + 1 for t in texts)
    assert (about["documents"], about["tokens"], about["cropped"]) == (200, tokens, 0)
    assert about["utilisation"] == pytest.approx(tokens / (table.num_rows * 32))
    in_pieces = sum(len(p) > 1 for p in found.values())
    assert about["split"] == pytest.approx(in_pieces / 200)
    short = [r for r, t in enumerate(texts) if len(t.split()) + 1 <= 32]
    assert about["truncated"] == pytest.approx(sum(len(found[r]) > 1 for r in short) / len(short))
    if kind is BestFit:
        assert about["truncated"] == 0
        assert about["utilisation"] > 0.9
    else:
        assert about["truncated"] > 0.3
        assert table.num_rows == -(-tokens // 32)


def test_concatenation_keeps_the_order_to_the_token(run: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_ROWS", 3)  # a window is whole batches
    described, table = packed(run, Concat(length=16, tokenizer=tokenizer, window=100), ordered=True)
    with opened(run) as fed:
        order = ordinals(fed, write_order(fed, Shuffled(name="for-packing")))
    rows_in_turn = np.array([r for of in table["rows"].to_pylist() for r in of])
    assert np.array_equal(rows_in_turn[np.append(True, np.diff(rows_in_turn) != 0)], order)
    assert described["order"]["name"] == "for-packing"
    stream = matrix(table, "input_ids").ravel()[matrix(table, "document").ravel() >= 0]
    ends = np.flatnonzero(stream == END_ID)
    texts = kept(run)["text"].to_pylist()
    assert np.diff(np.append(-1, ends)).tolist() == [len(texts[r].split()) + 1 for r in order]


def test_the_same_bytes_again_and_only_what_is_lost_is_packed_anew(
    run: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "PART_ROWS", 50)
    pack = BestFit(length=64, tokenizer=tokenizer, name="again")

    def made() -> dict[str, tuple[int, bytes]]:
        packed(run, pack, ordered=True)
        return {
            p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (Path(run) / "packed" / "again").glob("*.parquet")
        }

    first = made()
    assert len(first) > 2
    assert made() == first
    (Path(run) / "packed" / "again" / "part-00001.parquet").unlink()
    again = made()
    assert {n: b for n, (_, b) in again.items()} == {n: b for n, (_, b) in first.items()}
    assert [n for n in first if again[n][0] != first[n][0]] == ["part-00001.parquet"]


def test_what_looks_like_an_end_in_a_text_is_none(tmp_path: Path, tokenizer: str) -> None:
    table = rows().set_column(1, "text", pa.array([f"row {END} {i}" for i in range(240)]))
    _, found = packed(curated(tmp_path, table), BestFit(length=16, tokenizer=tokenizer))
    for pieces in documents(found).values():
        assert pieces[0][0][:-1].count(END_ID) == 0
        assert pieces[0][0][-1] == END_ID


def test_stored_tokens_and_masks_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = [list(range(100, 100 + i % 7)) for i in range(240)]
    wrongly = {48: 1, 46: -1}  # one flag too many, one too few
    mask = [[bool((i + j) % 2) for j in range(i % 7 + wrongly.get(i % 50, 0) * (i % 7 > 0))] for i in range(240)]
    table = rows().append_column("ids", pa.array(ids, pa.list_(pa.int32()))).append_column("mask", pa.array(mask))
    run = curated(tmp_path, table)
    described, found = packed(run, BestFit(length=8, ids="ids", mask="mask", end_id=5))
    numbers = kept(run)["n"].to_pylist()
    wrong = sum(n % 50 in wrongly and n % 7 > 0 for n in numbers)
    empty = sum(n % 7 == 0 for n in numbers)
    assert described["about"]["skipped"] == {"mask and tokens differ in length": wrong, "no token": empty}
    for row, pieces in documents(found).items():
        n = numbers[row]
        assert pieces == [(ids[n], list(range(n % 7)), mask[n])]
    assert set(matrix(found, "input_ids")[matrix(found, "document") < 0].tolist()) == {5}


def test_a_mask_of_the_texts_tokens_leaves_the_end_learnt(tmp_path: Path, tokenizer: str) -> None:
    texts = ["word " * (1 + i % 5) for i in range(240)]
    mask = [
        [bool((i + j) % 2) for j in range(1 + i % 5 + i % 3)] for i in range(240)
    ]  # the text's, with the end's, more
    table = pa.table({"n": np.arange(240), "text": texts, "mask": mask})
    run = curated(tmp_path, table)
    described, found = packed(run, BestFit(length=16, tokenizer=tokenizer, mask="mask"))
    numbers = kept(run)["n"].to_pylist()
    assert described["about"]["skipped"] == {"mask and tokens differ in length": sum(n % 3 == 2 for n in numbers)}
    for row, ((_, _, learnt),) in documents(found).items():
        n = numbers[row]
        assert learnt == [*mask[n], *([True] if n % 3 == 0 else [])]


def test_of_instructions_only_the_response_is_learnt(tmp_path: Path, tokenizer: str) -> None:
    prompts = [f"row {i}" for i in range(240)]
    answers = ["" if i % 40 == 7 else "word " * (i % 5 + 1) for i in range(240)]
    table = pa.table({"n": np.arange(240), "prompt": prompts, "response": answers})
    run = curated(
        tmp_path,
        table,
        corpus={"path": str(tmp_path / "corpus-*.parquet"), "prompt": "prompt", "response": "response"},
        select={"budget": {"rows": 150}},
    )
    described, found = packed(run, BestFit(length=32, tokenizer=tokenizer))
    numbers = kept(run)["n"].to_pylist()
    assert described["about"]["documents"] == 150
    for row, pieces in documents(found).items():
        said = numbers[row] % 5 + 1
        assert pieces[0][2] == [False] * 2 + [True] * (said + 1)  # the end of a response is learnt as well


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_pairs_take_the_tokens_of_their_image(tmp_path: Path, tokenizer: str, overlong: str) -> None:
    texts = ["word " * (90 if i % 30 == 0 else 1 + i % 9) for i in range(240)]
    images = [None if i % 20 == 3 else b"image" for i in range(240)]
    table = pa.table({"n": np.arange(240), "text": texts, "picture": images})
    run = curated(tmp_path, table)
    options = {"image": "picture", "image_tokens": 10, "image_token": IMAGE, "overlong": overlong}
    described, found = packed(run, Pairs(length=64, tokenizer=tokenizer, **options))
    numbers = kept(run)["n"].to_pylist()
    long = sum(n % 30 == 0 for n in numbers)
    pairs = documents(found)
    assert len(pairs) == 200 - (long if overlong == "drop" else 0)
    cropped = long * (101 - (64 if overlong == "cut" else 0))
    assert described["about"]["cropped"] == pytest.approx(cropped / (cropped + described["about"]["tokens"]))
    for row, pieces in pairs.items():
        n = numbers[row]
        lead = 0 if images[n] is None else 10
        ids, _, learnt = pieces[0]
        assert len(pieces) == 1
        assert ids[:lead] == [IMAGE_ID] * lead
        assert IMAGE_ID not in ids[lead:]
        assert learnt == [False] * lead + [True] * (len(ids) - lead)
        assert len(ids) == (64 if n % 30 == 0 else lead + len(texts[n].split()) + 1)


def test_pairs_alone_in_their_sequences_waste_nearly_all(run: str, tokenizer: str) -> None:
    """Captions of 12 tokens on average: over 95 % used when packed, a few percent with one a sequence."""
    lengths = np.random.default_rng(0).integers(1, 24, 5000) + 143
    packed_share = lengths.sum() / (4096 * (1 + Pairs(tokenizer=tokenizer).place(lengths, True).sequence.max()))
    assert packed_share > 0.95
    assert lengths.mean() / 4096 < 0.05


@pytest.mark.parametrize(
    ("pack", "why"),
    [
        ({"kind": "best_fit"}, "give a `tokenizer`, or `ids`"),
        ({"kind": "best_fit", "tokenizer": "x", "ids": "y"}, "give a `tokenizer`, or `ids`"),
        ({"kind": "best_fit", "ids": "y"}, "need an `end_id`"),
        ({"kind": "best_fit", "tokenizer": "x", "length": 1}, "greater than or equal to 2"),
        ({"kind": "pairs", "tokenizer": "x", "length": 100}, "leaves no room for text"),
        ({"kind": "concat", "tokenizer": "x", "name": "a/b"}, "cannot name a directory"),
    ],
)
def test_bad_packings_are_refused_with_what_to_change(pack: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_as(Feeding, {"run": "x", "pack": pack})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: {"tokenizer": t, "end": "</s>"}, "has no token '</s>'"),
        (lambda t: {"tokenizer": t + "/tokenizer.json", "end": None, "pad": "<pad>"}, "has no token '<pad>'"),
        (lambda t: {"tokenizer": t, "text": "nothing"}, "no column 'nothing'"),
        (lambda t: {"ids": "text", "end_id": 0, "mask": "nothing"}, "no column 'nothing'"),
    ],
)
def test_what_a_run_does_not_have_is_named(
    run: str, tokenizer: str, change: Callable[[str], dict[str, Any]], why: str
) -> None:
    with opened(run) as fed, pytest.raises(ConfigError, match=why):
        write_packed(fed, BestFit(length=16, **change(tokenizer)), None)


def test_a_tokenizer_that_names_no_end_is_asked_for_one(run: str, tokenizer: str, tmp_path: Path) -> None:
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes(Path(tokenizer, "tokenizer.json").read_bytes())
    with opened(run) as fed, pytest.raises(ConfigError, match="say which token ends a document"):
        write_packed(fed, BestFit(length=16, tokenizer=str(alone)), None)


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    table = rows().append_column("ids", pa.array([[]] * 240, pa.list_(pa.int32())))
    with opened(curated(tmp_path, table)) as fed, pytest.raises(TamisError, match="no row has a token"):
        write_packed(fed, BestFit(length=8, ids="ids", end_id=0), None)
