"""The quality-quantity trade-off: the law's numbers, the optimum that widens with compute, the fit, the budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import curate
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.scores._proxy import bigram_loss
from pipeline.select.compute import Law, Measured, betr_percent, choose, fit_law, tokens_seen

E = 12.8e6
TOY = {"scale": 0.01, "floor": 0.1}


def law(utility: tuple[float, ...] = (-0.18,), half_life: float = 2.0, **more: Any) -> Law:
    return Law.model_validate(TOY | {"utility": utility, "half_life": half_life} | more)


def test_one_bucket_with_and_without_decay() -> None:
    decayed = [law().error(k * E - 1, [E]) for k in (1, 2, 4, 10)]
    assert decayed == pytest.approx([1.056538, 0.975765, 0.929064, 0.909728], abs=1e-6)
    endless = [law(half_life=math.inf).error(k * E - 1, [E]) for k in (1, 2, 4, 10)]
    assert endless == pytest.approx([1.056538, 0.944339, 0.845300, 0.731978], abs=1e-6)


@pytest.mark.parametrize(("half_life", "limit"), [(1, 0.9126), (2, 0.8452), (5, 0.7452)])
def test_repeats_cannot_replace_data(half_life: float, limit: float) -> None:
    one = law(half_life=half_life)
    assert (one.error(1e9 * E, [E]) - 0.1) / (one.error(E, [E]) - 0.1) == pytest.approx(limit, abs=1e-4)


FOUR = (-0.18, -0.16, -0.14, -0.12)


@pytest.mark.parametrize(
    ("seen", "best", "error"),
    [(12e6, 1, 1.06771), (32e6, 2, 0.92555), (64e6, 3, 0.84969), (128e6, 3, 0.78558), (640e6, 4, 0.69447)],
)
def test_the_best_pool_widens_with_compute(seen: float, best: int, error: float) -> None:
    params = 1e6
    choice = choose(law(FOUR), 6 * params * seen, params, 10 * E)
    assert choice.seen == pytest.approx(seen)
    assert choice.best.buckets == best
    assert choice.best.error == pytest.approx(error, abs=1e-5)
    assert choice.best.fraction == pytest.approx(0.1 * best)
    assert choice.best.epochs == pytest.approx(seen / (best * E))
    assert choice.best.tokens == best * E
    if seen == 12e6:
        assert choice.curve[1].error == pytest.approx(1.06948, abs=1e-5)


@settings(max_examples=50)
@given(st.integers(1, 5), st.floats(1, 10), st.floats(-0.4, -0.01), st.floats(0.2, 40))
def test_equal_buckets_are_one_of_their_size_with_a_longer_half_life(
    p: int, tau: float, b: float, epochs: float
) -> None:
    mixture = law((b,) * p, tau).error(epochs * p * E, [E] * p)
    assert mixture == pytest.approx(law((b,), p * tau).error(epochs * p * E, [p * E]))
    halves = law((b, b), tau).error(epochs * E, [E / 4, 3 * E / 4])  # unequal ones: each counts by its share
    assert halves >= law((b,), 4 * tau).error(epochs * E, [E]) - 1e-12


@settings(max_examples=50)
@given(st.lists(st.floats(-0.4, -0.01), min_size=1, max_size=4), st.floats(0.5, 20), st.floats(1e-3, 1e4))
def test_more_tokens_never_raise_the_error(utility: list[float], tau: float, epochs: float) -> None:
    one = law(tuple(utility), tau)
    sizes = [E] * len(utility)
    assert one.error(1.1 * epochs * E, sizes) <= one.error(epochs * E, sizes) * (1 + 1e-12)  # flat, but for rounding


def errors(true: Law, bucket: int, noise: float = 0.0) -> Measured:
    single = law((true.utility[bucket],), true.half_life[bucket], scale=true.scale)
    seen = E * np.array([2, 4, 6, 8, 10])
    exact = np.array([single.error(n, [E]) for n in seen])
    return Measured(seen, exact * (1 + noise * np.random.default_rng(bucket).standard_normal(5)))


def test_measured_models_want_wider_pools_with_more_to_read() -> None:
    """The headline in spirit: four buckets of 40 texts in a made-up language, of which 0, 5, 10 and 20 % of the words
    are noise; a bigram model reads n texts of the best p buckets (all of them where they have fewer)."""
    bucket, held_out = 40, 160 + np.arange(200)
    losses = np.zeros((3, 4))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        following = rng.integers(0, 200, (200, 2))

        def texts(rows: int, noise: float, rng: Any = rng, following: Any = following) -> Any:
            at, out = rng.integers(0, 200, rows), []
            for _ in range(20):
                out.append(np.where(rng.random(rows) < noise, rng.integers(0, 200, rows), at))
                at = following[at, (rng.random(rows) < 0.3).astype(int)]
            return np.stack(out, axis=1)

        words = np.concatenate([*(texts(bucket, noise) for noise in (0, 0.05, 0.1, 0.2)), texts(200, 0)]).ravel()
        bits = bigram_loss(words, np.arange(0, len(words) + 1, 20), 200)
        for i, seen in enumerate((10, 80, 160)):
            pools = ([b * bucket + np.arange(min(bucket, seen // p)) for b in range(p)] for p in range(1, 5))
            losses[i] += [bits(np.concatenate(pool), held_out) / 4 for pool in pools]
    assert (1 + losses.argmin(axis=1)).tolist() == [1, 2, 3]


def test_a_fit_recovers_what_made_the_errors() -> None:
    true = law((-0.18, -0.15, -0.11), (2.0, 4.0, 6.5), scale=0.007)  # type: ignore[arg-type]  # one of each
    for noise, b_off, tau_off in ((0.0, 0.01, 0.3), (1e-4, 0.01, 0.3)):
        found = fit_law([errors(true, i, noise) for i in range(3)], E, 0.1)
        assert found.utility == pytest.approx(true.utility, abs=b_off)
        assert found.half_life == pytest.approx(true.half_life, abs=tau_off)
        assert found.shares == (0.1,) * 3
        assert not found.notes
    assert fit_law([Measured(m.seen[:2], m.error[:2]) for m in [errors(true, 0)]], E, 0.1, half_life=2).buckets == 1


def test_what_a_fit_cannot_tell_is_said() -> None:
    flat = Measured(E * np.array([1.0, 2, 3]), np.array([0.9, 0.95, 0.9]))
    true = law((-0.18, -0.1), (2.0, 40.0))  # type: ignore[arg-type]  # as many half-lives as utilities
    found = fit_law([errors(true, 0), flat, errors(true, 0)], E, 0.1)
    assert found.buckets == 1
    assert "bucket 2 does not fall" in found.notes[0]
    assert any("bucket 2 was not identified" in n for n in fit_law([errors(true, 0), errors(true, 1)], E, 0.1).notes)
    for measured, options, message in (
        ([flat], {}, "the error of the best bucket does not fall"),
        ([errors(true, 0)], {"floor": 2.0}, "not above the floor"),
        ([Measured(flat.seen[:2], flat.error[:2])], {}, "three are needed"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_law(measured, E, 0.1, **options)


def test_betrs_rule() -> None:
    percents = [betr_percent(10.0**e) for e in (20, 21, 22, 23, 24)]
    assert percents == pytest.approx([4.0, 7.1, 12.6, 22.5, 40.0], abs=0.05)
    assert betr_percent(1e30) == 100
    assert tokens_seen(6e21, 1e9) == 1e12


def configuration(corpus: Path, run: Path, budget: dict[str, Any]) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "id": "id"},
        "scores": ["length"],
        "select": {"budget": budget},
        "handoff": {"calibration_rows": 2, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(run),
    }


LAW = TOY | {"utility": [-0.18, -0.16, -0.14], "half_life": 2, "share": 0.2, "scale": 90.0}


def test_a_budget_of_compute_keeps_more_for_more_compute(write_corpus: Callable[..., Path], tmp_path: Path) -> None:
    corpus = write_corpus(files=2, rows=200)
    kept, path = [], tmp_path / "law.json"
    path.write_text(json.dumps(LAW))
    for i, compute in enumerate((8e6, 2e7, 2e9)):
        budget = {"compute": compute, "params": 1000, "law": str(path) if i else LAW}
        result = curate(configuration(corpus, tmp_path / f"run{i}", budget), quiet=True)
        stored = json.loads((tmp_path / f"run{i}" / "artifacts" / "selection" / "selection.json").read_text())
        training = json.loads((tmp_path / f"run{i}" / "handoff.json").read_text())["training"]
        assert training == stored["training"]
        assert training["tokens_to_see"] == round(compute / 6000)
        total = stored["available"]
        assert stored["budget"] == int(training["fraction"] * total + 1e-6)
        assert training["epochs"] == pytest.approx(training["tokens_to_see"] / (training["fraction"] * total), rel=1e-3)
        assert result.tokens_kept <= stored["budget"] < result.tokens_kept + stored["next_row"]
        assert any("BETR" in note for note in stored["notes"])
        kept.append(training["buckets"])
        rows = pq.read_table(result.path).num_rows
        assert rows == result.rows_kept
    assert kept[0] < kept[-1]
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"compute": 1e20}, "needs `params` and either `law`"),
        ({"params": 1e9, "rows": 5}, "belong to `compute`"),
        ({"compute": 1e20, "params": 1e9, "law": LAW, "rows": 5}, "exactly one"),
        ({"compute": 1e20, "params": 1e9, "law": LAW | {"utility": [0.1]}}, "not below 0"),
        ({"compute": 1e20, "params": 1e9, "law": LAW | {"share": 0.5}}, "more than there are"),
        ({"compute": 1e20, "params": 1e9, "law": LAW | {"half_life": [1, 2]}}, "give one or as many"),
        ({"compute": 1e20, "params": 1e9, "law": LAW | {"half_life": 0}}, "not above 0"),
        ({"compute": -1, "params": 1e9, "law": LAW}, "greater than 0"),
        ({"compute": 1e20, "params": 1e9, "law": LAW, "proxies": {"target": "x"}}, "needs `params` and either `law`"),
        ({"compute": 1e20, "params": 1e9, "proxies": {"target": "x", "share": 0.5}}, "more than there is"),
        ({"compute": 1e20, "params": 1e9, "proxies": {"target": "x", "epochs": [1, 2]}}, "three errors a bucket"),
        ({"compute": 1e20, "params": 1e9, "law": "nowhere.json"}, "cannot be read as a law"),
    ],
)
def test_what_is_no_budget_of_compute_is_refused(budget: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(configuration(tmp_path, tmp_path / "run", budget))


def test_where_the_law_turns_around_is_said() -> None:
    """Below 1e5 / scale tokens the power of less than one gives the bucket of least utility the least error."""
    choice = choose(law(FOUR), 6e9, 1e3, 10 * E)
    assert [p.error for p in choice.curve] == sorted((p.error for p in choice.curve), reverse=True)
    assert any("no meaning below" in note for note in choice.notes)
    assert not any("no meaning below" in note for note in choose(law(FOUR), 6e3 * 20e6, 1e3, 10 * E).notes)


def test_a_corpus_too_small_for_the_buckets_is_refused() -> None:
    with pytest.raises(ConfigError, match="a bucket would hold"):
        choose(law(share=0.01), 1e12, 1e3, 50)
