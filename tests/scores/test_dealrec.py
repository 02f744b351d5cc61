"""DEALRec: its inverse, its influence, its strata as turns, and the published direction that comes to nothing."""

from __future__ import annotations

import json
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
from pipeline.engine.pool import InlinePool
from pipeline.errors import TamisError
from pipeline.hashing import hash64, row_keys
from pipeline.scores._dealrec import (
    BINS,
    PRUNED,
    binned,
    clipped,
    kept_bins,
    lissa,
    minmax,
    strata_of,
    turns_of,
)
from pipeline.scores._head import forward, softmax, train
from pipeline.scores.dealrec import Dealrec, softmax_product

ROWS = 500


def test_lissa_in_one_dimension() -> None:
    h, scale = lissa(np.ones(1), lambda h, step: 2 * h, damping=0.01, scale=25, steps=5000)
    assert h[0] == pytest.approx(1 / (0.01 + 2 / 25)) == pytest.approx(25 / 2.25) == pytest.approx(11.1111, abs=1e-4)
    assert scale == 25


def test_lissa_doubles_the_scale_until_it_holds() -> None:
    """With an eigenvalue of 300, the steps blow up at scale 25, 50 and 100; |1 + ... - 300 / 200| < 1 holds."""
    h, scale = lissa(np.ones(2), lambda h, step: np.array([300.0, 1]) * h, damping=0.01, scale=25, steps=3000)
    assert scale == 200
    np.testing.assert_allclose(h, 1 / (0.01 + np.array([300, 1]) / 200), rtol=1e-6)
    with pytest.raises(TamisError, match="diverges at any scale"):
        lissa(np.ones(1), lambda h, step: h * np.nan, 0.01, 25, 10)


def test_products_with_the_hessian_are_those_of_autograd() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    weight, h = rng.standard_normal((2, 3, 5))
    x = np.append(rng.standard_normal(4), 1.0)

    def loss(w: Any) -> Any:
        return torch.nn.functional.cross_entropy((w @ torch.from_numpy(x))[None], torch.tensor([1]))

    _, expected = torch.autograd.functional.hvp(loss, torch.from_numpy(weight), torch.from_numpy(h))
    np.testing.assert_allclose(softmax_product(weight, x, h), expected.numpy(), rtol=1e-9, atol=1e-12)


def test_influence_on_least_squares_is_nil_with_the_training_gradient_and_right_with_a_validation_gradient() -> None:
    """The published v, the mean training gradient, vanishes at the optimum, and every score with it (section 8)."""
    x, y = np.array([[1.0, t] for t in range(4)]), np.array([0.0, 1, 1, 3])
    w = np.linalg.solve(x.T @ x, x.T @ y)
    np.testing.assert_allclose(w, [-0.1, 0.9], atol=1e-12)
    gradients = -(y - x @ w)[:, None] * x

    def influence(v: np.ndarray) -> np.ndarray:
        h, scale = lissa(v, lambda h, step: x.T @ (x @ h), damping=1e-4, scale=25, steps=4000)
        return np.asarray(gradients @ h / scale)

    assert np.abs(influence(gradients.mean(axis=0))).max() < 1e-12
    query = np.array([1.0, 4.0])  # the gradient of the prediction there
    found = influence(query)
    np.testing.assert_allclose(found, [0.05, 0, 0.35, -0.40], atol=2e-3)
    refits = [np.linalg.lstsq(np.delete(x, i, 0), np.delete(y, i), rcond=None)[0] @ query for i in range(4)]
    moved = query @ w - refits  # a row that lowers the loss by `query` lowers the prediction
    np.testing.assert_allclose(moved, [-0.166667, 0, -0.5, 1.333333], atol=1e-6)
    leverage = np.array([0.7, 0.3, 0.3, 0.7])
    np.testing.assert_allclose(-found / (1 - leverage), moved, atol=8e-3)
    assert (np.argsort(-found) == np.argsort(moved)).all()


