"""Criteria of one forward pass: variances, norms, mean activations."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import Calibration
from pipeline.compress.compensation.bias import Bias
from pipeline.compress.importance.actnorm import Actnorm
from pipeline.compress.importance.base import Importance
from pipeline.compress.importance.cfsp import Cfsp
from pipeline.compress.importance.minitron import Minitron, activity
from pipeline.compress.importance.obs import Obs
from pipeline.compress.importance.wifv import Wifv
from pipeline.errors import ConfigError
from tests.compress.conftest import make_tiny

torch = pytest.importorskip("torch")
from tests.compress.toy_layer import toy  # noqa: E402 - needs torch

X = [[1, 0, 2], [3, 0.1, 2], [5, -0.1, 2]]
W = [[1.0, 1, 4], [0, 2, 3]]


def test_flap_by_hand() -> None:
    body, groups, calibration = toy(W, X)
    assert Wifv(metric="ifv").scores(body, groups, calibration)[0] == pytest.approx([4, 0.01, 0])
    assert Wifv().scores(body, groups, calibration)[0] == pytest.approx([4, 0.05, 0])
    before = calibration.model(torch.tensor(X))
    Bias().apply(body, groups, {"0.neuron": np.array([2])}, calibration)
    assert calibration.model.consumer.bias.tolist() == [8, 6]
    calibration.model.consumer.weight.data[:, 2] = 0
    torch.testing.assert_close(calibration.model(torch.tensor(X)), before, rtol=0, atol=1e-6)
    assert calibration.passes == {"forward": 1}  # rows, for a model without tokens: scores and bias share the pass


def test_wifn_is_wandas_metric_over_a_column() -> None:
    """Wanda's example in the spec of unstructured pruning: norms .3, 3, 1.7321, 5."""
    body, groups, calibration = toy(
        [[4, -1, 2, 0.5], [1, 3, -2, 1]], [[0.1, 2, 1, 4], [0.2, 1, -1, -3], [-0.2, 2, 1, 0]]
    )
    found = Wifv(metric="wifn").scores(body, groups, calibration)[0]
    assert found == pytest.approx([0.3 * 2.5, 3 * 2, 3**0.5 * 2, 5 * 0.75])
    assert Actnorm().scores(body, groups, calibration)[0] == pytest.approx([0.3, 3, 3**0.5, 5])
    assert Actnorm(power=2).scores(body, groups, calibration)[0] == pytest.approx([0.09, 9, 3, 25])


def test_a_heads_score_is_the_mean_of_its_entries_and_the_authors_square_them() -> None:
    x = np.random.default_rng(0).standard_normal((20, 6))
    weight = np.random.default_rng(1).standard_normal((2, 6)).tolist()
    entries = np.var(x.astype(np.float32), axis=0, ddof=1) * (np.float32(weight) ** 2).sum(0)
    body, groups, calibration = toy(weight, x, width=3, kind="kv_group")
    assert Wifv().scores(body, groups, calibration)[0] == pytest.approx(entries.reshape(2, 3).mean(1), rel=1e-5)
    squared = (entries**2).reshape(2, 3).mean(1)
    assert Wifv(compat=True).scores(body, groups, calibration)[0] == pytest.approx(squared, rel=1e-5)
    body, groups, calibration = toy(weight, x)  # of neurons it does not
    np.testing.assert_array_equal(*(Wifv(compat=c).scores(body, groups, calibration)[0] for c in (False, True)))


