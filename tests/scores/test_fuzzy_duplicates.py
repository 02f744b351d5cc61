"""MinHash-LSH: what becomes of a text, the S-curve with the published numbers, groups across shards."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.curation import curate
from pipeline.engine.pool import InlinePool, Pool, RayPool
from pipeline.scores._minhash import band_keys, fold_table, jaccard, shingles
from pipeline.scores.fuzzy_duplicates import PRESETS, FuzzyDuplicates, _open
from pipeline.words import SPACELESS

S = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)


def chance(s: float, bands: int, rows: int) -> float:
    """Of two texts of Jaccard similarity s to share a band."""
    return 1 - (1 - s**rows) ** bands


def hashed(*texts: str, n: int = 5) -> list[set[int]]:
    hashes, offsets = shingles(pa.array(texts), n)
    return [set(own.tolist()) for own in np.split(hashes, offsets[1:-1].astype(np.int64))]


# From text to n-grams


def test_as_many_ngrams_as_words_allow() -> None:
    assert [len(s) for s in hashed("a b c d e", "a b c d e f g", "a b c d", "a", "!", "a a a a a a a")] == [
        1,
        3,
        1,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The quick brown fox jumps", "the QUICK, brown -- fox\n\n(jumps)!"),
        ("caf\u00e9 cre\u0301me br\u00fbl\u00e9e \u00e0 la", "CAFE\u0301 creme brulee a la"),
        ("in 1999 we paid 5 euros", "in 2024 we paid 77 euros"),
        (
            "\u0441 \u0414\u041e\u0411\u0420\u042b\u041c \u0443\u0442\u0440\u043e\u043c",
            "\u0441 \u0434\u043e\u0431\u0440\u044b\u043c \u0443\u0442\u0440\u043e\u043c",
        ),
        ("soft\u00adhyphens and zero\u200bwidth are nothing", "softhyphens and zerowidth are nothing"),
        ("short Text", "Short, text."),
        ("\u65e5\u672c\u8a9e\u306e\u6587\u7ae0", "\u65e5\u672c\u8a9e \u306e \u6587\u7ae0\u3002"),
    ],
)
def test_what_counts_as_the_same(one: str, other: str) -> None:
    assert hashed(one) == hashed(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("a b", "ab"), ("a b c d e", "a b d c e"), ("short text", "text short"), ("a", "a a"), ("!!!", "???"), ("e", "f")],
)
def test_what_counts_as_different(one: str, other: str) -> None:
    a, b = hashed(one, other)
    assert not a & b


def test_a_character_of_a_script_without_spaces_is_a_word() -> None:
    (han,) = hashed("\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059")  # eight characters
    assert len(han) == 4


@settings(max_examples=60)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8), st.integers(1, 6))
def test_a_text_s_ngrams_do_not_depend_on_its_neighbours(texts: list[str], n: int) -> None:
    alone = [hashed(text, n=n)[0] for text in texts]
    assert hashed(*texts, n=n) == alone


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["aa", "b", "Cc", "dd1", "e"]), max_size=14), st.integers(1, 5))
def test_ngrams_are_sets_of_tuples_of_words(words: list[str], n: int) -> None:
    wanted = {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}
    assert len(hashed(" ".join(words) or "-", n=n)[0]) == len(wanted)


def words_of(text: str) -> tuple[str, ...]:
    """The normalisation as the module tells it, a character at a time."""
    words = [""]
    for c in text:
        category = unicodedata.category(c)
        if category in ("Mn", "Me", "Cf") or 0xE0000 <= ord(c) < 0xE1000:
            continue
        if 0x20000 <= ord(c) < 0x40000:
            words += [c, ""]
        elif category == "Nd":
            words[-1] += "" if words[-1].endswith("0") else "0"
        elif category[0] not in "LNM" or ord(c) >= 0x20000:
            words.append("")
        else:
            bare = [d for d in unicodedata.normalize("NFD", c.lower()) if unicodedata.category(d) != "Mn"]
            folded = c.lower() if len(c.lower()) == 1 else c
            if len(c.lower()) > 1 or unicodedata.decomposition(folded):
                folded = bare[0] if len(bare) == 1 else c
            words += [folded, ""] if re.match(f"[{SPACELESS}]", c) else []
            words[-1] += "" if re.match(f"[{SPACELESS}]", c) else folded
    return tuple(word for word in words if word)


CHARACTERS = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from("aBz019 \n\0.\u00e9\u00c9\u00df\u0130\u8a9e\u6587\u304b\u304c\u0e01\u0e51\u0e52\u0661"),
    st.sampled_from(
        "\u0301\u3099\u200b\u023a\u2c65\u023e\u2c66\uac00\u017f\u212a\U00020000\U0001d400\uff11\ufa6c\U000242ee"
    ),
)


@settings(max_examples=300)
@given(st.lists(st.text(CHARACTERS, max_size=12), min_size=2, max_size=6), st.integers(1, 3))
def test_texts_agree_where_their_words_do(texts: list[str], n: int) -> None:
    words = [words_of(text) for text in texts]
    grams = [
        {w[i : i + n] for i in range(max(1, len(w) - n + 1))} if w else {text}
        for w, text in zip(words, texts, strict=True)
    ]
    found = hashed(*texts, n=n)
    assert [len(g) for g in found] == [len(g) for g in grams]
    assert len(set.union(*found)) == len(set.union(*grams))
    for i in range(1, len(texts)):
        assert len(found[0] & found[i]) == len(grams[0] & grams[i])


def test_no_character_grows_when_it_is_folded() -> None:
    table, alone = fold_table()
    points = [p for p in range(0x80, 0x40000) if not 0xD800 <= p < 0xE000]
    sizes = np.array([len(chr(p).encode()) for p in points])
    assert (table[points].astype(np.uint64) >> (8 * sizes).astype(np.uint64) == 0).all()
    assert alone.sum() > 150_000


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 40, 1000])
def test_every_character_of_a_word_counts_and_its_place(size: int) -> None:
    word = ("abcdefghijklmnopqrstuvwxy" * 40)[:size]
    other = {word[:i] + "z" + word[i + 1 :] for i in range(size)} | {word, word + "z", "z" + word}
    swapped = {word[8:16] + word[:8] + word[16:]} if size >= 16 else set()
    assert len(set.union(*hashed(*other, *swapped, n=1))) == len(other | swapped)
    assert hashed(f"- {word}?", n=1) == hashed(word, n=1)


# From n-grams to bands


def test_the_published_numbers_of_the_s_curve() -> None:
    published = {
        "fineweb": (0.0533, 0.2111, 0.5645, 0.7716, 0.9235, 0.9884, 0.9996),
        "refinedweb": (0.0004, 0.0163, 0.3018, 0.7605, 0.9946, 1, 1),
        "dclm": (0.0028, 0.0428, 0.3576, 0.7138, 0.9642, 0.9998, 1),
    }
    for preset, wanted in published.items():
        np.testing.assert_allclose([chance(s, *PRESETS[preset]) for s in S], wanted, atol=6e-5)
    threshold = {p: (1 / b) ** (1 / r) for p, (b, r) in PRESETS.items()}
    assert threshold == pytest.approx({"fineweb": 0.719, "refinedweb": 0.737, "dclm": 0.739}, abs=5e-4)


def pairs_of(s: float, pairs: int, union: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of 2 * pairs sets: neighbours share the fraction s of `union` elements, exactly."""
    both = round(s * union)
    one = (union - both) // 2
    every = rng.integers(0, 2**64, (pairs, union), dtype=np.uint64)
    sets = [np.concatenate([e[:both], half]) for e in every for half in (e[both : both + one], e[both + one :])]
    return np.concatenate(sets), np.concatenate([[0], np.cumsum([len(x) for x in sets])]).astype(np.uint64)


