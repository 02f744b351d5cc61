"""Criteria that read weights alone, and what all criteria read them with."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest

from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import Calibration
from pipeline.compress.importance.magnitude import Magnitude
from pipeline.compress.importance.maw import Maw
from pipeline.compress.steps.width import Width
from pipeline.compress.surgery import zero
from pipeline.compress.units import Kind
from pipeline.errors import ConfigError
from tests.compress.conftest import make_tiny

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("kind", ["neuron", "kv_group", "query_head", "hidden"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "bert", "vit"])
def test_magnitude_is_what_zeroing_the_unit_takes_away(name: str, kind: Kind, norm: str) -> None:
    tiny = make_tiny(name)
    body = anatomy(tiny.model)
    if kind == "query_head" and body.layers[0].attention is not None and body.layers[0].attention.group == 1:
        pytest.skip("every query head has its key/value head")
    units = body.units(kind)[-1]
    scores = Magnitude.model_validate({"norm": norm}).scores(body, [units], Calibration(tiny.model, []))[0]
    assert scores.shape == (units.count,)

    def total(model: torch.nn.Module) -> float:
        return sum(float((p.abs() if norm == "l1" else p.square()).double().sum()) for p in model.parameters())

    with torch.no_grad():
        for unit in (0, units.count - 1):
            without = deepcopy(tiny.model)
            zero(without, [units], {units.name: np.array([unit])})
            taken = total(tiny.model) - total(without)
            # BERT's head has a square matrix where a channel is a row and a column: what they share counts twice.
            twice = name == "bert" and kind == "hidden"
            assert scores[unit] == pytest.approx(taken if norm == "l1" else np.sqrt(taken), rel=1e-2 if twice else 1e-5)


def test_maw_by_hand() -> None:
    gate = torch.tensor([[0.5, -0.2, 0.1], [-0.9, 0.1, 0.3], [0.2, 0.2, 0.2]])
    up = torch.tensor([[0.1, 0.4, -0.3], [0.2, -0.1, 0.0], [0.6, -0.7, 0.1]])
    np.testing.assert_allclose(Maw().of(gate, up), [1.4, 1.5, 1.7], rtol=1e-6)
    vow = np.var(gate.numpy(), axis=1, ddof=1) + np.var(up.numpy(), axis=1, ddof=1)
    np.testing.assert_allclose(Maw(measure="vow").of(gate, up), vow, rtol=1e-5)
    np.testing.assert_allclose(Maw(measure="pon").of(gate, up), [0.8 * 0.8, 1.3 * 0.3, 0.6 * 1.4], rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_maw_reads_the_rows_before_the_activation(name: str) -> None:
    tiny = make_tiny(name)
    body = anatomy(tiny.model)
    groups = body.units("neuron")
    before = Maw().scores(body, groups, Calibration(tiny.model, []))
    zero(tiny.model, groups, {groups[1].name: np.array([3, 5])})
    after = Maw().scores(body, groups, Calibration(tiny.model, []))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.flatnonzero(after[1] != before[1]).tolist() == [3, 5]
    assert after[1][[3, 5]].tolist() == [0, 0]


@pytest.mark.parametrize("measure", ["maw", "vow", "pon"])
def test_the_neurons_that_go_are_those_that_optipfair_takes(measure: str) -> None:
    mlp_glu = pytest.importorskip("optipfair.pruning.mlp_glu")
    tiny = make_tiny("llama")
    theirs = mlp_glu.prune_model_mlp_glu(deepcopy(tiny.model), measure.upper(), 25, show_progress=False)
    step = Width(units=("neuron",), importance=Maw.model_validate({"measure": measure}), ratio=0.25)
    ours = step.apply(tiny.model, Calibration(tiny.model, [])).model
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)


def test_maw_is_for_neurons() -> None:
    tiny = make_tiny("llama")
    body = anatomy(tiny.model)
    with pytest.raises(ConfigError, match="maw is for neuron, not for kv_group: name others under `units`"):
        Maw().scores(body, body.units("neuron", "kv_group"), Calibration(tiny.model, []))
