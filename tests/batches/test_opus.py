"""OPUS: utilities beside gradients taken row by row, what optimizers make of them, the draw, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.batches.base import Setup, row_losses, weighted_loss
from pipeline.batches.opus import Opus, adam, chances, draw, muon, muon_rate
from pipeline.errors import ConfigError

GRADIENTS = np.array([[1, 0], [0.9, 0.1], [0, 1]])
PROXY = np.array([1, 0.5])


def utility(preconditioner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    updates = GRADIENTS * preconditioner
    return updates @ PROXY, updates @ updates.T


def test_the_example() -> None:
    aligned, products = utility(np.ones(2))
    np.testing.assert_allclose(aligned, [1, 0.95, 0.5])
    np.testing.assert_allclose(chances(aligned, 0.9), [0.396871, 0.375424, 0.227706], atol=1e-6)
    after = (aligned - products[0])[1:]
    np.testing.assert_allclose(after, [0.05, 0.5])
    np.testing.assert_allclose(chances(after, 0.9), [0.377541, 0.622459], atol=1e-6)
    np.testing.assert_allclose(utility(np.array([0.2, 1]))[0], [0.2, 0.23, 0.5])  # the optimizer reverses the order


def test_draws_are_those_of_the_softmax_one_after_another() -> None:
    aligned, products = utility(np.ones(2))
    rng, rounds = np.random.default_rng(0), 100_000
    drawn = np.array([draw(aligned, products, 2, 0.9, rng) for _ in range(10_000)])
    first = np.bincount([draw(aligned, products, 1, 0.9, rng)[0] for _ in range(rounds)], minlength=3) / rounds
    for found, p in zip(first, [0.396871, 0.375424, 0.227706], strict=True):
        assert abs(found - p) < 3 * math.sqrt(p * (1 - p) / rounds)
    after = drawn[drawn[:, 0] == 0, 1]
    assert abs((after == 2).mean() - 0.622459) < 3 * math.sqrt(0.235 / len(after))


def test_without_redundancy_it_is_gumbel_top_k() -> None:
    """The chance of an ordered pair is p_i p_j / (1 - p_i), for one draw after another and for sorted noise alike."""
    aligned, rounds = np.array([1, 0.2, -0.5, 0.4]), 20_000
    p = chances(aligned, 0.7)
    rng = np.random.default_rng(1)
    ours = np.array([draw(aligned, np.zeros((4, 4)), 2, 0.7, rng) for _ in range(rounds)])
    top = np.argsort(-(aligned / 0.7 + rng.gumbel(size=(rounds, 4))), axis=1)[:, :2]
    for i in range(4):
        for j in {*range(4)} - {i}:
            expected = p[i] * p[j] / (1 - p[i])
            for found in (ours, top):
                share = ((found == [i, j]).all(axis=1)).mean()
                assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / rounds)


def test_the_greedy_choice_and_more_than_there_is() -> None:
    aligned, products = utility(np.ones(2))
    assert draw(aligned, products, 2, 0, np.random.default_rng(0)).tolist() == [0, 2]
    assert sorted(draw(aligned, products, 9, 0.9, np.random.default_rng(0))) == [0, 1, 2]
    assert chances(np.array([800.0, -800.0]), 0.9).tolist() == [1, 0]


def test_what_muon_makes_of_a_gradient() -> None:
    found = muon(torch.diag(torch.tensor([3.0, 4.0])) / 5)
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.988782, 1.220602])), atol=1e-6, rtol=0)
    for adjust in (None, "original", "match_rms_adamw", "spectral_unclamped"):
        weight = torch.nn.Parameter(torch.zeros(6, 2))
        weight.grad = torch.zeros(6, 2)
        weight.grad[0, 0] = 1.0
        optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0, momentum=0, adjust_lr_fn=adjust, ns_steps=1)
        optimizer.step()  # one step of Newton-Schulz is S itself: 3.4445 - 4.7750 + 2.0315 of a gradient of one entry
        assert -float(weight[0, 0].detach()) == pytest.approx(muon_rate(adjust, 6, 2) * 0.701, rel=0.01)


def test_what_adam_makes_of_a_gradient() -> None:
    """P g is what a step has of its gradient, beside momentum: the difference that g makes to an update."""
    betas, moved = (0.8, 0.95), []
    for gradient in (0.0, 1e-4):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=0.1, betas=betas, weight_decay=0)
        for g in (2.0, -1.0, 3.0):
            weight.grad = torch.tensor([g], dtype=torch.float64)
            optimizer.step()
        v, before = optimizer.state[weight]["exp_avg_sq"].clone(), float(weight.detach())
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        moved.append(before - float(weight.detach()))
    # Adam's own step divides by the v that has seen g = 0, ours by the one before: b2 (1 - b2^3) / (1 - b2^4) of it.
    stale = math.sqrt(betas[1] * (1 - betas[1] ** 3) / (1 - betas[1] ** 4))
    expected = float(adam(v, 3, 0.1, betas, 1e-8)) / stale
    assert (moved[1] - moved[0]) / 1e-4 == pytest.approx(expected, rel=1e-3)


def setup(lm: Any, make_batch: Callable[..., Any], kind: str, steps: int = 3) -> Setup:
    matrices = [p for n, p in lm.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in lm.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = {
        "adamw": lambda: [torch.optim.AdamW(lm.parameters(), lr=1e-2)],
        "sgd": lambda: [torch.optim.SGD(lm.parameters(), lr=1e-2)],
        "muon": lambda: [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)],
    }[kind]()
    for step in range(steps):
        weighted_loss(lm, make_batch(8, 10 + step)).backward()
        for optimizer in optimizers:
            optimizer.step()
        lm.zero_grad()
    return Setup(lm, optimizers, make_batch(8, 1))


def updates(lm: Any, found: Setup, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """P g of a layer, from what the optimizer holds."""
    weight = lm.get_submodule(name).weight
    state = found.optimizers[0].state.get(weight, {})
    if "exp_avg_sq" in state:
        return adam(state["exp_avg_sq"], int(state["step"]), 1e-2, (0.9, 0.999), 1e-8) * gradient
    if "momentum_buffer" in state and type(found.optimizers[0]).__name__ == "Muon":
        rate = 1e-2 * math.sqrt(max(1, weight.shape[0] / weight.shape[1])) * (1 - 0.95**2)
        return rate * muon(state["momentum_buffer"]) @ gradient
    return 1e-2 * gradient


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_utilities_are_products_of_gradients_taken_row_by_row(
    lm: Any, make_batch: Callable[..., Any], kind: str
) -> None:
    found, batch = setup(lm, make_batch, kind), make_batch(6, 2)
    operator: Any = Opus(proxy_rows=8, score_tokens=12, sketch=4096).begin(found)  # layers are smaller: no sketch
    before = [p.detach().clone() for p in lm.parameters()]
    aligned, products = operator.utilities(batch)
    assert lm.training
    assert all(p.requires_grad and p.grad is None for p in lm.parameters())
    assert all(torch.equal(p, q) for p, q in zip(lm.parameters(), before, strict=True))

    names = [n for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    weights = [lm.get_submodule(n).weight for n in names]

    def gradients(rows: Any, row: int | None) -> list[torch.Tensor]:
        cut = {n: v[:, :12] if row is None else v[row : row + 1, :12] for n, v in rows.items()}
        return list(torch.autograd.grad(row_losses(lm, cut)[0].mean(), weights))

    target = gradients(found.proxy, None)
    each = [[updates(lm, found, n, g) for n, g in zip(names, gradients(batch, i), strict=True)] for i in range(6)]
    flat = torch.stack([torch.cat([u.flatten() for u in row]) for row in each])
    np.testing.assert_allclose(aligned, flat @ torch.cat([g.flatten() for g in target]), rtol=2e-3, atol=1e-7)
    np.testing.assert_allclose(products, flat @ flat.T, rtol=2e-3, atol=1e-7)


def test_sketches_keep_the_products(lm: Any, make_batch: Callable[..., Any]) -> None:
    found, batch = setup(lm, make_batch, "adamw"), make_batch(6, 2)
    exact, _ = Opus(sketch=4096, proxy_rows=8).begin(found).utilities(batch)  # type: ignore[attr-defined]  # a session of OPUS
    runs = [
        Opus(sketch=128, proxy_rows=8, seed=seed).begin(found).utilities(batch)[0]  # type: ignore[attr-defined]  # a session of OPUS
        for seed in range(30)
    ]
    error = np.abs(np.mean(runs, axis=0) - exact)
    assert (error < 4 * np.std(runs, axis=0) / math.sqrt(len(runs))).all()


def test_it_draws_the_share_after_a_uniform_warm_up_and_resumes(
    lm: Any, make_batch: Callable[..., Any], tmp_path: Path
) -> None:
    found, recipe = setup(lm, make_batch, "adamw"), Opus(rows=0.5, warmup=1)
    first = recipe.begin(found)
    choices = [first(make_batch(12, seed)) for seed in range(3)]
    assert [len(c.rows) for c in choices] == [6, 6, 6]
    assert choices[0].facts["effective"] == 12
    assert 1 < choices[1].facts["effective"] < 12
    second, third = recipe.begin(found), recipe.begin(found)
    second(make_batch(12, 0))
    torch.save(second.state_dict(), tmp_path / "state.pt")
    third.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in (1, 2):
        assert third(make_batch(12, seed)).rows.tolist() == choices[seed].rows.tolist()
    assert len(Opus(rows=1).begin(found)(make_batch(5)).rows) == 5


def test_standardising_makes_the_scale_of_gradients_irrelevant(lm: Any, make_batch: Callable[..., Any]) -> None:
    found, batch = setup(lm, make_batch, "sgd", 0), make_batch(12, 3)
    effective, redundancy = {}, {}
    for standardise in (True, False):
        for lr in (1e-6, 1e-2):
            found.optimizers[0].param_groups[0]["lr"] = lr
            choice = Opus(warmup=0, standardise=standardise).begin(found)(batch)
            effective[standardise, lr] = choice.facts["effective"]
            redundancy[standardise, lr] = choice.facts["redundancy"]
    assert effective[True, 1e-6] == pytest.approx(effective[True, 1e-2], rel=1e-3)
    assert effective[True, 1e-2] < 9.5
    assert redundancy[True, 1e-2] == pytest.approx(1e4 * redundancy[True, 1e-6], rel=1e-3)  # by the same divisor
    assert effective[False, 1e-6] > 11.999  # silently random


def test_a_row_that_is_not_finite_is_never_chosen(lm: Any, make_batch: Callable[..., Any]) -> None:
    found, batch = setup(lm, make_batch, "sgd", 0), make_batch(8, 3)
    batch["input_ids"][batch["input_ids"] == 299] = 1
    batch["input_ids"][2, 1] = 299
    found.proxy["input_ids"][found.proxy["input_ids"] == 299] = 1  # type: ignore[index]  # there is one
    with torch.no_grad():
        lm.lm_head.weight = torch.nn.Parameter(torch.randn(300, 16))
        lm.get_input_embeddings().weight[299] = torch.nan
    choice = Opus(warmup=0, rows=0.9).begin(found)(batch)
    assert choice.rows.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert choice.facts["not_finite"] == 1
    found.proxy["input_ids"][:, 1] = 299  # type: ignore[index]  # there is one
    assert len(Opus(warmup=0).begin(found)(batch).rows) == 0


def test_the_last_layers_alone(lm: Any, make_batch: Callable[..., Any]) -> None:
    found = setup(lm, make_batch, "adamw")
    operator: Any = Opus(last=2).begin(found)
    assert [n.rpartition(".")[2] for n in operator.layers] == ["up_proj", "down_proj"]
    assert "lm_head" in Opus(head=True).begin(found).layers  # type: ignore[attr-defined]  # a session of OPUS
    assert len(operator(make_batch(8)).rows) == 4


def test_errors_at_the_door(lm: Any, make_batch: Callable[..., Any]) -> None:
    optimizer = torch.optim.AdamW(lm.parameters())
    with pytest.raises(ConfigError, match="needs a proxy"):
        Opus().begin(Setup(lm, [optimizer]))
    with pytest.raises(ConfigError, match=r"has 3 rows, 8 are drawn.*proxy_rows"):
        Opus().begin(Setup(lm, [optimizer], make_batch(3)))
    with pytest.raises(ConfigError, match="no optimizer steps some"):
        Opus().begin(Setup(lm, [], make_batch(8)))
    with pytest.raises(ConfigError, match="not of Adagrad"):
        Opus().begin(Setup(lm, [torch.optim.Adagrad(lm.parameters())], make_batch(8)))
    adamax = torch.optim.Adamax(lm.parameters())  # has betas like Adam's, and other moments
    operator = Opus(warmup=0).begin(Setup(lm, [adamax], make_batch(8)))
    weighted_loss(lm, make_batch()).backward()
    adamax.step()
    with pytest.raises(ConfigError, match="not of Adamax"):
        operator(make_batch())
