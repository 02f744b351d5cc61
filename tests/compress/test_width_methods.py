"""Width methods whole: on a trained model each beats chance at the same budget, and a ratio of 0 changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from pipeline.compress.calibration import Calibration
from pipeline.compress.steps.width import Width
from pipeline.models.training import lm_loss

torch = pytest.importorskip("torch")

METHODS: dict[str, dict[str, Any]] = {
    "taylor": {"importance": "taylor"},
    "taylor second": {"importance": {"kind": "taylor", "order": "second"}},
    "taylor mixed": {"importance": {"kind": "taylor", "order": "mixed"}},
    "nirvana's objective": {"importance": {"kind": "taylor", "objective": "max_logit"}},
    "disturbed": {"importance": {"kind": "taylor", "objective": "disturbed"}},
    "flap": {"importance": "wifv", "compensation": "bias"},
    "wanda-sp": {"importance": {"kind": "wifv", "metric": "wifn"}},
    "obs": {"importance": "obs", "compensation": "refit"},
    "obs, scalar": {"importance": "obs", "compensation": "scalar"},
    "minitron": {"importance": "minitron"},
    "actnorm": {"importance": "actnorm"},
    "cfsp": {"importance": "cfsp"},
    "maw": {"importance": "maw"},
    "magnitude": {"importance": "magnitude"},
}
NEURONS_ONLY = {"cfsp", "maw"}

Pruned = Callable[..., float]


@pytest.fixture
def pruned(tiny_trained: tuple[Any, Any, np.ndarray]) -> Pruned:
    """`pruned(units, **method)`: loss on text that neither training nor calibration saw, nats a token."""
    model, _, blocks = tiny_trained
    calibration, test = np.array_split(blocks, 2)

    def loss(units: str, ratio: float = 0.5, **method: Any) -> float:
        copy = deepcopy(model)
        step = Width.model_validate({"ratio": ratio, "units": [units], **method})
        outcome = step.apply(copy, Calibration.of_blocks(copy, calibration))
        assert outcome.report["of_prunable"] == pytest.approx(ratio, abs=1e-9)
        return lm_loss(copy, test)

    return loss


@pytest.mark.parametrize("units", ["neuron", "kv_group"])
def test_every_method_beats_chance_at_the_same_budget(pruned: Pruned, units: str) -> None:
    chance = [pruned(units, importance={"kind": "random", "seed": seed}) for seed in range(6)]
    found = {n: pruned(units, **m) for n, m in METHODS.items() if units == "neuron" or n not in NEURONS_ONLY}
    assert max(found.values()) < np.mean(chance)
    if units == "neuron":
        assert max(found.values()) < min(chance)
    assert min(found.values()) == found["obs"]  # the only one that knows what the rest can make up for
    assert found["flap"] < pruned(units, importance={"kind": "random", "seed": 0}, compensation="bias")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_ratio_of_0_changes_nothing(tiny_trained: tuple[Any, Any, np.ndarray], method: dict[str, Any]) -> None:
    model, _, blocks = tiny_trained
    before = deepcopy(model.state_dict())
    Width.model_validate({"ratio": 0, "units": ["neuron"], **method}).apply(
        model, Calibration.of_blocks(model, blocks[:4])
    )
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("method", ["taylor", "obs", "flap"])
def test_the_same_data_and_seed_remove_the_same_units(tiny_trained: tuple[Any, Any, np.ndarray], method: str) -> None:
    model, _, blocks = tiny_trained
    shapes = []
    for batch in (8, 8, 3):
        copy = deepcopy(model)
        Width.model_validate({"ratio": 0.5, "units": ["query_head", "neuron"], **METHODS[method]}).apply(
            copy, Calibration.of_blocks(copy, blocks[:9], batch)
        )
        shapes.append(copy.state_dict())
    first, again, other = shapes
    for name, value in first.items():
        assert torch.equal(again[name], value)
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_scores_are_float32_of_a_model_in_bfloat16(tiny_trained: tuple[Any, Any, np.ndarray]) -> None:
    from pipeline.compress.architecture import anatomy

    model, _, blocks = tiny_trained
    half = deepcopy(model).to(torch.bfloat16)
    exact = deepcopy(half).float()
    for method in ("taylor", "flap", "obs", "minitron", "cfsp", "maw", "magnitude"):
        importance = Width.model_validate({"ratio": 0, "units": ["neuron"], **METHODS[method]}).importance
        scores = [
            importance.scores(anatomy(m), anatomy(m).units("neuron"), Calibration.of_blocks(m, blocks[:8]))
            for m in (half, exact)
        ]
        for of_half, of_exact in zip(*scores, strict=True):
            assert of_half.dtype == np.float64
            if importance.data == "none":
                np.testing.assert_array_equal(of_half, of_exact)
                continue
            assert np.corrcoef(of_half, of_exact)[0, 1] > 0.99
            assert len(np.unique(of_half)) > 60  # of 64: bfloat16 would tie them