@pytest.mark.parametrize(("bands", "rows", "pairs"), [(14, 8, 10_000), (93, 15, 1_400)])
def test_pairs_follow_the_curve(bands: int, rows: int, pairs: int) -> None:
    rng, pairs = np.random.default_rng(0), pairs // len(S)
    for s in S:
        hashes, offsets = pairs_of(s, pairs, 200, rng)
        keys = band_keys(hashes, offsets, bands, rows, 1)
        found = (keys[::2] == keys[1::2]).any(axis=1).mean()
        p = chance(s, bands, rows)
        assert abs(found - p) <= 3 * np.sqrt(p * (1 - p) / pairs) + 1 / pairs


@pytest.mark.parametrize("union", [3, 20, 2000])
def test_minima_are_fair_for_small_sets_and_large(union: int) -> None:
    hashes, offsets = pairs_of(1 / 3, 400, union, np.random.default_rng(1))
    keys = band_keys(hashes, offsets, 64, 1, 1)
    s = round(union / 3) / union
    assert abs((keys[::2] == keys[1::2]).mean() - s) <= 4 * np.sqrt(s * (1 - s) / (400 * 64))


def test_keys_of_unlike_texts_and_of_unlike_bands_never_agree() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    keys = band_keys(hashes, np.arange(20_001, dtype=np.uint64), 14, 8, 1)  # one n-gram a text
    assert len(np.unique(keys)) == keys.size


