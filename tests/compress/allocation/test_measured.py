"""Allocations that try things out, on a trained model: better than chance, and nothing left behind."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from pipeline.compress.allocation._blocks import linears, outward
from pipeline.compress.allocation._fill import limits, spread
from pipeline.compress.allocation.base import Evidence, Target
from pipeline.compress.allocation.dp import Dp
from pipeline.compress.allocation.loss_budget import LossBudget
from pipeline.compress.units import Part, Units, lowest
from pipeline.errors import ConfigError

torch = pytest.importorskip("torch")

from pipeline.compress.architecture import anatomy  # noqa: E402
from pipeline.compress.calibration import Calibration  # noqa: E402
from pipeline.compress.surgery import axes, zero  # noqa: E402
from pipeline.models.training import lm_loss  # noqa: E402


def sizes(body: Any, units: Units) -> np.ndarray:
    """Sum of squared weights of every unit."""
    total = np.zeros(units.count)
    for member in units.members:
        for parameter, axis in axes(body.modules[member.module], member.side):
            each = (
                parameter.detach().double().movedim(axis, 0).reshape(parameter.shape[axis], -1).square().sum(1).numpy()
            )
            end = member.offset + units.count * member.size
            total += each[member.offset : end].reshape(units.count, member.size).sum(1)
    return total


def test_dp_beats_random_shares_on_a_trained_model(tiny_trained: tuple[Any, Any, np.ndarray]) -> None:
    model, _, blocks = tiny_trained
    body = anatomy(model)
    units = body.units("neuron")
    scores = [sizes(body, u) for u in units]
    target = Target(0.5)

    def loss(keep: np.ndarray) -> float:
        other = deepcopy(model)
        zero(other, units, {u.name: lowest(s, int(k)) for u, s, k in zip(units, scores, keep, strict=True)})
        return lm_loss(other, blocks[8:24])

    calibration = Calibration.of_blocks(model, blocks[:8])
    best = loss(Dp(levels=6).keep(units, target, Evidence(body, calibration, scores)))
    rng = np.random.default_rng(0)
    chance = [loss(spread(units, target, rng.random(len(units)))) for _ in range(8)]
    assert best < np.mean(chance)
    assert best <= loss(spread(units, target, np.full(len(units), 0.5))) + 1e-6


def test_curves_start_at_nothing_and_are_what_zeroing_does(tiny_trained: tuple[Any, Any, np.ndarray]) -> None:
    model, _, blocks = tiny_trained
    body = anatomy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = Calibration.of_blocks(model, blocks[:3], batch=2)
    units = body.units("query_head", "neuron", "hidden")
    scores = [sizes(body, u) for u in units]
    shares, curves = Dp(levels=2, distortion="mse").curves(
        units, limits(units, Target(0.3)), Evidence(body, calibration, scores)
    )
    assert all(s[0] == c[0] == 0 for s, c in zip(shares, curves, strict=True))
    ids = torch.from_numpy(blocks[:3]).long()
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        for u, score, share, curve in zip(units, scores, shares, curves, strict=True):
            other = deepcopy(model)
            zero(other, [u], {u.name: lowest(score, u.count - round(share[-1] * u.count), u.groups)})
            expected = (other(input_ids=ids).logits - dense).square().sum(-1).mean()
            assert curve[-1] == pytest.approx(float(expected), rel=1e-4), u.name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_costs_no_loss_gives_most(
    tiny_trained: tuple[Any, Any, np.ndarray],
) -> None:
    model, _, blocks = tiny_trained
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    units = anatomy(model).units("neuron")
    calibration = Calibration.of_blocks(model, blocks[:4])
    evidence = Evidence(anatomy(model), calibration, [sizes(anatomy(model), u) for u in units])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keep = LossBudget(rows=4, tasks=2, step=0.1).keep(units, Target(0.4), evidence)
    assert keep.argmin() == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="4 calibration rows cannot be 5 tasks"):
        LossBudget(rows=9, tasks=5).keep(units, Target(0.4), evidence)


def test_matrices_without_scores_go_by_magnitude(tiny_models: dict[str, Any]) -> None:
    for name in ("gpt2", "llama"):
        tiny = tiny_models[name]
        body = anatomy(tiny.model)
        names = linears(body)[1]
        parts = [Part(n, 1, body.modules[n].weight.numel(), 1.0) for n in names]
        evidence = Evidence(body, Calibration(tiny.model, [tiny.batch]))
        _, curves = Dp(levels=1, distortion="mse").curves(parts, limits(parts, Target(0.5, cap=0.5)), evidence)
        dense = tiny.output()
        for part, curve in zip(parts, curves, strict=True):
            other = deepcopy(tiny.model)
            weight = outward(anatomy(other), part.name)
            with torch.no_grad():
                weight[weight.abs() < weight.abs().flatten().kthvalue(part.count // 2 + 1).values] = 0
            assert curve[1] == pytest.approx(float((tiny.output(other) - dense).square().sum(-1).mean()), rel=1e-4)
