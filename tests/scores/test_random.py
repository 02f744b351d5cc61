"""Random: the draw depends on (seed, row) alone, and is a draw."""

import itertools
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hashing import hash64, row_keys
from pipeline.scores.random import Random

N = 20_000
KEYS = row_keys(pa.array([f"row {i}" for i in range(N)]))


def scores(recipe: Random, keys: pa.Array = KEYS, tokens: np.ndarray | None = None, run_seed: int = 0) -> np.ndarray:
    column = recipe.column(SimpleNamespace(seed=run_seed))
    values = {"row.key": keys} | ({} if tokens is None else {"row.tokens": pa.array(tokens)})
    out = column.open()(pa.record_batch([values[name] for name in column.inputs], list(column.inputs)))
    assert out.schema == column.fields
    assert out.schema.field("score").type == pa.float32()
    return out["score"].to_numpy()


def test_score_is_the_hash_of_seed_and_row_as_a_fraction_of_two_to_the_64() -> None:
    expected = hash64(KEYS, 7).astype(np.float64) / 2.0**64
    np.testing.assert_allclose(scores(Random(seed=7)), expected, rtol=1e-6)
    assert scores(Random()).min() >= 0
    assert scores(Random()).max() <= 1


def test_without_a_seed_of_its_own_it_takes_the_runs() -> None:
    assert (scores(Random(seed=5)) == scores(Random(), run_seed=5)).all()
    assert (scores(Random(seed=5), run_seed=9) == scores(Random(), run_seed=5)).all()
    column = Random().column
    assert column(SimpleNamespace(seed=1)).identity != column(SimpleNamespace(seed=2)).identity


@given(st.lists(st.integers(1, N - 1), max_size=8))
def test_no_row_depends_on_the_rows_beside_it(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), N]
    parts = [scores(Random(), KEYS.slice(a, b - a)) for a, b in itertools.pairwise(bounds)]
    assert (np.concatenate(parts) == scores(Random())).all()


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_two_seeds_overlap_as_independent_draws_do(fraction: float) -> None:
    kept = [set(np.argsort(scores(Random(seed=s)))[-int(fraction * N) :]) for s in (1, 2)]
    # Hypergeometric: both draws have exactly f*n of n rows.
    sigma = np.sqrt(N * fraction**2 * (1 - fraction) ** 2)
    assert abs(len(kept[0] & kept[1]) - fraction**2 * N) < 3 * sigma


def test_by_tokens_the_first_row_is_drawn_in_proportion_to_its_tokens() -> None:
    """The largest u ** (1 / w) is the Gumbel maximum in other words: P(first = i) = w_i / sum."""
    tokens = np.array([1, 2, 3, 10])
    races = 8000
    first = np.zeros(4)
    for race in range(races):
        keys = row_keys(pa.array([f"{race} {i}" for i in range(4)]))
        first[np.argmax(scores(Random(weight="tokens"), keys, tokens))] += 1
    share = tokens / tokens.sum()
    assert (abs(first / races - share) < 3 * np.sqrt(share * (1 - share) / races)).all()


def test_by_tokens_equal_rows_have_equal_chances_and_no_score_is_infinite() -> None:
    by_tokens = scores(Random(weight="tokens"), tokens=np.full(N, 8))
    assert set(np.argsort(by_tokens)[-2000:]) == set(np.argsort(scores(Random()))[-2000:])
    assert np.isfinite(scores(Random(weight="tokens"), tokens=np.zeros(N, np.int64))).all()