def quota(sizes: list[int], rows: int) -> list[int]:
    """The paper's loop: the stratum with the fewest rows gets an equal share of what is left, or all it has."""
    left, given = rows, [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    for n, i in enumerate(order):
        given[i] = min(sizes[i], left // (len(sizes) - n))
        left -= given[i]
    return given


def drawn(sizes: list[int], rows: int) -> list[int]:
    stratum = np.repeat(np.arange(len(sizes)), sizes)
    rank = np.concatenate([np.arange(n) for n in sizes]) if sum(sizes) else np.zeros(0, int)
    turns = turns_of(rank, stratum, np.array(sizes))
    assert sorted(turns) == list(range(sum(sizes)))
    return np.bincount(stratum[turns < rows], minlength=len(sizes)).tolist()


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [
        ([5, 40, 200, 700], 100, [5, 31, 32, 32]),
        ([0, 3, 3, 30], 10, [0, 3, 3, 4]),
        ([4, 5, 6], 2, [0, 1, 1]),  # fewer than strata: nothing for the first
    ],
)
def test_toy_of_the_strata(sizes: list[int], rows: int, expected: list[int]) -> None:
    assert quota(sizes, rows) == expected
    assert drawn(sizes, rows) == expected


@settings(max_examples=60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=7), st.floats(0, 1))
def test_the_first_turns_are_the_papers_draw_at_any_budget(sizes: list[int], share: float) -> None:
    rows = round(share * sum(sizes))
    assert sum(quota(sizes, rows)) == rows
    assert drawn(sizes, rows) == quota(sizes, rows)


def test_a_constant_counts_nothing() -> None:
    assert minmax(np.float32([3, 3]), 3, 3).tolist() == [0, 0]
    assert minmax(np.float32([1, 2, 3, 9]), 1, 3).tolist() == [0, 0.5, 1, 1]


def test_strata_reach_from_the_least_to_the_largest_value() -> None:
    value = np.array([0.0, 0.3, 0.749, 1.5])
    bins = binned(value, 1.5)
    assert bins.tolist() == [0, 13107, 32724, BINS - 1]
    rows = np.bincount(bins, minlength=BINS)
    assert kept_bins(rows, 0) == (0, BINS - 1)
    assert strata_of(bins, 0, BINS - 1, 2).tolist() == [0, 0, 0, 1]
    first, last = kept_bins(rows, 0.25)
    assert (first, last) == (0, 32724)
    assert strata_of(bins, first, last, 3).tolist() == [0, 1, 2, 3]  # the last one is pruned
    assert kept_bins(np.eye(1, BINS, 5, dtype=int)[0], 0.5) == (5, 5)  # all alike: none is harder than the rest
    assert strata_of(np.array([5, 5]), 5, 5, 25).tolist() == [0, 0]


def test_clipping_leaves_out_the_tails() -> None:
    values = np.append(np.linspace(0, 1, 1000), 1000.0)
    rows = np.bincount(binned(minmax(values, 0, 1000), 1), minlength=BINS)
    low, high = clipped(rows, (0.0, 1000.0), 0.01)
    assert low == 0
    assert high == pytest.approx(0.99, abs=2 * 1000 / BINS)


def labelled(directory: Path, group: int = 125) -> Path:
    rng = np.random.default_rng(0)
    y = np.arange(ROWS) % 3
    x = rng.standard_normal((ROWS, 6)) * 0.3 + np.eye(6)[y]
    label = np.where(rng.random(ROWS) < 0.1, (y + 1) % 3, y)
    table = pa.table({"text": [f"text {i}" for i in range(ROWS)], "vector": list(x), "label": label})
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, directory / "corpus.parquet", row_group_size=group)
    return directory / "corpus.parquet"


def run_dealrec(directory: Path, corpus: Path, rows: int = 100, **score: Any) -> dict[str, np.ndarray]:
    """Columns of a whole job by name and field, and `keep`."""
    config = {
        "corpus": {"path": str(corpus), "shard_mb": 1e-6},
        "embed": {"kind": "precomputed", "column": "vector"},
        "scores": [{"kind": "dealrec", "label": "label", "strata": 8, "sample": 500, "epochs": 40} | score],
        "select": {"budget": {"rows": rows}},
        "engine": {"address": "inline"},
        "run": str(directory / "run"),
    }
    assert curate(config, pool=InlinePool, quiet=True).rows_kept == rows
    columns = {}
    for name in ("dealrec", "dealrec-parts", "dealrec-places", "select"):
        parts = sorted((directory / f"run/columns/{name}").iterdir())
        table = pa.concat_tables([pq.read_table(part) for part in parts])
        columns |= {f: table[f].to_numpy() for f in table.schema.names}
    return columns


