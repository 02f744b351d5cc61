"""OBS and the refit that it assumes: by hand, against each other, and against least squares."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.architecture import anatomy
from pipeline.compress.calibration import Calibration, InputMoments
from pipeline.compress.compensation.refit import Refit
from pipeline.compress.importance.obs import Obs, removal_scores, unit_scores
from pipeline.compress.surgery import cut
from pipeline.errors import TamisError

torch = pytest.importorskip("torch")
from tests.compress.toy_layer import toy  # noqa: E402 - needs torch

H = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]], dtype=torch.float64)
W = torch.tensor([[0.5, 2, 1], [1, 0, -1]], dtype=torch.float64)


def tokens(gram: torch.Tensor) -> list[list[float]]:
    """Rows whose X^T X / n is a matrix."""
    rows = torch.linalg.cholesky(gram).T * len(gram) ** 0.5
    found: list[list[float]] = rows.tolist()
    return found


def test_scores_by_hand() -> None:
    inverse = torch.linalg.inv(H)
    assert unit_scores(W, inverse).tolist() == pytest.approx([5 / 6, 2, 4 / 3])
    body, groups, calibration = toy(W.tolist(), tokens(H))
    found = Obs(neuron_rounds=1, damping=0).scores(body, groups, calibration)[0]
    assert found == pytest.approx([5 / 6, 2, 4 / 3], rel=1e-5)


def test_refit_by_hand() -> None:
    body, groups, calibration = toy(W.tolist(), tokens(H))
    Refit(damping=0).apply(body, groups, {"0.neuron": np.array([0])}, calibration)
    after = calibration.model.consumer.weight.detach()
    np.testing.assert_allclose(after[:, 1:], [[7 / 3, 5 / 6], [2 / 3, -4 / 3]], rtol=1e-5)
    error = W - torch.cat([torch.zeros(2, 1), after[:, 1:]], 1).double()
    assert float((error @ H * error).sum()) == pytest.approx(5 / 3, rel=1e-5)  # twice the score


def test_the_authors_term_changes_the_order() -> None:
    w, inverse = torch.tensor([[1.0, -1, 0.8]], dtype=torch.float64), torch.linalg.inv(H)
    assert unit_scores(w, inverse).tolist() == pytest.approx([2 / 3, 0.5, 0.32 / 0.75])
    assert unit_scores(w, inverse, 1, w @ H).tolist() == pytest.approx([5 / 3, 0.7, 0.32 / 0.75 + 0.48])
    lowest = [int(np.argmin(removal_scores(w, H, 1, 1, compat))) for compat in (False, True)]
    assert lowest == [2, 1]
    for j, score in enumerate((2 / 3, 0.5, 0.32 / 0.75)):  # what a refit leaves is what the first term says
        body, groups, calibration = toy(w.tolist(), tokens(H))
        Refit(damping=0).apply(body, groups, {"0.neuron": np.array([j])}, calibration)
        kept = calibration.model.consumer.weight.detach().double()
        kept[:, j] = 0
        assert float(((w - kept) @ H * (w - kept)).sum()) == pytest.approx(2 * score, rel=1e-5)


@settings(max_examples=25)
@given(st.integers(2, 6), st.sampled_from([1, 2, 3]), st.integers(1, 8), st.booleans(), st.integers(0, 2**32 - 1))
def test_scores_follow_the_removals_and_add_up_to_the_error(
    count: int, width: int, rounds: int, compat: bool, seed: int
) -> None:
    """One unit a round: a score is what removing that unit, after those before it, adds to half the error of the best
    refit, or the highest so far. However many rounds, scores have an order."""
    rng = np.random.default_rng(seed)
    n = count * width
    x = torch.from_numpy(rng.standard_normal((4 * n, n)))
    gram, weight = x.T @ x / len(x), torch.from_numpy(rng.standard_normal((3, n)))
    scores = removal_scores(weight, gram, width, rounds, compat)
    assert len(np.unique(scores)) == count
    if compat or rounds < count:
        return
    errors, gone = [0.0], torch.zeros(n, dtype=torch.bool)
    for unit in np.argsort(scores)[:-1]:
        gone[unit * width : (unit + 1) * width] = True
        kept = torch.zeros_like(weight)
        kept[:, ~gone] = torch.linalg.solve(gram[~gone][:, ~gone], (weight @ gram)[:, ~gone].T).T
        errors.append(float(((weight - kept) @ gram * (weight - kept)).sum()) / 2)
    np.testing.assert_allclose(np.sort(scores)[:-1], np.maximum.accumulate(np.diff(errors)), rtol=1e-6)


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(1, 7), st.sampled_from([0.0, 0.01]), st.integers(0, 2**32 - 1))
def test_refit_is_least_squares_and_where_every_update_by_obs_ends(
    n: int, remove: int, damping: float, seed: int
) -> None:
    remove = min(remove, n - 1)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5 * n, n)).astype(np.float32)
    weight = rng.standard_normal((3, n)).astype(np.float32)
    gone = np.sort(rng.permutation(n)[:remove])
    kept = np.setdiff1d(np.arange(n), gone)
    body, groups, calibration = toy(weight.tolist(), x)
    Refit(damping=damping).apply(body, groups, {"0.neuron": gone}, calibration)
    found = calibration.model.consumer.weight.detach().numpy()
    np.testing.assert_array_equal(found[:, gone], weight[:, gone])  # these are cut afterwards
    h = x.T.astype(np.float64) @ x / len(x)
    ridge = damping * np.diag(h).mean()
    rows = np.concatenate([x[:, kept] / np.sqrt(len(x)), np.sqrt(ridge) * np.eye(n)[:, kept]])
    target = np.concatenate([x / np.sqrt(len(x)), np.sqrt(ridge) * np.eye(n)]) @ weight.T
    np.testing.assert_allclose(found[:, kept], np.linalg.lstsq(rows, target, rcond=None)[0].T, rtol=1e-3, atol=1e-4)
    inverse, w = np.linalg.inv(h + ridge * np.eye(n)), weight.astype(np.float64)
    for j in gone:  # one update by OBS after the other
        w = w - np.outer(w[:, j], inverse[j]) / inverse[j, j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1
    np.testing.assert_allclose(found[:, kept], w[:, kept], rtol=1e-3, atol=1e-4)


def test_dead_inputs_cost_nothing_and_go_first() -> None:
    x = np.random.default_rng(0).standard_normal((30, 4))
    x[:, 2] = 0
    body, groups, calibration = toy([[1e-3, 1.0, 50, 2]], x)
    scores = Obs().scores(body, groups, calibration)[0]
    assert scores[2] == 0
    assert int(np.argmin(scores)) == 2
    body, groups, calibration = toy([[1.0, 1, 50, 2]], x * 0)
    assert Obs().scores(body, groups, calibration)[0].tolist() == [0, 0, 0, 0]
    Refit().apply(body, groups, {"0.neuron": np.array([2])}, calibration)
    assert calibration.model.consumer.weight.tolist() == [[1, 1, 50, 2]]


def test_dependent_inputs_need_damping() -> None:
    x = np.random.default_rng(0).standard_normal((30, 3)).astype(np.float32)
    x[:, 1] = x[:, 0]
    body, groups, calibration = toy([[1.0, 2, 3]], np.round(4 * x) / 4)
    with pytest.raises(TamisError, match="linearly dependent: set damping above 0"):
        Obs(damping=0).scores(body, groups, calibration)
    assert np.isfinite(Obs().scores(body, groups, calibration)[0]).all()
    Refit(damping=0).apply(body, groups, {"0.neuron": np.array([0])}, calibration)  # what stays is independent
    np.testing.assert_allclose(calibration.model.consumer.weight.detach()[0, 1:], [3, 3], rtol=1e-5)
    assert calibration.measure(InputMoments(("consumer",), gram=True))["consumer.gram"].shape == (3, 3)


def test_a_refit_behind_what_is_pruned_is_solved_block_after_block(tiny_trained: Any) -> None:
    """The first block as behind the dense model, the second on what the first, cut and refit, puts out."""
    model, _, blocks = tiny_trained
    body = anatomy(model)
    groups = body.units("neuron")
    removal = {u.name: np.arange(0, u.count, 2) for u in groups}
    dense, found = deepcopy(model), deepcopy(model)
    Refit().apply(anatomy(dense), groups, removal, Calibration.of_blocks(dense, blocks[:6]))
    calibration = Calibration.of_blocks(found, blocks[:6])
    assert Refit(inputs="pruned").probes(body, groups) == []
    Refit(inputs="pruned").apply(anatomy(found), groups, removal, calibration)
    assert calibration.passes["forward"] == round(6 * 64 * 5 / 3)
    cut(dense, groups, removal)
    cut(found, groups, removal)
    first, second = (u.consumer for u in groups[:2])
    torch.testing.assert_close(
        found.get_submodule(first).weight, dense.get_submodule(first).weight, rtol=1e-3, atol=1e-5
    )
    assert not torch.allclose(found.get_submodule(second).weight, dense.get_submodule(second).weight, rtol=1e-2)
    by_hand = deepcopy(model)
    cut(by_hand, groups[:1], {groups[0].name: removal[groups[0].name]})
    by_hand.get_submodule(first).weight.data = found.get_submodule(first).weight.data
    Refit().apply(anatomy(by_hand), groups[1:2], removal, Calibration.of_blocks(by_hand, blocks[:6]))
    expected = by_hand.get_submodule(second).weight[:, 1::2]
    torch.testing.assert_close(found.get_submodule(second).weight, expected, rtol=1e-3, atol=1e-5)