def test_keys_depend_on_the_text_and_the_seed_alone() -> None:
    texts = pa.array([" ".join(map(str, range(i, i + 40))) + "x" * i for i in range(50)])
    hashes, offsets = shingles(texts, 5)
    whole = band_keys(hashes, offsets, 14, 8, 1)
    part = band_keys(*shingles(texts.slice(13, 9), 5), 14, 8, 1)
    np.testing.assert_array_equal(whole[13:22], part)
    assert not (whole == band_keys(hashes, offsets, 14, 8, 2)).any()
    again = np.repeat(hashes, 2), offsets * np.uint64(2)  # sets know no repetition
    np.testing.assert_array_equal(whole, band_keys(*again, 14, 8, 1))


def test_stored_keys_stay_what_they_are() -> None:
    # Stored bands of several runs may be compared: if this fails, raise the identity of the column.
    keys = band_keys(*shingles(pa.array(["The quick brown fox jumps over the lazy dog.", "short"]), 5), 3, 8, 1)
    assert keys.tolist() == [
        [17322851414194254147, 12849436851461714488, 7288460442562548519],
        [13774706815545318445, 2542778670520637506, 16419713524649199662],
    ]


def test_long_texts_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {i} " + "word " * (10 * i) for i in range(20)]
    batch = pa.record_batch([texts], ["text"])
    whole = _open(14, 8, 5, 1)(batch)
    monkeypatch.setattr("pipeline.scores.fuzzy_duplicates.PIECE_BYTES", 100)
    assert _open(14, 8, 5, 1)(batch).equals(whole)


# Whole runs


def essay(rng: np.random.Generator, words: int = 300) -> list[str]:
    return ["".join(word) for word in rng.choice(list("abcdefghij"), (words, 4))]


def edited(rng: np.random.Generator, words: list[str], changes: int) -> list[str]:
    words = list(words)
    for at in rng.choice(len(words), changes, replace=False):
        words[at] = "changed"
    return words


def corpus(directory: Path, texts: list[str], shard_rows: int = 40) -> Path:
    pq.write_table(pa.table({"text": texts}), directory / "corpus.parquet", row_group_size=shard_rows)
    return directory / "corpus.parquet"


def curated(directory: Path, path: Path, pool: Callable[[], Pool] = InlinePool, **fields: Any) -> dict[str, Any]:
    """Columns of a run with one fuzzy score, and what the run told."""
    config = {
        "corpus": {"path": str(path), "shard_mb": 1e-6},
        "scores": [{"kind": "fuzzy_duplicates", **fields}],
        "select": {"floors": {"fuzzy_duplicates": 0}, "budget": {"fraction": 1.0}},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(directory / "run"),
    }
    result = curate(config, pool=pool, quiet=True)
    parts = sorted((directory / "run/columns/fuzzy_duplicates").glob("*.parquet"))
    told = json.loads((directory / "run/artifacts/fuzzy_duplicates-groups/groups.json").read_text())
    return {
        "result": result,
        "told": told,
        **pa.concat_tables([pq.read_table(p) for p in parts]).to_pydict(),
    }


