"""Masks and weights of single matrices: every number of the specifications, and what holds for all matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from pipeline.compress.sparse._low_rank import low_rank  # noqa: E402
from pipeline.compress.sparse._refit import refit  # noqa: E402
from pipeline.compress.sparse._select import keep_highest, select, shares  # noqa: E402
from pipeline.compress.sparse._storage import bitmask_bytes, csr_bytes, pattern_bytes  # noqa: E402
from pipeline.compress.sparse.armor import Armor, Factors, assemble, best_group  # noqa: E402
from pipeline.compress.sparse.base import Matrix, Pattern, Quota  # noqa: E402
from pipeline.compress.sparse.gblm import Gblm  # noqa: E402
from pipeline.compress.sparse.magnitude import Magnitude  # noqa: E402
from pipeline.compress.sparse.random import Random  # noqa: E402
from pipeline.compress.sparse.sparsegpt import Sparsegpt, inverse_factor, sweep  # noqa: E402
from pipeline.compress.sparse.wanda import Wanda, running_shares  # noqa: E402

TWO_OF_FOUR = Pattern(2, 4)
seeds = st.integers(0, 2**32 - 1)


def matrix(weight: Any, inputs: Any, **more: Any) -> Matrix:
    """Of weights and of rows of inputs."""
    x = torch.as_tensor(inputs, dtype=torch.float64)
    seen = {"square": x.square().sum(0), "abs": x.abs().sum(0), "gram": x.T @ x} | more
    return Matrix("toy", torch.as_tensor(weight, dtype=torch.float32), float(len(x)), seen)


def kept(mask: Any) -> list[list[int]]:
    return [torch.nonzero(row).flatten().tolist() for row in mask]


def random_matrix(seed: int, out: int = 8, inputs: int = 16, tokens: int = 64) -> Matrix:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) * np.exp(rng.standard_normal(inputs))
    return matrix(rng.standard_normal((out, inputs)), rng.standard_normal((tokens, inputs)) @ mix)


WANDA = matrix([[4, -1, 2, 0.5], [1, 3, -2, 1]], [[0.1, 2, 1, 4], [0.2, 1, -1, -3], [-0.2, 2, 1, 0]])


def error(m: Matrix, weight: Any) -> float:
    """Squared error of the outputs."""
    lost = (m.weight - weight).double()
    return float((lost @ m.seen["gram"] * lost).sum())


def test_wanda_of_the_paper() -> None:
    np.testing.assert_allclose(WANDA.norms, [0.3, 3, 1.7321, 5], atol=1e-4)
    pruned = Wanda().prune(WANDA, Quota(4))
    assert kept(pruned.mask) == [[1, 2], [1, 3]]
    assert error(WANDA, pruned.weight) == pytest.approx(20.18, abs=5e-3)
    by_magnitude = Magnitude(scope="row").prune(WANDA, Quota(4))
    assert error(WANDA, by_magnitude.weight) == pytest.approx(34.94, abs=5e-3)


def test_wanda_cumulative_is_the_bisection_at_an_exact_count() -> None:
    m = random_matrix(3)
    mask = Wanda(rows="cumulative", scope="matrix").prune(m, Quota(64)).mask
    score = m.weight.abs() * m.norms
    running = running_shares(score)
    alpha = running[~mask].max()
    assert int(mask.sum()) == 64
    assert (mask == (running > alpha)).all()  # one share for all rows
    assert mask.sum(1).unique().numel() > 1  # but not one count


def test_gblm_of_the_spec() -> None:
    gradient = 0.01 * torch.tensor([[1, 0, 2, 0.5], [0.2, 0.1, 3, 1]])
    m = matrix(WANDA.weight, np.zeros((3, 4)), square=WANDA.seen["square"], gradient=gradient)
    assert kept(Gblm(alpha=0).prune(m, Quota(4)).mask) == [[1, 2], [1, 3]]
    assert kept(Gblm(alpha=100).prune(m, Quota(4)).mask) == [[0, 2], [1, 2]]
    auto = Gblm(alpha="auto").scores(m) - Wanda().scores(m)
    assert float(auto.mean()) == pytest.approx(float(Wanda().scores(m).mean()), rel=1e-5)


def test_sparsegpt_of_the_spec() -> None:
    h = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]], dtype=torch.float64)
    u = inverse_factor(h, 0.0)
    assert u is not None
    np.testing.assert_allclose(u.diagonal(), [0.8660, 0.8165, 0.7071], atol=5e-5)
    np.testing.assert_allclose(u.T @ u, torch.linalg.inv(h), atol=1e-12)
    w = torch.tensor([[0.5, 2, 1]], dtype=torch.float64)
    np.testing.assert_allclose((w / u.diagonal()) ** 2, [[0.3333, 6, 2]], atol=5e-5)
    mask, new = sweep(w, u, Quota(2), 128)
    np.testing.assert_allclose(new, [[0, 2.3333, 0.8333]], atol=5e-5)
    assert kept(mask) == [[1, 2]]
    assert loss(h, w, new) == pytest.approx(1 / 3)
    assert loss(h, w, w * mask) == pytest.approx(0.5)


def loss(h: Any, w: Any, new: Any) -> float:
    return float(((w - new) @ h * (w - new)).sum())


def test_the_sweep_is_not_the_best_for_its_mask_and_the_refit_is() -> None:
    h = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]], dtype=torch.float64)
    u = inverse_factor(h, 0.0)
    w = torch.tensor([[0.5, 2, 1]], dtype=torch.float64)
    assert u is not None
    # the middle column alone: a block of its own whose whole share is 1 of 1
    forced = w.clone()
    e = forced[:, 1] / u[1, 1]
    forced[:, 1:] -= e[:, None] * u[1, 1:]
    np.testing.assert_allclose(forced, [[0.5, 0, 2]], atol=1e-12)
    assert loss(h, w, forced) == pytest.approx(6)
    mask = torch.tensor([[True, False, True]])
    exact = refit(Matrix("toy", w, 1, {"gram": h}), mask, damping=0)
    np.testing.assert_allclose(exact, [[1.5, 0, 2]], atol=1e-12)
    assert loss(h, w, exact) == pytest.approx(4)
    assert loss(h, w, w * mask) == pytest.approx(8)


def test_two_of_four_of_the_spec() -> None:
    row = torch.tensor([[1, -3, 2, 0.5, 0.1, 0.2, -0.3, 0.4]])
    norms = torch.tensor([5, 1, 1, 1, 1, 1, 1, 10.0])
    m = Matrix("toy", row, 1, {"square": norms.double() ** 2})
    quota = Quota(4, TWO_OF_FOUR)
    assert kept(Magnitude().prune(m, quota).mask) == [[1, 2, 6, 7]]
    assert kept(Wanda().prune(m, quota).mask) == [[0, 1, 6, 7]]

    h = torch.tensor([[4, 2, 0, 0], [2, 4, 0, 0], [0, 0, 1, 0], [0, 0, 0, 9]], dtype=torch.float64)
    w = torch.tensor([[1, 1.5, 2, 0.5]], dtype=torch.float64)
    u = inverse_factor(h, 0.0)
    assert u is not None
    np.testing.assert_allclose(u.diagonal(), [0.57735, 0.5, 1, 0.33333], atol=5e-6)
    np.testing.assert_allclose((w / u.diagonal()) ** 2, [[3, 9, 4, 2.25]], atol=1e-9)
    mask, new = sweep(w, u, Quota(2, TWO_OF_FOUR), 128)
    assert kept(mask) == [[1, 2]]
    np.testing.assert_allclose(new, [[0, 2, 2, 0]], atol=1e-12)
    assert loss(h, w, new) == pytest.approx(5.25)
    assert loss(h, w, w * mask) == pytest.approx(6.25)
    best = [refit(Matrix("toy", w, 1, {"gram": h}), m, 0) for m in all_pairs()]
    assert min(loss(h, w, b) for b in best) == pytest.approx(5.25)
    # Wanda: |w| ||x|| = 2, 3, 2, 1.5: the last goes, and of the equal pair the lower index
    wanda = Matrix("toy", w.float(), 1, {"square": h.diagonal()})
    assert kept(Wanda().prune(wanda, Quota(2, TWO_OF_FOUR)).mask) == [[1, 2]]


def all_pairs() -> list[Any]:
    return [torch.zeros(1, 4, dtype=torch.bool).index_fill(1, c, True) for c in torch.combinations(torch.arange(4))]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_magnitude_is_that_of_torch(share: float) -> None:
    from torch.nn.utils.prune import l1_unstructured

    m = random_matrix(3)
    layer = torch.nn.Linear(16, 8, bias=False)
    layer.weight.data = m.weight.clone()
    l1_unstructured(layer, "weight", amount=share)
    pruned = Magnitude().prune(m, Quota(128 - round(share * 128)))
    assert torch.equal(pruned.mask, layer.weight_mask.bool())
    assert torch.equal(pruned.weight, layer.weight)


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(0, 128))
def test_counts_are_exact_whatever_the_ties(seed: int, keep: int) -> None:
    m = random_matrix(seed)
    tied = Matrix("toy", m.weight.round(), m.tokens, m.seen)
    for pruner in (Magnitude(), Magnitude(scope="row"), Random(seed=seed), Wanda(), Sparsegpt(block=5)):
        pruned = pruner.prune(tied, Quota(keep))
        assert int(pruned.mask.sum()) == keep
        assert (pruned.weight[~pruned.mask] == 0).all()
        by_row = pruned.mask.sum(1)
        if isinstance(pruner, Wanda) or (isinstance(pruner, Magnitude) and pruner.scope == "row"):
            assert int(by_row.max() - by_row.min()) <= 1
        if not isinstance(pruner, Sparsegpt):
            assert (pruned.weight[pruned.mask] == tied.weight[pruned.mask]).all()
    patterned = Sparsegpt(block=8).prune(tied, Quota(64, TWO_OF_FOUR)).mask
    assert (patterned.view(-1, 4).sum(1) == 2).all()


def test_of_equal_scores_the_lower_index_goes_first() -> None:
    scores = torch.tensor([[0.5, 1, 1, 1, 2, 2, 3, 4]])
    assert kept(keep_highest(scores, 4)) == [[4, 5, 6, 7]]  # the official threshold form removes 6 of 8
    assert kept(keep_highest(scores, 2)) == [[2, 3, 4, 5, 6, 7]]
    assert shares(7, 3).tolist() == [2, 2, 3]
    with pytest.raises(ValueError, match="1 of 8 scores are not finite"):
        select(scores.masked_fill(scores == 4, torch.nan), Quota(4), by_row=True)


def test_magnitude_agrees_with_torch() -> None:
    from torch.nn.utils import prune

    weight = random_matrix(1).weight
    layer = torch.nn.Linear(16, 8)
    layer.weight.data = weight.clone()
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert (Magnitude().prune(Matrix("toy", weight), Quota(64)).mask == layer.weight_mask.bool()).all()


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_the_refit_cannot_be_improved(seed: int) -> None:
    m = random_matrix(seed, tokens=200)
    pruned = Sparsegpt(damping=1e-4).prune(m, Quota(64))
    exact = refit(m, pruned.mask, damping=1e-9)
    assert error(m, exact) <= min(error(m, pruned.weight), error(m, m.weight * pruned.mask)) * (1 + 1e-6)
    gradient = (m.weight - exact).double() @ m.seen["gram"]
    assert float((gradient * pruned.mask).abs().max()) < 1e-3 * float(m.seen["gram"].abs().max())


def test_the_sweep_pays_on_average() -> None:
    """Not always: what is frozen on the left can make a single matrix worse than no update at all."""
    swept, bare = 0.0, 0.0
    for seed in range(20):
        m = random_matrix(seed, tokens=200)
        pruned = Sparsegpt().prune(m, Quota(64))
        swept += error(m, pruned.weight) / error(m, 0 * m.weight)
        bare += error(m, m.weight * pruned.mask) / error(m, 0 * m.weight)
    assert swept < 0.8 * bare


def test_sparsegpt_takes_dead_inputs_first_and_falls_back_where_nothing_factors() -> None:
    m = random_matrix(0)
    x = torch.ones(16, dtype=torch.float64).index_fill(0, torch.tensor([3, 7]), 0.0)
    dead = Matrix("toy", m.weight, m.tokens, {"gram": m.seen["gram"] * x * x[:, None], "square": m.seen["square"] * x})
    pruned = Sparsegpt(block=16).prune(dead, Quota(128 - 16))
    assert not pruned.mask[:, [3, 7]].any()
    assert pruned.note == ""
    negative = Matrix("toy", m.weight, m.tokens, {"gram": -m.seen["gram"], "square": m.seen["square"]})
    fallen = Sparsegpt().prune(negative, Quota(64))
    assert fallen.note == "the Hessian does not factor: Wanda"
    assert (fallen.mask == Wanda().prune(negative, Quota(64)).mask).all()
    # eigenvalues -0.05 and 2.05: 0.01 of the mean diagonal is too little, ten times as much is enough
    slightly = torch.tensor([[1, 1.05], [1.05, 1]], dtype=torch.float64) / 2
    w = torch.tensor([[1.0, 2.0]])
    damped = Sparsegpt().prune(Matrix("toy", w, 1, {"gram": slightly, "square": slightly.diagonal()}), Quota(1))
    assert damped.note == "damping times 10"


def test_random_is_the_same_for_a_seed_and_a_name() -> None:
    m = random_matrix(0)
    first = Random(seed=1).prune(m, Quota(30)).mask
    assert (first == Random(seed=1).prune(m, Quota(30)).mask).all()
    assert not (first == Random(seed=2).prune(m, Quota(30)).mask).all()
    other = Matrix("other", m.weight, m.tokens, m.seen)
    assert not (first == Random(seed=1).prune(other, Quota(30)).mask).all()


def test_low_rank_of_the_spec() -> None:
    w = torch.tensor([[2, 1, 0.5, 0.2], [1, 2, 0.2, 0.5], [0.5, 0.1, 1, 2]], dtype=torch.float64)
    x = torch.tensor([1, 2, 0.5, 4], dtype=torch.float64)
    # of the tie in the last row the specification takes the higher index
    e = w * torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0]])
    np.testing.assert_allclose(torch.linalg.svdvals(e * x), [1.008606, 0.855811, 0.502794], atol=1e-6)

    def left_over(left: Any, right: Any) -> float:
        return float((((e - left @ right) * x) ** 2).sum())

    assert float(((e * x) ** 2).sum()) == pytest.approx(2.0025)
    left, right = low_rank(e, x, 1)
    assert left_over(left, right) == pytest.approx(0.985215, abs=1e-6)
    plain = low_rank(e, torch.tensor([1.0, 0, 1, 1]), 1)  # an input that was never active: no weights
    assert left_over(*plain) == pytest.approx(1.329578, abs=1e-6)
    assert left.numel() + right.numel() == 7


def group(right: list[list[float]], target: list[float], d: list[float]) -> tuple[list[int], list[float], float]:
    """Pair, values and loss of one row whose group is empty so far."""
    root = torch.tensor(d, dtype=torch.float64).sqrt()
    lines = torch.tensor(right, dtype=torch.float64) * root
    residual = torch.zeros(4, 4, dtype=torch.float64)
    residual[0] = torch.tensor(target, dtype=torch.float64) * root
    a = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    choices = torch.combinations(torch.arange(4))
    values, pair = best_group(a, lines, residual, torch.zeros(4, dtype=torch.float64), choices)
    left = residual[0] - values @ lines[pair]
    return pair.tolist(), values.tolist(), float(left.square().sum())


def test_armor_group_of_the_spec() -> None:
    target = [1, 0.2, 0.6, 0.5]
    mixed = [[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    eye = np.eye(4).tolist()
    for right, d, values, loss in (
        (mixed, [1, 1, 1, 1], [0.88, 0.6], 0.322),
        (mixed, [1, 4, 1, 1], [0.7, 0.6], 0.43),
        (eye, [1, 1, 1, 1], [1, 0.6], 0.29),
    ):
        pair, v, left = group(right, target, d)
        assert pair == [0, 2]
        np.testing.assert_allclose(v, values, atol=1e-6)
        assert left == pytest.approx(loss, abs=1e-6)


@settings(deadline=None, max_examples=2)
@given(seeds)
def test_armor_never_ends_above_its_beginning(seed: int) -> None:
    m = random_matrix(seed, out=16, inputs=16)
    state = Factors(m.weight, m.seen["square"].float(), TWO_OF_FOUR, 8, seed)
    nowag = state.loss()
    groups = (m.weight.square() * m.seen["square"].float()).view(-1, 4).sort(1).values
    assert nowag == pytest.approx(float(groups[:, :2].sum()), rel=1e-4)
    state.optimise(20, 1e-2, patience=100)
    assert state.loss() < nowag
    assert (state.mask.view(-1, 4).sum(1) == 2).all()
    # the exact step alone never raises the loss, even where A and B are no longer the identity
    before = state.loss()
    for _ in range(5):
        state.choose(torch.ones(16, 16))
        after = state.loss()
        assert after <= before * (1 + 1e-5)
        before = after


def test_armor_folds_its_normalisation_back() -> None:
    m = random_matrix(5, out=16, inputs=16)
    armor = Armor(block=8, iterations=30, lr=1e-2)
    folded = armor.prune(m, Quota(128, TWO_OF_FOUR))
    factored = armor.model_copy(update={"fold": False}).prune(m, Quota(128, TWO_OF_FOUR))
    assert factored.left is not None
    assert factored.right is not None
    np.testing.assert_allclose(assemble(factored.weight, factored.left, factored.right), folded.weight, atol=1e-5)
    assert (factored.weight[~factored.mask] == 0).all()
    assert folded.mask.all()
    one_off = armor.model_copy(update={"iterations": 0}).prune(m, Quota(128, TWO_OF_FOUR))
    same = one_off.weight != 0  # NoWag-P alone: the kept weights are the dense ones
    np.testing.assert_allclose(one_off.weight[same], m.weight[same], rtol=1e-5)


def test_bytes() -> None:
    assert bitmask_bytes(1000, 500, 2) == 125 + 1000
    assert csr_bytes((10, 100), 500, 4) == 500 * 6 + 44
    assert csr_bytes((10, 100_000), 500, 4) == 500 * 8 + 44
    assert pattern_bytes(576 * 1536, TWO_OF_FOUR, 2) / (576 * 1536 * 2) == 0.5625


@pytest.mark.parametrize(("keep", "of"), [(0, 4), (4, 4), (5, 4)])
def test_patterns_keep_some_and_not_all(keep: int, of: int) -> None:
    with pytest.raises(ValueError, match="keep at least 1 and fewer than all"):
        Pattern(keep, of)
