"""Taylor: its four forms by hand, against the loss that zeroing a unit costs, and with objectives other than a loss."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, get_args

import numpy as np
import pytest

from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import Calibration, token_loss
from pipeline.compress.importance._loraprune import averaged, estimated_gradient, saliency
from pipeline.compress.importance.taylor import Disturbed, Order, Taylor, distance, max_logit, salience
from pipeline.compress.surgery import zero
from pipeline.errors import ConfigError
from tests.compress.conftest import Tiny, make_tiny

torch = pytest.importorskip("torch")


def test_the_four_forms_by_hand() -> None:
    w = torch.tensor([[1, -2], [0.5, 1]])
    g = torch.tensor([[0.1, 0.2], [-0.4, 0.3]])
    f = torch.tensor([[0.02, 0.05], [0.2, 0.1]])
    expected = {"first": (0.5, 0.5), "second": (0.22, 0.15), "mixed": (0.59, 0.475), "vector": (0.3, 0.1)}
    for order in get_args(Order):
        assert salience(order, w, g, f).sum(1).abs().tolist() == pytest.approx(expected[order])


def gradients(tiny: Tiny, loss: Any, row: int | None = None) -> dict[str, Any]:
    batch = tiny.batch if row is None else {n: v[row : row + 1] for n, v in tiny.batch.items()}
    tiny.model.zero_grad()
    loss(tiny.model, batch).mean().backward()
    return {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_scores_sum_over_all_weights_of_a_unit(name: str, order: Order) -> None:
    tiny = make_tiny(name)
    body = anatomy(tiny.model)
    groups = body.units("kv_group", "neuron", "hidden")
    g = gradients(tiny, token_loss)
    rows = [gradients(tiny, token_loss, row) for row in range(3)]
    scores = Taylor(order=order).scores(body, groups, Calibration(tiny.model, [tiny.batch], token_loss))
    weights = dict(tiny.model.named_parameters())
    for units, found in zip(groups, scores, strict=True):
        for unit in (0, units.count - 1):
            without = deepcopy(tiny.model)
            zero(without, [units], {units.name: np.array([unit])})
            total = 0.0
            for n, p in without.named_parameters():
                of_unit = (p == 0) & (weights[n] != 0)
                f = sum(row[n].square() for row in rows) / 3
                total += float(salience(order, weights[n].detach(), g[n], f)[of_unit].sum())
            assert found[unit] == pytest.approx(abs(total), rel=1e-3)


def test_vector_is_the_change_of_the_loss_for_a_small_step(tiny_trained: Any) -> None:
    """What the name promises: the derivative of the loss along the unit's weights shrinking to zero."""
    model, _, blocks = tiny_trained
    model = model.double()
    body = anatomy(model)
    groups = body.units("kv_group", "neuron")
    calibration = Calibration.of_blocks(model, blocks[:8])
    found = Taylor(order="vector").scores(body, groups, calibration)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for units, scores in zip(groups, found, strict=True):
        without = deepcopy(model)
        zero(without, [units], {units.name: np.array([1])})
        losses = []
        with torch.no_grad():
            for step in (-0.01, 0.01):
                for n, p in model.named_parameters():
                    p.copy_(before[n] + step * (dict(without.named_parameters())[n] - before[n]))
                losses.append(float(token_loss(model, calibration.batches[0]).mean()))
                for n, p in model.named_parameters():
                    p.copy_(before[n])
        assert scores[1] == pytest.approx(abs(losses[1] - losses[0]) / 0.02, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("kinds", [("query_head", "neuron"), ("hidden",)])
def test_other_units(kinds: Any) -> None:
    tiny = make_tiny("qwen3")
    body = anatomy(tiny.model)
    for units, scores in zip(
        body.units(*kinds),
        Taylor().scores(body, body.units(*kinds), Calibration(tiny.model, [tiny.batch])),
        strict=True,
    ):
        assert scores.shape == (units.count,)
        assert (scores > 0).all()


def test_max_logit_is_the_mean_over_the_vocabulary_of_the_largest_over_positions() -> None:
    tiny = make_tiny("llama")
    logits = tiny.output()
    expected = logits.amax(1).mean(1)
    torch.testing.assert_close(max_logit(tiny.model, tiny.batch).detach(), expected)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[:, 9:] = 0
    torch.testing.assert_close(
        max_logit(tiny.model, tiny.batch | {"attention_mask": mask}).detach(), logits[:, :9].amax(1).mean(1)
    )
    body = anatomy(tiny.model)
    groups = body.units("neuron")
    calibration = Calibration(tiny.model, [tiny.batch])
    by_loss, by_logit = (
        Taylor.model_validate({"objective": o}).scores(body, groups, calibration) for o in ("loss", "max_logit")
    )
    assert not np.allclose(by_loss[0] / by_loss[0].sum(), by_logit[0] / by_logit[0].sum(), rtol=0.1)


def test_a_disturbed_teacher_gives_gradients_where_an_undisturbed_one_gives_none() -> None:
    w, x = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2)
    for noise, gradient in ((0.0, [0, 0]), (0.1, [-0.2, -0.2])):
        (given,) = torch.autograd.grad(distance((w @ x).view(1, 1), torch.full((1, 1), noise)).sum(), w)
        assert given.tolist() == pytest.approx(gradient)
        assert (w * given).abs().tolist() == pytest.approx([-g * v for g, v in zip(gradient, (1, 2), strict=True)])


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_disturbed_needs_no_labels_and_does_not_depend_on_batches(name: str) -> None:
    tiny = make_tiny(name)
    body = anatomy(tiny.model)
    groups = body.units("kv_group", "neuron")
    single = [{n: v[i : i + 1] for n, v in tiny.batch.items()} for i in range(3)]
    taylor = Taylor(objective="disturbed")
    whole, parts, again = (
        t.scores(body, groups, Calibration(tiny.model, batches))
        for t, batches in (
            (taylor, [tiny.batch]),
            (taylor, single),
            (Taylor(objective="disturbed", seed=1), [tiny.batch]),
        )
    )
    for a, b, c in zip(whole, parts, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
        assert (a > 0).all()
        assert not np.allclose(a, c, rtol=1e-3)


def test_noise_belongs_to_the_row() -> None:
    tiny = make_tiny("bert")
    both = Disturbed(0.01, 0)(tiny.model, tiny.batch)
    alone = Disturbed(0.01, 0)(tiny.model, {"input_ids": tiny.batch["input_ids"][1:2]})
    torch.testing.assert_close(both[1:2], alone)
    assert both.tolist() == pytest.approx([1e-4] * 3, rel=0.2)  # the noise's variance


def test_max_logit_needs_logits() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    calibration = Calibration(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    body = anatomy(model)
    with pytest.raises(ConfigError, match="max_logit needs a model that makes logits"):
        Taylor(objective="max_logit").scores(body, body.units("neuron"), calibration)
    assert (Taylor(objective="disturbed").scores(body, body.units("neuron"), calibration)[0] > 0).all()


def test_loraprune_by_hand() -> None:
    a, b = torch.tensor([[0.2, -0.4]]), torch.tensor([[1.0], [0.5]])
    w, g = torch.tensor([[1.0, 2], [-1, 0.5]]), torch.tensor([[0.3, 0.1], [-0.2, 0.4]])
    grad_a, grad_b = b.T @ g, g @ a.T
    assert grad_a.tolist() == [pytest.approx([0.2, 0.3])]
    assert grad_b[:, 0].tolist() == pytest.approx([0.02, -0.2])
    estimate = estimated_gradient(a, b, grad_a, grad_b)
    np.testing.assert_allclose(estimate, [[0.2, 0.286], [0.1, 0.29]], rtol=1e-5)
    np.testing.assert_allclose(saliency(w, a, b, grad_a, grad_b), [[0.24, 0.4576], [0.09, 0.087]], rtol=1e-5)
    np.testing.assert_allclose((g * (w + b @ a)).abs(), [[0.36, 0.16], [0.18, 0.12]], rtol=1e-5)  # the truth


def test_loraprune_averages_finite_scores() -> None:
    first = averaged(None, torch.tensor([3.0, 4.0]))
    assert first is not None
    assert first.tolist() == pytest.approx([0.6, 0.8])
    second = averaged(first, torch.tensor([0.0, 2.0]))
    assert second is not None
    assert second.tolist() == pytest.approx([0.54, 0.82])
    assert averaged(second, torch.tensor([float("nan"), 1.0])) is second
    assert averaged(second, torch.zeros(2)) is second
