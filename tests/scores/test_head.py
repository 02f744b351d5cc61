"""The small classifier behind EL2N, GraNd and DEALRec: its passes, its training, its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import ConfigError
from pipeline.recipe import State
from pipeline.scores._head import (
    VECTOR,
    affine,
    classes_of,
    error_norms,
    forward,
    gradient_norms,
    load_heads,
    sampled,
    save_heads,
    train,
)

TOY = [np.float32([[2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])]
A = np.float32([[1, 2, 2]])


def test_toy_of_three_classes() -> None:
    """Logits (2, 1, 0), label 1, last-layer input (1, 2, 2)."""
    one = np.array([1])
    np.testing.assert_allclose(forward(TOY, A).p, [[0.665241, 0.244728, 0.090031]], atol=1e-6)
    np.testing.assert_allclose(error_norms(TOY, A, one), [1.010488], atol=1e-6)
    np.testing.assert_allclose(gradient_norms(TOY, A, one, only_last=True), [3.195443], atol=1e-6)
    without_bias = np.sqrt(gradient_norms(TOY, A, one, True) ** 2 - error_norms(TOY, A, one) ** 2)
    np.testing.assert_allclose(without_bias, [3.031464], atol=1e-5)


def test_a_label_that_was_never_seen_is_one_without_a_chance() -> None:
    p = forward(TOY, A).p
    np.testing.assert_allclose(error_norms(TOY, A, np.array([-1])), np.sqrt((p**2).sum() + 1), rtol=1e-6)


@pytest.mark.parametrize("hidden", [0, 7])
def test_gradient_norms_are_those_of_autograd(hidden: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 5)).astype(np.float32), rng.integers(0, 3, 9)
    layers = train(x, y, 3, hidden, 3, seed=0)
    found = {last: gradient_norms(layers, x, y, last) for last in (True, False)}
    for i in range(len(x)):
        weights = [torch.from_numpy(w).requires_grad_() for w in layers]
        a = torch.from_numpy(x[i])
        for w in weights[:-1]:
            a = torch.relu(w[:, :-1] @ a + w[:, -1])
        logits = weights[-1][:, :-1] @ a + weights[-1][:, -1]
        torch.nn.functional.cross_entropy(logits[None], torch.tensor(y[i : i + 1])).backward()
        squares = [float(w.grad.square().sum()) for w in weights]
        assert found[True][i] == pytest.approx(np.sqrt(squares[-1]), rel=1e-4)
        assert found[False][i] == pytest.approx(np.sqrt(sum(squares)), rel=1e-4)


def test_training_is_a_function_of_rows_and_seed_and_learns() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 20)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(int)  # a straight line does not part these
    right = {h: (forward(train(x, y, 2, h, 30, seed=0), x).p.argmax(axis=1) == y).mean() for h in (0, 32)}
    assert right[0] < 0.7
    assert right[32] > 0.95
    for one, other in zip(train(x, y, 2, 8, 1, seed=3), train(x, y, 2, 8, 1, seed=3), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(train(x, y, 2, 8, 1, seed=4)[0] - train(x, y, 2, 8, 1, seed=3)[0]).max() > 0.1


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((301, 33)).astype(np.float32), rng.integers(0, 4, 301)
    layers = train(x, y, 4, 16, 1, seed=0)
    whole = gradient_norms(layers, x, y, False)
    pieces = [gradient_norms(layers, x[i : i + 7], y[i : i + 7], False) for i in range(0, 301, 7)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))
    weight = layers[0]
    np.testing.assert_allclose(affine(weight, x), x @ weight[:, :-1].T + weight[:, -1], atol=1e-4)


def test_heads_and_labels_come_back_as_they_were(tmp_path: Path) -> None:
    heads = [[np.float32([[i, 2]]), np.float32([[3, i]])] for i in range(12)]
    save_heads(heads, ["a", "b"], tmp_path)
    found, names = load_heads(tmp_path)
    assert names == ["a", "b"]
    assert [[w.tolist() for w in h] for h in found] == [[w.tolist() for w in h] for h in heads]


@pytest.mark.parametrize(
    "labels",
    [pa.array(["1", "7", "9"]), pa.array([1, 7, 9]), pa.array(["1", "7", "9"]).dictionary_encode()],
    ids=["texts", "numbers", "dictionary"],
)
def test_labels_of_any_type_find_their_class(labels: pa.Array) -> None:
    assert classes_of(labels, ["1", "9"]).tolist() == [0, -1, 1]


@pytest.mark.parametrize("labels", [np.zeros(50, int), np.arange(10) % 2])
def test_one_label_or_few_rows_are_an_error_that_counts_them(labels: np.ndarray) -> None:
    state: State = {"corpus.y": labels, VECTOR: np.zeros((len(labels), 2), np.float16)}
    with pytest.raises(ConfigError, match=f"{len(labels)} rows with {len(set(labels.tolist()))} labels are too few"):
        sampled(state, "corpus.y", "el2n.label")
    with pytest.raises(ConfigError, match="0 rows with 0 labels"):
        sampled({}, "corpus.y", "el2n.label")
