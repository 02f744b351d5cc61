"""Ignore-top-k: the example's numbers, its counts, optimizers that it hangs on; measured priming."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.base import Operator, Setup, weighted_loss
from pipeline.batches.ignore_top_k import IgnoreTopK, keyword_logp, priming
from pipeline.errors import ConfigError


def updated(update: list[float], share: float) -> list[float]:
    """What is left of an update, by a step of SGD."""
    weight = torch.nn.Parameter(torch.full((len(update),), 8.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    operator = IgnoreTopK(share=share).begin(Setup(torch.nn.Module(), [optimizer]))
    weight.grad = -torch.tensor(update)
    optimizer.step()
    operator.close()
    return (weight.detach() - 8).tolist()


def test_the_example() -> None:
    assert updated([1, -5, 0.5, 3, -0.2], 0.4) == pytest.approx([1, 0, 0.5, 0, -0.2])
    assert updated([1, -5, 0.5, 3, -0.2], 0) == pytest.approx([1, -5, 0.5, 3, -0.2])


@settings(max_examples=40)
@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 99))
def test_so_many_entries_are_dropped(size: int, share: float, seed: int) -> None:
    update = np.random.default_rng(seed).permutation(size) + 1.0  # no ties
    left = np.array(updated(update.tolist(), share))
    assert (left == 0).sum() == math.floor(share * size + 1e-9)
    assert left.max(initial=0) <= update[left == 0].min(initial=np.inf)


def test_ties_are_kept() -> None:
    assert updated([2.0] * 10, 0.5) == [2.0] * 10
    assert updated([0.0] * 9 + [1.0], 0.1) == [0.0] * 10


def train(lm: Any, batch: Any, share: float, closed: bool = False) -> list[float]:
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
    operator = IgnoreTopK(share=share).begin(Setup(lm, [optimizer]))
    if closed:
        operator.close()
    for _ in range(2):
        weighted_loss(lm, operator(batch).of(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [operator(batch).facts["dropped"], weighted_loss(lm, batch).item()]


def test_it_thins_out_the_steps_of_adam(lm: Any, make_batch: Callable[..., Any]) -> None:
    import copy

    batch = make_batch()
    dropped, loss = train(copy.deepcopy(lm), batch, 0.08)
    assert dropped == pytest.approx(0.08, abs=0.005)
    none, plain = train(copy.deepcopy(lm), batch, 0.0)
    assert (none, plain) == (0, train(copy.deepcopy(lm), batch, 0.5, closed=True)[1])
    assert loss > plain


def test_entries_of_all_optimizers_are_counted() -> None:
    weights = [torch.nn.Parameter(torch.zeros(10)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    operator = IgnoreTopK(share=0.2).begin(Setup(torch.nn.Module(), optimizers))
    for weight, update in zip(weights, (torch.arange(10.0), torch.ones(10)), strict=True):
        weight.grad = update
    for optimizer in optimizers:
        optimizer.step()
    batch = {"labels": torch.zeros(1, dtype=torch.int64)}
    assert [operator(batch).facts["dropped"] for _ in range(2)] == [0.1, 0]  # 2 of 20, and nothing since


def test_the_line_of_a_large_tensor_is_drawn_from_a_sample() -> None:
    def operator() -> Any:
        return IgnoreTopK(share=0.08, sample=2000).begin(Setup(torch.nn.Module(), [torch.optim.SGD([weight])]))

    weight = torch.nn.Parameter(torch.zeros(1))
    update = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    first = operator()
    share = float(first.largest(update).float().mean())
    assert share == pytest.approx(0.08, abs=4 * math.sqrt(0.08 * 0.92 / 2000))
    second: Operator = operator()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.largest(update), second.largest(update))


def test_it_needs_optimizers(lm: Any) -> None:
    with pytest.raises(ConfigError, match="needs the optimizers"):
        IgnoreTopK().begin(Setup(lm))


def test_priming_by_either_mean() -> None:
    arithmetic, geometric = priming(np.log([0.01, 0.01, 0.01]), np.log([0.2, 0.03, 0.005]))
    assert (arithmetic, geometric) == pytest.approx((7.833, 3.107), abs=1e-3)
    assert priming(np.array([-27.6]), np.array([-20.7])) == pytest.approx((1, 1), abs=0.02)  # 1e-12 to 1e-9: nothing


def test_the_probability_of_a_keyword_is_the_product_over_its_tokens(lm: Any) -> None:
    context, keyword = [5, 9, 2], [7, 8]
    with torch.no_grad():
        lm.lm_head.weight.mul_(20)
        logp = lm.eval()(input_ids=torch.tensor([[*context, *keyword]])).logits[0].log_softmax(-1)
    expected = float(logp[2, 7] + logp[3, 8])
    assert keyword_logp(lm, [context, context[1:]], keyword)[0] == pytest.approx(expected, abs=1e-5)
