"""LSA on real and on awkward texts, through the engine in process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer

from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.embed.lsa import Lsa, projection, word_counts
from pipeline.engine.pool import InlinePool, Pool
from pipeline.run import Run
from pipeline.words import hashed_words

TOPICS = {
    "sea": "ship sail harbour wave captain anchor storm deck sailor coast",
    "court": "judge law trial witness court verdict lawyer evidence jury appeal",
    "kitchen": "flour butter oven bake sugar recipe dough salt pan knead",
}


def topical(count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts of 30 words of one topic each, and their topics."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, len(TOPICS), count)
    words = [t.split() for t in TOPICS.values()]
    return [" ".join(rng.choice(words[t], 30)) + f" number{i}" for i, t in enumerate(topic)], topic


def embedded(
    directory: Path,
    texts: list[Any],
    shard_mb: float = 1,
    files: int = 2,
    pool: Callable[[], Pool] = InlinePool,
    **fields: Any,
) -> pa.Table:
    """`vector` and, where rows were refused, `reason` by shard row, of every text in order."""
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(np.array_split(np.arange(len(texts)), files)):
        column = pa.array([texts[j] for j in part], pa.string())
        pq.write_table(pa.table({"text": column}), corpus / f"{i:04d}.parquet", row_group_size=50)
    config = {"corpus": {"path": str(corpus), "shard_mb": shard_mb}, "embed": {"kind": "lsa", **fields}}
    config |= {"scores": ["density"], "select": {"budget": {"rows": 1}}, "run": str(directory / "run")}
    config |= {"engine": {"address": "inline", "max_bad_fraction": 1}}
    with Run(parse(config), pool, quiet=True) as run:
        run.materialize([row_column(False, None)])
        recipe = run.config.embed
        assert isinstance(recipe, Lsa)
        recipe.fit(run)
        run.materialize([recipe.column(run)])
    parts = sorted((directory / "run/columns/embed").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(p) for p in parts])


def vectors(table: pa.Table) -> np.ndarray:
    """(n, d) float32 of a table without nulls."""
    return np.array(table["vector"].to_pylist(), np.float32)


def reasons(directory: Path) -> dict[str, int]:
    found = [pq.read_table(p)["reason"].to_pylist() for p in (directory / "run/quarantine/embed").glob("*.parquet")]
    flat = [r for part in found for r in part]
    return {reason: flat.count(reason) for reason in flat}


def test_texts_of_one_topic_are_near(tmp_path: Path) -> None:
    texts, topic = topical(300)
    table = embedded(tmp_path, texts, dims=16)
    assert table.schema.field("vector").type == pa.list_(pa.float16(), 16)
    x = vectors(table)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=2e-3)
    same = topic[:, None] == topic
    cosine = x @ x.T
    assert cosine[same].mean() > 0.9
    assert np.abs(cosine[~same]).mean() < 0.1


def test_at_full_rank_the_cosine_is_that_of_scikit_learns_tfidf() -> None:
    texts = pa.array(topical(20)[0])
    counts = word_counts(texts, 1 << 16, 1000)
    words, offsets = hashed_words(texts, 1 << 16, 1000)
    plain = csr_matrix((np.ones(len(words)), words, offsets), shape=counts.shape)
    plain.sum_duplicates()
    tfidf = TfidfTransformer(sublinear_tf=True, smooth_idf=True).fit_transform(plain).toarray()
    x = counts @ projection(counts, 32, 0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(x @ x.T, tfidf @ tfidf.T, atol=1e-5)


def test_dimensions_beyond_the_rank_are_zero() -> None:
    counts = word_counts(pa.array(["a b", "b a", "A, b!", "c d", "d c"]), 1 << 10, 100)
    weights = projection(counts, 4, 0)
    assert weights[:, :2].any(axis=0).all()
    assert not weights[:, 2:].any()


def test_shards_do_not_matter(tmp_path: Path) -> None:
    texts, _ = topical(300)
    one = embedded(tmp_path / "a", texts, files=1, sample=100)
    many = embedded(tmp_path / "b", texts, files=5, shard_mb=0.001, sample=100)
    assert len(list((tmp_path / "b/run/columns/embed").glob("*.parquet"))) > 1
    assert one.combine_chunks().equals(many.combine_chunks())


def test_ray_and_inline_agree_to_the_byte(tmp_path: Path, lasting_pool: Pool) -> None:
    texts, _ = topical(300)
    inline = embedded(tmp_path / "inline", texts, files=3, shard_mb=0.001, sample=100)
    assert inline.equals(
        embedded(tmp_path / "ray", texts, files=3, shard_mb=0.001, sample=100, pool=lambda: lasting_pool)
    )


def test_seed_changes_the_sample(tmp_path: Path) -> None:
    texts, _ = topical(200)
    a, b = (vectors(embedded(tmp_path / str(s), texts, sample=50, seed=s)) for s in (0, 1))
    assert not np.array_equal(a, b)


def test_fewer_rows_than_dims_leaves_zeros_behind_the_rank(tmp_path: Path) -> None:
    x = vectors(embedded(tmp_path, ["one two three", "two three four", "five six seven"], files=1, dims=32))
    assert x.shape == (3, 32)
    assert not x[:, 3:].any()
    assert x[0] @ x[1] > 0.4
    assert abs(x[0] @ x[2]) < 1e-3


def test_one_row_and_identical_rows(tmp_path: Path) -> None:
    alone = vectors(embedded(tmp_path / "one", ["only row"], files=1))
    assert np.flatnonzero(alone[0]).tolist() == [0]
    same = vectors(embedded(tmp_path / "same", ["the same row again"] * 120))
    assert (same == same[0]).all()
    np.testing.assert_allclose(np.linalg.norm(same[0]), 1, atol=1e-3)


def test_rows_without_words_are_quarantined_with_the_reason(tmp_path: Path) -> None:
    texts, _ = topical(40)
    late = "! " * 200 + "word"
    table = embedded(tmp_path, [*texts, "...!?", None, late], max_chars=300)
    assert table["vector"].is_null().to_pylist() == [False] * 40 + [True] * 3
    assert reasons(tmp_path) == {
        "no word in the first 300 characters": 2
    }  # the null text is the row column's to report


def test_words_that_the_sample_does_not_know_have_no_direction(tmp_path: Path) -> None:
    texts, _ = topical(400)
    table = embedded(tmp_path, [*texts, "unheard syllables"], sample=20, features=1 << 20, dims=4, seed=1)
    assert reasons(tmp_path) == {"no word in common with the sample": 1}
    assert table["vector"].null_count == 1


def test_scripts_without_spaces_find_each_other(tmp_path: Path) -> None:
    texts = ["我喜欢吃苹果和香蕉", "他喜欢吃香蕉和苹果", "สวัสดีครับคุณสบายดีไหม", "คุณสบายดีไหมครับ", "plain english words"]
    x = vectors(embedded(tmp_path, texts, dims=8))
    cosine = x @ x.T
    assert cosine[0, 1] > 0.7
    assert cosine[2, 3] > 0.7
    assert abs(cosine[0, 2]) < 0.05


def test_a_value_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    texts, _ = topical(30)
    whole = embedded(tmp_path / "a", texts, files=1)
    apart = embedded(tmp_path / "b", texts, files=30, shard_mb=1e-6)
    assert whole["vector"].combine_chunks().equals(apart["vector"].combine_chunks())


@pytest.mark.slow
def test_sources_of_a_real_corpus_are_near(tmp_path: Path, shared_data: Path) -> None:
    rows = pq.read_table(shared_data / "text_corpus/parts").slice(0, 6000)
    x = vectors(embedded(tmp_path, rows["text"].to_pylist()))
    source = np.array(rows["source"].to_pylist())
    nearest = (x[5000:] @ x[:5000].T).argmax(axis=1)
    assert (source[:5000][nearest] == source[5000:]).mean() > 0.85