def test_a_budget_is_the_stratified_draw(tmp_path: Path) -> None:
    found = run_dealrec(tmp_path, labelled(tmp_path))
    pruned = found["rule"] == PRUNED
    assert 0 < pruned.sum() <= 50
    assert found["value"][pruned].min() >= found["value"][~pruned].max()
    assert sorted(-found["score"]) == list(range(ROWS))
    assert found["score"][pruned].max() < found["score"][~pruned].min()
    sizes = np.bincount(found["stratum"][~pruned], minlength=8).tolist()
    assert np.bincount(found["stratum"][found["keep"]], minlength=8).tolist() == quota(sizes, 100)
    least, width = found["value"][~pruned].min(), np.ptp(found["value"][~pruned]) / 8
    edges = (found["value"][~pruned] - least) / width - found["stratum"][~pruned]
    assert edges.min() > -1e-2
    assert edges.max() < 1 + 1e-2


def test_shards_change_nothing_and_another_seed_draws_others(tmp_path: Path) -> None:
    one = run_dealrec(tmp_path / "one", labelled(tmp_path / "one"))
    other = run_dealrec(tmp_path / "other", labelled(tmp_path / "other", group=61))
    np.testing.assert_array_equal(one["score"], other["score"])
    again = run_dealrec(tmp_path / "again", tmp_path / "one/corpus.parquet", seed=5)
    assert (one["keep"] != again["keep"]).any()


def test_influence_is_that_of_the_whole_hessian(tmp_path: Path) -> None:
    corpus = labelled(tmp_path)
    found = run_dealrec(tmp_path, corpus, scale=4)
    artifact = tmp_path / "run/artifacts/dealrec-surrogate"
    facts = json.loads((artifact / "surrogate.json").read_text())
    assert (facts["rows"], facts["held_out"], facts["scale"]) == (500, 100, 4)
    assert facts["accuracy"] > 0.7
    weight = np.load(artifact / "heads.npz")["0.0"].astype(float)
    table = pq.read_table(corpus)
    x = np.stack(table["vector"].to_numpy())
    x = np.c_[x / np.linalg.norm(x, axis=1, keepdims=True), np.ones(ROWS)]
    delta = softmax(x @ weight.T) - np.eye(3)[table["label"].to_numpy()]
    gradients = (delta[:, :, None] * x[:, None, :]).reshape(ROWS, -1)
    order = np.argsort(hash64(row_keys(table["text"].combine_chunks()), 0))  # the sample's: a fifth is held out
    basis = np.eye(weight.size).reshape(-1, *weight.shape)
    train_rows = x[order[100:]]
    hessian = np.array(
        [np.mean([softmax_product(weight, row, e).ravel() for row in train_rows], axis=0) for e in basis]
    )
    h = np.linalg.solve(0.01 * np.eye(weight.size) + hessian / 4, gradients[order[:100]].mean(axis=0))
    assert np.corrcoef(found["influence"], gradients @ h)[0, 1] > 0.97
    np.testing.assert_allclose(found["effort"], np.linalg.norm(gradients, axis=1), rtol=5e-3)


def test_the_training_direction_dwindles_as_the_surrogate_converges(tmp_path: Path) -> None:
    corpus = labelled(tmp_path)
    sizes = {}
    for v, epochs in (("train", 3), ("train", 300), ("validation", 300)):
        run_dealrec(tmp_path / f"{v}{epochs}", corpus, v=v, epochs=epochs, steps=100)
        facts = tmp_path / f"{v}{epochs}/run/artifacts/dealrec-surrogate/surrogate.json"
        sizes[v, epochs] = json.loads(facts.read_text())["v"]
    assert sizes["train", 300] < 0.05 * sizes["train", 3]
    assert sizes["validation", 300] > 3 * sizes["train", 300]