def test_cfsp_as_the_authors_code_it_is_the_activation_norm() -> None:
    rng = np.random.default_rng(0)
    d, neurons = 4, 5
    down, up, gate = (torch.from_numpy(rng.standard_normal((d, neurons)).astype(np.float32)) for _ in range(3))
    norm = torch.from_numpy(rng.random(neurons))
    within = sum(w.abs() / w.abs().sum(0, keepdim=True) for w in (down, up, gate)).mean(0) * norm
    torch.testing.assert_close(within, 3 / d * norm, rtol=1e-6, atol=0)
    found = Cfsp().of(norm, down, up, gate)
    shares = np.zeros((d, neurons))
    for w in (down, up, gate):
        for i, row in enumerate(w.abs().tolist()):
            shares[i] += np.array(row) / sum(row)
    by_hand = shares.mean(0) * norm.numpy()
    np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-5)
    assert len(np.unique(np.round((found / norm).numpy(), 6))) == neurons  # weights count here
    dead = down.clone()
    dead[2] = 0  # a channel that no neuron writes to
    assert bool(Cfsp(weight_power=2, power=2).of(norm, dead, up, gate).isfinite().all())


def test_minitron_by_hand() -> None:
    x = torch.tensor([[[1.0, -1], [3, 1]], [[2, 0], [-2, 0]]])
    body, groups, calibration = toy([[1.0, 1]], x)
    assert Minitron().scores(body, groups, calibration)[0] == pytest.approx([8**0.5, 1.0])
    assert Minitron(sequence="l2").scores(body, groups, calibration)[0] == pytest.approx([18**0.5, 2**0.5])
    assert x.mean(1).abs().norm(dim=0).tolist() == [2, 0]  # the absolute after the mean is another score
    half = activity(x, torch.tensor([[True, False], [True, True]]), "mean")
    assert half.tolist() == [[1, 1], [2, 0]]


def test_minitron_takes_the_norm_of_a_head() -> None:
    body, groups, calibration = toy([[1.0] * 4], [[3, 4, 0, 1], [6, 8, 0, -3]], width=2, kind="query_head")
    assert Minitron().scores(body, groups, calibration)[0] == pytest.approx([7.5, 2])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_minitron_sums_channels_over_all_norms(name: str) -> None:
    tiny = make_tiny(name)
    body = anatomy(tiny.model)
    (units,) = body.units("hidden")
    seen: dict[str, torch.Tensor] = {}
    handles = [
        tiny.model.get_submodule(norm).register_forward_hook(lambda m, i, out, norm=norm: seen.update({norm: out}))
        for norm in body.norms
    ]
    tiny.output()
    for handle in handles:
        handle.remove()
    assert len(seen) == len(body.norms)
    by_hand = sum(out.abs().mean(1).square().sum(0).sqrt() for out in seen.values())
    found = Minitron().scores(body, [units], Calibration(tiny.model, [tiny.batch]))[0]
    np.testing.assert_allclose(found, by_hand.detach().numpy(), rtol=1e-4)


@pytest.mark.parametrize("importance", [Wifv(), Actnorm(), Cfsp(), Minitron(), Obs()], ids=lambda i: i.kind)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "bert", "vit"])
def test_every_architecture_is_scored(name: str, importance: Importance) -> None:
    tiny = make_tiny(name)
    body = anatomy(tiny.model)
    groups = body.units("neuron") if importance.kind == "cfsp" else body.units("neuron", "kv_group")
    calibration = Calibration(tiny.model, [tiny.batch])
    for units, scores in zip(groups, importance.scores(body, groups, calibration), strict=True):
        assert scores.shape == (units.count,)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert len(np.unique(scores)) == units.count
    parts = Calibration(tiny.model, [{n: v[i : i + 1] for n, v in tiny.batch.items()} for i in range(3)])
    for ours, theirs in zip(
        importance.scores(body, groups, calibration), importance.scores(body, groups, parts), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * ours.max())


@pytest.mark.parametrize("importance", [Wifv(), Actnorm(), Obs(), Cfsp()], ids=lambda i: i.kind)
def test_channels_of_the_stream_have_no_consumer(importance: Importance) -> None:
    body = anatomy(make_tiny("llama").model)
    with pytest.raises(ConfigError, match=f"{importance.kind} is for .*neuron.*, not for hidden"):
        importance.probes(body, body.units("hidden"))
