"""Compensations: exact where they should be, and nothing changes where nothing goes."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import Calibration
from pipeline.compress.compensation.base import Compensation
from pipeline.compress.compensation.bias import Bias
from pipeline.compress.compensation.head_residual import HeadResidual, pairs
from pipeline.compress.compensation.refit import Refit
from pipeline.compress.compensation.scalar import Scalar
from pipeline.compress.importance.minitron import Minitron
from pipeline.compress.surgery import zero
from pipeline.errors import ConfigError
from tests.compress.conftest import make_tiny

torch = pytest.importorskip("torch")
from tests.compress.toy_layer import toy  # noqa: E402 - needs torch

ALL: list[Compensation] = [Bias(), Refit(), Scalar()]


@pytest.mark.parametrize(("ridge", "factor"), [(0.0, 2.0), (0.01, 1 + 1 / 1.01)])
def test_one_of_two_equal_inputs_takes_over(ridge: float, factor: float) -> None:
    x = np.random.default_rng(0).standard_normal((20, 1)).repeat(2, axis=1)
    body, groups, calibration = toy([[1.0, 1.0]], x)
    Scalar(ridge=ridge).apply(body, groups, {"0.neuron": np.array([1])}, calibration)
    assert calibration.model.consumer.weight.tolist() == [pytest.approx([factor, 1])]


def test_factors_are_clipped() -> None:
    x = np.random.default_rng(0).standard_normal((20, 1)).repeat(3, axis=1) * [1, 1, -1]
    for weight, expected in (([1.0, 9, 0], [2, 9, 0]), ([1.0, 0, 9], [0, 0, 9])):
        body, groups, calibration = toy([weight], x)
        Scalar(ridge=0.01).apply(body, groups, {"0.neuron": np.array([1, 2])}, calibration)
        assert calibration.model.consumer.weight.tolist() == [pytest.approx(expected)]
    body, groups, calibration = toy([[1.0, 9, 0]], x)
    Scalar(ridge=0, limit=20).apply(body, groups, {"0.neuron": np.array([1, 2])}, calibration)
    assert calibration.model.consumer.weight.tolist() == [pytest.approx([10, 9, 0])]


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_each_leaves_less_error_than_none_and_refit_the_least(n: int, remove: int, seed: int) -> None:
    remove = min(remove, n - 1)
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(
        (rng.standard_normal((6 * n, n)) @ rng.standard_normal((n, n)) + rng.random(n)).astype(np.float32)
    )
    weight = rng.standard_normal((4, n)).astype(np.float32)
    gone = np.sort(rng.permutation(n)[:remove])

    def error(compensation: Compensation | None) -> float:
        body, groups, calibration = toy(weight.tolist(), x)
        dense = x @ torch.from_numpy(weight).T
        if compensation:
            compensation.apply(body, groups, {"0.neuron": gone}, calibration)
        calibration.model.consumer.weight.data[:, gone] = 0
        return float((calibration.model(x) - dense).square().sum().detach())

    nothing = error(None)
    refit = error(Refit(damping=1e-6))
    assert error(Bias()) <= nothing * 1.001
    assert refit <= nothing * 1.001
    assert refit <= error(Scalar(ridge=1e-6, limit=1e6)) * 1.01 + 1e-3 * nothing


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(1, 7), st.sampled_from([0.0, 0.01, 1.0]), st.integers(0, 2**32 - 1))
def test_factors_are_those_of_ridge_regression(n: int, remove: int, ridge: float, seed: int) -> None:
    remove = min(remove, n - 1)
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((6 * n, n)) + 1).astype(np.float32)
    weight = rng.standard_normal((4, n)).astype(np.float32)
    gone = np.sort(rng.permutation(n)[:remove])
    kept = np.setdiff1d(np.arange(n), gone)
    body, groups, calibration = toy(weight.tolist(), x)
    Scalar(ridge=ridge).apply(body, groups, {"0.neuron": gone}, calibration)
    each = np.einsum("tj,oj->toj", x.astype(np.float64), weight).reshape(-1, n)  # what every column puts out
    pull = np.sqrt(ridge * np.mean((each[:, kept] ** 2).sum(0)))
    rows = np.concatenate([each[:, kept], pull * np.eye(len(kept))])
    target = np.concatenate([each.sum(1), pull * np.ones(len(kept))])
    factors = np.linalg.lstsq(rows, target, rcond=None)[0].clip(0, 2)
    found = calibration.model.consumer.weight.detach().numpy()
    np.testing.assert_allclose(found[:, kept], weight[:, kept] * factors, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compensation", [*ALL, HeadResidual()], ids=lambda c: c.kind)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_nothing_removed_changes_nothing(name: str, compensation: Compensation) -> None:
    tiny = make_tiny(name)
    body = anatomy(tiny.model)
    groups = body.units("query_head" if name == "llama" else "kv_group", "neuron")
    before = deepcopy(tiny.model.state_dict())
    compensation.apply(body, groups, {}, Calibration(tiny.model, [tiny.batch]))
    after = tiny.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("compensation", ALL, ids=lambda c: c.kind)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "bert", "vit"])
def test_consumers_come_closer_to_what_they_gave(name: str, compensation: Compensation) -> None:
    """Of every architecture, on its own calibration data, layer by layer: the first consumer that loses units."""
    errors = []
    for healer in (None, compensation):
        tiny = make_tiny(name)
        body = anatomy(tiny.model)
        groups = body.units("kv_group", "neuron")
        found = {}
        for units in groups[:2]:
            seen: list[torch.Tensor] = []
            handle = tiny.model.get_submodule(units.consumer).register_forward_hook(
                lambda m, i, out, s=seen: s.append(out)
            )
            tiny.output()
            removal = {units.name: np.arange(units.count // 3 + 1)}
            calibration = Calibration(tiny.model, [tiny.batch])
            healed = deepcopy(tiny.model.state_dict())
            if healer:
                healer.apply(body, [units], removal, calibration)
            zero(tiny.model, [units], removal)
            tiny.output()
            handle.remove()
            found[units.kind] = float((seen[-1] - seen[0]).square().sum())
            owner = tiny.model.get_submodule(units.consumer)
            if f"{units.consumer}.bias" not in healed:
                owner.bias = None
            tiny.model.load_state_dict(healed)
        errors.append(found)
    for kind, nothing in errors[0].items():
        assert errors[1][kind] < nothing


def test_pairs_of_five_heads_of_which_three_stay() -> None:
    """Heads by importance 1 to 5: (2, 5) and (3, 4); counted from 0 and least kept first."""
    scores = np.array([5.0, 4, 3, 2, 1])
    assert pairs(scores, np.array([False, False, False, True, True])).T.tolist() == [[2, 3], [1, 4]]
    shuffled = np.array([2.0, 5, 1, 4, 3])
    assert pairs(shuffled, np.isin(np.arange(5), [0, 2])).T.tolist() == [[4, 0], [3, 2]]
    assert pairs(scores, np.array([False, True, True, True, True])).T.tolist() == [[0, 1]]  # one is left to take it
    assert pairs(scores, np.zeros(5, bool)).shape == (2, 0)


def test_head_residual_adds_the_difference_to_query_key_and_value() -> None:
    tiny = make_tiny("gpt2")
    body = anatomy(tiny.model)
    units = body.units("kv_group")[0]
    calibration = Calibration(tiny.model, [tiny.batch])
    order = np.argsort(-Minitron().scores(body, [units], calibration)[0])
    removed, kept = np.sort(order[3:]), order[:3]
    attention = tiny.model.transformer.h[0].attn
    before, output = attention.c_attn.weight.detach().clone(), attention.c_proj.weight.detach().clone()
    HeadResidual().apply(body, [units], {units.name: removed}, calibration)
    after = attention.c_attn.weight.detach()
    for old, new in zip(before.split(32, dim=1), after.split(32, dim=1), strict=True):
        old_heads, new_heads = old.split(8, dim=1), new.split(8, dim=1)
        for head in range(4):
            expected = 2 * old_heads[head] - old_heads[order[3]] if head == kept[-1] else old_heads[head]
            torch.testing.assert_close(new_heads[head], expected)
    assert torch.equal(attention.c_proj.weight, output)


def test_head_residual_merges_query_heads_within_their_group() -> None:
    tiny = make_tiny("llama")
    body = anatomy(tiny.model)
    units = body.units("query_head")[0]
    attention = tiny.model.model.layers[0].self_attn
    before = attention.q_proj.weight.detach().clone().split(8)
    key = attention.k_proj.weight.detach().clone()
    HeadResidual().apply(body, [units], {units.name: np.array([0, 3])}, Calibration(tiny.model, [tiny.batch]))
    after = attention.q_proj.weight.detach().split(8)
    for head, expected in enumerate([before[0], 2 * before[1] - before[0], 2 * before[2] - before[3], before[3]]):
        torch.testing.assert_close(after[head], expected)
    assert torch.equal(attention.k_proj.weight, key)
    with pytest.raises(ConfigError, match="a unit of layer 0 is 2 query heads"):
        HeadResidual().probes(body, body.units("kv_group"))


def test_bias_goes_where_there_was_none_and_adds_where_there_was() -> None:
    for name, there in (("llama", False), ("gpt2", True)):
        tiny = make_tiny(name)
        body = anatomy(tiny.model)
        (units, *_) = body.units("neuron")
        owner = tiny.model.get_submodule(units.consumer)
        assert (owner.bias is not None) == there
        before = owner.bias.detach().clone() if there else torch.zeros(32)
        calibration = Calibration(tiny.model, [tiny.batch])
        sums = calibration.measure(*Bias().probes(body, [units]))
        mean = (sums[f"{units.consumer}.sum"] / 36)[[4, 9]].float()
        weight = owner.weight.detach().T if name == "gpt2" else owner.weight.detach()
        Bias().apply(body, [units], {units.name: np.array([4, 9])}, calibration)
        torch.testing.assert_close(owner.bias.detach(), before + weight[:, [4, 9]] @ mean)
        assert dict(tiny.model.named_parameters())[f"{units.consumer}.bias"].requires_grad


@pytest.mark.parametrize("compensation", ALL, ids=lambda c: c.kind)
def test_channels_of_the_stream_have_no_consumer(compensation: Compensation) -> None:
    body = anatomy(make_tiny("llama").model)
    with pytest.raises(ConfigError, match=f"{compensation.kind} is for .*, not for hidden"):
        compensation.probes(body, body.units("hidden"))