def test_with_a_model_the_effort_is_its_gradient(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tiny_lm import TINY, sentences

    from pipeline.models.causal import load_causal
    from pipeline.models.training import new_lm, save_lm, train_tokenizer

    texts = [*sentences(58, seed=1), "a", "elm"]
    tokenizer = train_tokenizer(texts, TINY.vocab)
    save_lm(new_lm(TINY, 0), tokenizer, tmp_path / "lm")
    rng = np.random.default_rng(0)
    label = np.arange(60) % 2
    vectors = list(rng.standard_normal((60, 4)) + 3 * np.eye(4)[label])
    pq.write_table(pa.table({"text": texts, "vector": vectors, "label": label}), tmp_path / "corpus.parquet")
    found = run_dealrec(tmp_path, tmp_path / "corpus.parquet", 20, model=str(tmp_path / "lm"), max_tokens=32)

    model, _ = load_causal(tmp_path / "lm")
    value = model.model.layers[-1].self_attn.v_proj.weight
    for i in (0, 17, 58):
        ids = torch.tensor([tokenizer.encode(texts[i]).ids[:32]])
        model.zero_grad()
        if ids.shape[1] > 1:
            model(input_ids=ids, labels=ids).loss.backward()
        expected = 0.0 if ids.shape[1] == 1 else float(value.grad.norm())
        assert found["effort"][i] == pytest.approx(expected, rel=1e-4)
    assert found["effort"][58] == 0  # one token


def test_clipping_keeps_outliers_from_emptying_the_strata(tmp_path: Path) -> None:
    corpus = labelled(tmp_path)
    filled = [
        np.bincount(run_dealrec(tmp_path / str(clip), corpus, clip=clip, strata=40)["stratum"], minlength=40).min()
        for clip in (0, 0.2)
    ]
    assert filled[0] == 0
    assert filled[1] > 0


def test_strata_teach_no_less_than_random_and_more_than_the_top(tmp_path: Path) -> None:
    """Near copies and wrong labels, 5 % of the rows, a small model trained on them: in the spirit of the paper."""
    rng = np.random.default_rng(1)
    rows, classes = 2000, 5
    y = rng.integers(0, classes, rows)
    centres = rng.standard_normal((classes, 16))
    x = centres[y] + rng.standard_normal((rows, 16)) * 0.9
    copies = rng.choice(rows, rows // 5, replace=False)
    x[copies], y[copies] = x[0] + 0.01 * rng.standard_normal((len(copies), 16)), y[0]
    label = np.where(rng.random(rows) < 0.1, rng.integers(0, classes, rows), y)
    table = pa.table({"text": [f"text {i}" for i in range(rows)], "vector": list(x), "label": label})
    pq.write_table(table, tmp_path / "corpus.parquet")
    found = run_dealrec(tmp_path, tmp_path / "corpus.parquet", 100, strata=25, sample=2000)
    y_new = rng.integers(0, classes, 3000)
    new = centres[y_new] + rng.standard_normal((3000, 16)) * 0.9
    unit = [(v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in (x, new)]

    def accuracy(kept: np.ndarray) -> float:
        runs = [train(unit[0][kept], label[kept], classes, 0, 60, seed) for seed in range(3)]
        return float(np.mean([(forward(layers, unit[1]).p.argmax(axis=1) == y_new).mean() for layers in runs]))

    strata = accuracy(np.flatnonzero(found["keep"]))
    top = accuracy(np.argsort(found["value"])[-100:])
    draws = [accuracy(rng.choice(rows, 100, replace=False)) for _ in range(5)]
    assert strata > np.mean(draws) - 0.02
    assert strata > top


@pytest.mark.parametrize(
    ("fields", "says"),
    [({}, "label"), ({"label": "y", "clip": 0.5}, "less than 0.5"), ({"label": "y", "model": "nowhere"}, "no folder")],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Dealrec.model_validate(fields)