def test_planted_copies_are_found_across_shards_and_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.PARTITION_BYTES", 4000)
    rng = np.random.default_rng(0)
    base = [essay(rng) for _ in range(100)]
    copies = [edited(rng, words, 2) for words in base]  # 10 of 296 5-grams differ: Jaccard .93
    order = rng.permutation(200)
    texts = np.array([" ".join(words) for words in base + copies])[order]
    found = curated(tmp_path, corpus(tmp_path, texts.tolist(), 70))
    source = order % 100
    assert found["result"].rows_kept == 100
    assert sorted(source[np.array(found["representative"])]) == list(range(100))
    groups = np.array(found["group"])
    assert all(len(set(groups[source == i])) == 1 for i in range(100))
    assert found["told"]["groups"] == 100
    assert found["result"].reasons == {"kept": 100, "fuzzy_duplicates:fuzzy_duplicate": 100}


def test_a_chain_of_boilerplate_is_one_group_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    words = essay(rng, 4000)
    chain = [" ".join(words[20 * i : 20 * i + 300]) for i in range(150)]  # neighbours: Jaccard .87
    others = [" ".join(essay(rng)) for _ in range(50)]
    found = curated(tmp_path, corpus(tmp_path, others + chain))
    hashes, offsets = shingles(pa.array(chain), 5)
    assert jaccard(hashes, offsets, 0, 1) == pytest.approx(276 / 316)
    assert jaccard(hashes, offsets, 0, 149) < 0.01
    largest = found["told"]["largest"][0]
    assert largest["size"] > 100  # ends that have nothing in common, joined
    assert f"one group holds {largest['size']} of 200 rows" in caplog.text
    assert found["score"][:50] == [0.0] * 50


def test_a_corpus_of_nothing_but_copies(tmp_path: Path) -> None:
    found = curated(tmp_path, corpus(tmp_path, ["one and the same text, again and again"] * 300, 100))
    assert found["result"].rows_kept == 1
    assert set(found["group"]) == {0}


def test_short_texts_are_compared_whole(tmp_path: Path) -> None:
    found = curated(tmp_path, corpus(tmp_path, ["yes", "no", "Yes.", "...", "no", "yes no", "...", "....", "no yes"]))
    assert found["group"] == [0, 1, 0, 3, 1, -1, 3, -1, -1]


def test_the_parts_are_the_same_on_ray(tmp_path: Path, lasting_pool: RayPool) -> None:
    rng = np.random.default_rng(0)
    base = [essay(rng, 60) for _ in range(30)]
    texts = [" ".join(edited(rng, base[i % 30], 1)) for i in range(90)]
    pools: dict[str, Callable[[], Pool]] = {"inline": InlinePool, "ray": lambda: lasting_pool}
    inline, ray = (
        curated(tmp_path / name, corpus_in(tmp_path / name, texts, 40), pool) for name, pool in pools.items()
    )
    assert inline["score"] == ray["score"]
    assert inline["group"] == ray["group"]
    assert inline["told"] == ray["told"]
    assert inline["told"]["groups"] > 5


def corpus_in(directory: Path, texts: list[str], shard_rows: int) -> Path:
    directory.mkdir()
    return corpus(directory, texts, shard_rows)


def test_shards_do_not_matter(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = [essay(rng, 60) for _ in range(20)]
    texts = [" ".join(edited(rng, base[i % 20], 1)) for i in range(60)]
    runs = [curated(tmp_path / str(n), corpus_in(tmp_path / str(n), texts, n)) for n in (7, 60)]
    for name in ("score", "representative", "size", "rule"):
        assert runs[0][name] == runs[1][name]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bands": 20}, "give both, or a preset"),
        ({"bands": 20, "rows": 5, "preset": "dclm"}, "leave out either"),
        ({"preset": "gopher"}, "fineweb"),
        ({"keep": "best"}, "needs `by`"),
        ({"ngram": 0}, "greater than or equal to 1"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        FuzzyDuplicates.model_validate(fields)


def test_shapes_have_columns_of_their_own() -> None:
    given_ = [{}, {"preset": "dclm"}, {"bands": 14, "rows": 8}, {"ngram": 4}, {"seed": 2}]
    columns = [FuzzyDuplicates.model_validate(fields).bands_column for fields in given_]
    assert columns[0].name == columns[2].name
    assert columns[0].identity == columns[2].identity
    assert len({c.name for c in columns}) == 4
