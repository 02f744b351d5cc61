"""Loss rescaling: the example's numbers, flipped labels found, what is left as it was, resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches.base import WEIGHTS, Setup, row_losses, weighted_loss
from pipeline.batches.noisy_loss_rescaling import (
    FEATURES,
    NoisyLossRescaling,
    Rows,
    divergence,
    features,
    overlap,
    renormalisation,
)
from pipeline.errors import ConfigError

WORDS, ROWS, BATCH = 12, 600, 40


class Classifier(torch.nn.Module):
    """Two classes of bags of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop = torch.nn.Embedding(200, 16), torch.nn.Dropout(0.3)
        self.hidden, self.out = torch.nn.Linear(16, 32), torch.nn.Linear(32, 2)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        hidden = torch.relu(self.hidden(self.drop(self.words(input_ids).mean(1))))
        return SimpleNamespace(logits=self.out(self.drop(hidden)))


def corpus(rows: int, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Words of two topics among common ones, labels, and which of these were flipped."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 2, rows)
    own = rng.integers(0, 40, (rows, WORDS)) + 40 * topic[:, None]
    words = np.where(rng.random((rows, WORDS)) < 0.3, own, rng.integers(80, 200, (rows, WORDS)))
    flipped = rng.random(rows) < noise
    return torch.tensor(words), torch.tensor(np.where(flipped, 1 - topic, topic)), flipped


def train(noise: float, recipe: NoisyLossRescaling | None, epochs: int = 7) -> tuple[float, float, Classifier]:
    """Accuracy on clean rows, AUC of the weights for rows that were not flipped, and the model."""
    words, labels, flipped = corpus(ROWS, 0, noise)
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    operator: Any = recipe.begin(Setup(model, [optimizer])) if recipe else None
    order, total = np.random.default_rng(0), np.zeros(ROWS)
    for epoch in range(epochs):
        for rows in np.split(order.permutation(ROWS), ROWS // BATCH):
            batch = {"input_ids": words[rows], "labels": labels[rows]}
            if operator is not None:
                batch = operator(batch).of(batch)
                if epoch >= epochs // 2:
                    total[rows] += operator.weights.numpy()
            weighted_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    unseen, right, _ = corpus(2000, 1, 0)
    accuracy = (model(unseen).logits.argmax(1) == right).float().mean().item()
    clean, dirty = total[~flipped], total[flipped]
    auc = float((clean[:, None] > dirty).mean()) if len(dirty) else math.nan
    return accuracy, auc, model


def test_flipped_labels_count_less_and_the_model_is_better_for_it() -> None:
    accuracy, auc, _ = train(0.3, NoisyLossRescaling(classes=2))
    plain, _, _ = train(0.3, None)
    assert auc > 0.85
    assert accuracy > plain + 0.02


def test_clean_labels_lose_little() -> None:
    accuracy, _, _ = train(0, NoisyLossRescaling(classes=2, warmup=30))
    plain, _, _ = train(0, None)
    assert accuracy > plain - 0.02


def test_simulating_is_plain_training_to_the_bit() -> None:
    (_, _, simulated), (_, _, plain) = (
        train(0.3, r, 1) for r in (NoisyLossRescaling(classes=2, simulate_only=True), None)
    )
    for p, q in zip(simulated.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_renormalisation_of_the_example() -> None:
    loss, weights = torch.tensor([0.2, 0.5, 3, 0.3]), torch.tensor([0.9, 0.8, 0.1, 0.9])
    factor = renormalisation(loss, weights)
    assert float(factor) == pytest.approx(3.478261, abs=1e-6)
    expected = torch.tensor([0.626087, 1.391304, 1.043478, 0.939130])
    torch.testing.assert_close(loss * weights * factor, expected, atol=1e-6, rtol=0)
    assert float((loss * weights * factor).sum()) == pytest.approx(4)
    assert float(renormalisation(loss, torch.zeros(4))) == 1


@given(st.floats(0.01, 1), st.integers(2, 20), st.integers(0, 99))
def test_equal_weights_change_nothing(c: float, size: int, seed: int) -> None:
    loss = torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.01
    torch.testing.assert_close(loss * c * renormalisation(loss, torch.full((size,), c)), loss)


def test_divergence_and_overlap_of_the_example() -> None:
    zero, half, one = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert float(divergence(one, half, zero, one)) == pytest.approx(0.818147, abs=1e-6)
    assert float(divergence(zero, one, one, half)) == pytest.approx(2.806853, abs=1e-6)
    assert float(overlap(zero, one, one, one)) == pytest.approx(0.617075, abs=1e-6)
    assert float(divergence(one, zero, one, one)) == float(overlap(one, one, one, zero)) == 0


@given(*[st.floats(-3, 3), st.floats(0.05, 3)] * 2)
def test_overlap_is_the_integral_of_the_smaller_density(m1: float, s1: float, m2: float, s2: float) -> None:
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    pdf = [torch.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi)) for m, s in ((m1, s1), (m2, s2))]
    expected = float(torch.minimum(*pdf).sum() * 1e-3)
    found = overlap(*torch.tensor([m1, s1, m2, s2], dtype=torch.float64))
    assert float(found) == pytest.approx(expected, abs=2e-4)


def test_features_of_rows_beside_their_categories() -> None:
    def rows(loss: list[float], agrees: list[bool], kind: list[int]) -> Rows:
        n = len(loss)
        return Rows(torch.tensor(loss), torch.full((n,), 0.5), torch.full((n,), 0.6), torch.full((n,), 0.1),
                    torch.tensor(agrees), torch.tensor(kind))  # fmt: skip

    found = features(rows([1.0, 2.0, 4.0], [True, True, True], [0, 0, 1]), rows([1.0, 2.0, 4.0], [True] * 3, [0, 0, 1]))
    assert found.shape == (3, FEATURES)
    assert found.isfinite().all()
    loss_std = np.std([1, 2, 4])
    np.testing.assert_allclose(found[:, 0], [1, 2, 4])
    np.testing.assert_allclose(found[:, 12:14], [[7 / 3, loss_std]] * 3, rtol=1e-6)  # of all rows
    np.testing.assert_allclose(found[:, 16:18], [[1.5, 0.5], [1.5, 0.5], [4, 0]], rtol=1e-6)  # of their class
    assert found[:, 8:10].tolist() == [[0, 0]] * 3  # no row disagrees
    assert found[:, -1].tolist() == [1, 1, 1]

    own = rows([1.0, 2.0, 4.0], [True, False, False], [0, 0, 1])
    found = features(own, own)
    np.testing.assert_allclose(found[:, 14:16], [[1, 0], [3, 1], [3, 1]])  # of their side of agreement
    kl = divergence(own.loss, own.loss_std, torch.tensor(7 / 3), torch.tensor(loss_std, dtype=torch.float32))
    torch.testing.assert_close(found[:, 4], kl.log1p())  # of the row from the category, not the other way
    assert found[:, 6].tolist() == [0, 0, 0]  # one row that agrees has no deviation
    assert (found[:, 8] > 0).all()


def test_weights_leave_the_loss_of_a_batch_as_it_was_and_categories_span_the_window() -> None:
    words, labels, _ = corpus(60, 0, 0.3)
    model = Classifier().eval()  # no dropout: the losses are those that the operator sees
    operator: Any = NoisyLossRescaling(classes=2, window=2).begin(Setup(model))
    for part in (slice(0, 20), slice(20, 40), slice(40, 60)):
        batch = {"input_ids": words[part], "labels": labels[part]}
        choice, loss = operator(batch), row_losses(model, batch)[0].detach()
        torch.testing.assert_close((choice.weights * loss).sum(), loss.sum())
        assert abs(float(choice.weights.mean() - operator.weights.mean())) > 0.1
    assert [len(rows.loss) for rows in operator.recent] == [20, 20]


def test_a_row_alone_of_its_class_counts_half_and_a_broken_one_is_dropped() -> None:
    words, labels, _ = corpus(20, 0, 0)
    labels[:] = 0
    labels[4] = 1
    words[7] = 199
    model = Classifier()
    with torch.no_grad():
        model.words.weight[199] = torch.nan
    words[[i for i in range(20) if i != 7]] = words[[i for i in range(20) if i != 7]].clamp(max=198)
    operator: Any = NoisyLossRescaling(classes=2).begin(Setup(model))
    for _ in range(2):
        choice = operator({"input_ids": words, "labels": labels})
    assert choice.facts["not_finite"] == 1
    assert choice.rows.tolist() == [i for i in range(20) if i != 7]
    assert float(operator.weights[4]) == 0.5
    assert operator.weights.std() > 0.1
    with pytest.raises(ConfigError, match="needs 2 rows"):
        operator({"input_ids": words[:1], "labels": labels[:1]})


def test_a_batch_of_broken_rows_is_no_step_and_the_next_one_goes_on(lm: Any, make_batch: Callable[..., Any]) -> None:
    operator: Any = NoisyLossRescaling().begin(Setup(lm))
    operator(make_batch())
    with torch.no_grad():
        before = lm.lm_head.weight.clone()
        lm.lm_head.weight.fill_(torch.nan)
        choice = operator(make_batch(12, 1))
        assert len(choice.rows) == len(choice.weights) == len(operator.weights) == 0
        assert choice.facts == {"not_finite": 12}
        lm.lm_head.weight.copy_(before)
    assert operator(make_batch(12, 2)).weights.isfinite().all()


def test_the_network_learns_through_the_virtual_step() -> None:
    """What it minimises, beside a step that is taken for real, and that its gradient knows of that step."""
    words, labels, _ = corpus(40, 0, 0.3)
    model = Classifier().eval()
    operator: Any = NoisyLossRescaling(virtual_lr=0.7).begin(Setup(model))
    known = torch.randn(20, FEATURES, generator=torch.Generator().manual_seed(0))
    kind = torch.zeros(20, dtype=torch.long)
    first, second = ({"input_ids": words[i : i + 20], "labels": labels[i : i + 20]} for i in (0, 20))
    operator.meta = {"batch": second, "features": known.flip(0), "kind": kind}

    moved, weights = copy.deepcopy(model), operator._weigh(known, kind).detach()
    loss = row_losses(moved, first)[0]
    (loss * weights * renormalisation(loss.detach(), weights)).mean().backward()
    torch.optim.SGD(moved.parameters(), lr=0.7).step()
    expected = (row_losses(moved, second)[0].detach() * operator._weigh(known.flip(0), kind)).mean()
    found = operator._later(first, known, kind)
    torch.testing.assert_close(found, expected)
    assert abs(found - (row_losses(model, second)[0] * operator._weigh(known.flip(0), kind)).mean()) > 1e-4

    whole, beside = (torch.autograd.grad(x, operator.networks[0][3].weight)[0] for x in (found, expected))
    assert (whole - beside).abs().max() > 1e-3 * beside.abs().max()


def test_thresholds_make_weights_of_0_and_1_that_still_learn() -> None:
    words, labels, _ = corpus(40, 0, 0.3)
    operator: Any = NoisyLossRescaling(classes=2, threshold=0.5).begin(Setup(Classifier()))
    before = copy.deepcopy(operator.networks.state_dict())
    for _ in range(2):
        operator({"input_ids": words, "labels": labels})
    assert set(operator.weights.tolist()) == {0.0, 1.0}
    assert any(not torch.equal(v, before[n]) for n, v in operator.networks.state_dict().items())


def test_a_language_model_and_going_on_from_a_state(lm: Any, make_batch: Callable[..., Any], tmp_path: Path) -> None:
    first, recipe = [], NoisyLossRescaling(window=2, warmup=1)
    operator = recipe.begin(Setup(lm))
    for seed in range(5):
        if seed == 3:
            torch.save(operator.state_dict(), tmp_path / "state.pt")
        batch = make_batch(12, seed)
        first.append(operator(batch).of(batch)[WEIGHTS])
    assert first[0].tolist() == [1.0] * 12
    again = recipe.begin(Setup(lm))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in (3, 4):
        assert torch.equal(again(make_batch(12, seed)).weights, first[seed])
