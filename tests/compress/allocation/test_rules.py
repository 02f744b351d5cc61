"""Every allocation's formula on the numbers of its specification, and what all of them guarantee."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.allocation import adapt, angular, capped_proportional, dp, erk, farms, loss_budget, owl
from pipeline.compress.allocation._blocks import linears
from pipeline.compress.allocation._knapsack import cheapest, rising
from pipeline.compress.allocation.base import Allocation, Evidence, Target
from pipeline.compress.allocation.global_rank import GlobalRank, normalised
from pipeline.compress.allocation.nirvana import Nirvana
from pipeline.compress.allocation.uniform import Uniform
from pipeline.compress.units import Part, Units
from pipeline.errors import ConfigError

torch = pytest.importorskip("torch")

from pipeline.compress.architecture import anatomy  # noqa: E402
from pipeline.compress.calibration import Calibration  # noqa: E402
from pipeline.models.training import Shape, new_lm  # noqa: E402

SMALL = Shape(hidden=16, layers=4, heads=4, kv_heads=2, mlp=24, vocab=257, context=16)


def llama(shape: Shape = SMALL) -> tuple[Any, Calibration]:
    model = new_lm(shape, 0).eval()
    return model, Calibration.of_blocks(model, np.random.default_rng(0).integers(0, 257, (4, 12)))


def matrices(body: Any) -> list[Part]:
    return [
        Part(name, i, body.modules[name].weight.numel(), 1.0) for i, names in enumerate(linears(body)) for name in names
    ]


def some(values: list[float] | list[int]) -> np.ndarray:
    return np.asarray(values, np.float64)


ones = np.ones


def test_owl() -> None:
    kept = owl.densities(some([1, 2, 4]), ones(3), 0.7, 0.08)
    np.testing.assert_allclose(kept, [0.228889, 0.282222, 0.388889], atol=5e-7)
    assert kept.mean() == pytest.approx(0.3)
    assert np.average(owl.densities(some([1, 2, 4]), some([1, 1, 8]), 0.7, 0.08), weights=[1, 1, 8]) == pytest.approx(
        0.3
    )
    np.testing.assert_allclose(owl.densities(ones(3), ones(3), 0.7, 0.08), 0.3)


def test_owl_counts_outliers_over_all_matrices_of_a_block() -> None:
    scores = [torch.tensor([[1.0, 1.0], [1.0, 20.0]]), torch.ones(2, 2)]  # mean 3.375: one of eight is above five times
    assert owl.outlier_share(scores, 5.0) == 12.5
    assert owl.outlier_share(scores[1:], 5.0) == 0


def test_angular_and_its_shrink_step() -> None:
    np.testing.assert_allclose(
        angular.densities(some([0.2, 0.1, 0.1, 0.4]), ones(4), 0.5, 1.0),
        [0.500031, 0.47505, 0.47505, 0.549868],
        atol=1e-6,
    )
    shrunk = angular.densities(some([2, 1, 1, 4]), ones(4), 0.2, 1.0)
    raw = some([0.8339, 0.4485, 0.4485, 1.4690])
    np.testing.assert_allclose(shrunk, 0.8 + (raw - 0.8) * 0.2 / 0.6690, atol=1e-4)
    assert (shrunk.max(), shrunk.mean()) == pytest.approx((1, 0.8))
    assert np.isfinite(angular.densities(some([0, 1000]), ones(2), 0.5, 1e-3)).all()


def test_farms() -> None:
    assert farms.hill(some([8, 4, 2, 1, 0.5]), k=3) == pytest.approx(1.721348, abs=5e-7)
    shares = farms.band(some([2, 3, 4]), some([100, 100, 200]), 0.7, 0.3)
    np.testing.assert_allclose(shares, [0.455814, 0.651163, 0.846512], atol=5e-7)
    assert np.average(shares, weights=[100, 100, 200]) == pytest.approx(0.7)


@pytest.mark.parametrize("fit", [farms.hill, farms.peak])
def test_the_exponent_of_a_power_law_is_found(fit: Any) -> None:
    uniform = (np.arange(2_000) + 0.5) / 2_000
    for alpha in (2.0, 3.5):
        assert fit(np.sort(uniform ** (-1 / (alpha - 1)))[::-1]) == pytest.approx(alpha, rel=0.05)


def test_windows_make_exponents_of_a_wide_and_a_square_matrix_alike() -> None:
    rng = np.random.default_rng(0)
    wide, square = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((64, 512), (64, 64)))
    alphas = [farms.hill(farms.eigenvalues(w, 64, 3)) for w in (wide, square)]
    assert alphas[0] == pytest.approx(alphas[1], rel=0.1)
    assert farms.hill(spectrum(wide)) > 1.5 * alphas[1]  # whole, it looks like less trained
    assert len(farms.eigenvalues(torch.ones(8, 8), 4, 2)) == 4  # rank one: zeros are dropped


def spectrum(weight: Any) -> np.ndarray:
    return np.sort(np.linalg.svd(weight.numpy(), compute_uv=False) ** 2)[::-1]


def test_capped_proportional() -> None:
    kept = capped_proportional.keep_amounts(
        some([100, 100, 100]), ones(3), some([8, 1, 1]), np.ones(3, bool), share=0.5, p_max=0.6
    )
    assert kept.tolist() == [64, 43, 43]
    kept = capped_proportional.keep_amounts(some([100, 100]), ones(2), some([99, 1]), np.ones(2, bool), 0.2, 0.6)
    assert kept.tolist() == [100, 60]  # what is above a part's size goes to the other


def test_zeroth_order_slope() -> None:
    w = torch.tensor([0.0, 1.0], dtype=torch.float64)
    slope = capped_proportional.slope(
        lambda: ((w[0] - 1) ** 2 + 10 * w[1] ** 2)[None], [w], [torch.tensor([1.0, -1.0], dtype=torch.float64)], 1e-3
    )
    assert slope == pytest.approx(22.0)
    assert w.tolist() == [0, 1]


def test_adapt_pruners_step() -> None:
    importance = some([-0.99, -0.95, -0.90, -0.5])
    shares = adapt.step_shares(importance, ones(4), 0.05, 0.02)
    np.testing.assert_allclose(shares, [0.0593, 0.0569, 0.0539, 0.03], atol=5e-5)
    np.testing.assert_allclose((0.05 - shares) / 0.02, [-0.4627, -0.3433, -0.1940, 1], atol=5e-5)
    assert shares.mean() == pytest.approx(0.05)
    np.testing.assert_array_equal(adapt.step_shares(np.full(3, 0.1), ones(3), 0.05, 0.02), 0.05)
    assert (adapt.step_shares(importance, ones(4), 0.01, 0.02) >= 0).all()


def test_loss_budgets() -> None:
    rises = loss_budget.budgets(5, 0.05, 0.1)
    np.testing.assert_allclose(rises, [0.05, 0.02502, 0.01252, 0.00626, 0.00313], atol=5e-6)
    assert rises[1] / rises[0] == pytest.approx(0.50034, abs=5e-6)
    for count, first in ((5, 0.05), (3, 0.01), (4, 0.3), (1, 0.05)):
        assert np.prod(1 + loss_budget.budgets(count, first, 0.1)) == pytest.approx(1.1)


def test_er_and_erk() -> None:
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3), (32, 16, 3, 3), (10, 32)]
    np.testing.assert_allclose(erk.densities(shapes, 0.2, kernel=False), [0.65788, 0.15581, 0.21814], atol=5e-6)
    np.testing.assert_allclose(erk.densities(shapes, 0.2, kernel=True), [0.55087, 0.11155, 1], atol=5e-6)
    linear = [(64, 32), (64, 64), (10, 64)]
    np.testing.assert_allclose(erk.densities(linear, 0.3, kernel=True), [0.32013, 0.21342, 0.78966], atol=5e-6)


CURVES = [some([0, 1, 5, 20]), some([0, 0.5, 1, 3])]
LEVELS = some([0, 0.25, 0.5, 0.75])


def test_dynamic_programming() -> None:
    levels = cheapest([LEVELS * 100] * 2, CURVES, target=100)
    assert levels is not None
    assert LEVELS[levels].tolist() == [0.25, 0.75]
    assert sum(curve[level] for curve, level in zip(CURVES, levels, strict=True)) == 4.0
    assert sum(curve[2] for curve in CURVES) == 6.0  # uniform
    parts = [Part("1", 0, 100, 1.0), Part("2", 1, 100, 1.0)]
    shares = dp.best_shares(parts, [LEVELS] * 2, CURVES, 100, grid=101, bins=1000)
    assert shares.tolist() == pytest.approx([0.25, 0.75])


def test_equal_curves_give_equal_shares() -> None:
    parts = [Part(str(i), i, 100, 1.0) for i in range(4)]
    convex = LEVELS**2
    assert dp.best_shares(parts, [LEVELS] * 4, [convex] * 4, 200, 101, 1000).tolist() == pytest.approx(
        [0.5] * 4, abs=0.011
    )


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=3), min_size=1, max_size=4
    ),
    st.integers(1, 30),
)
def test_the_knapsack_is_exact(items: list[list[tuple[int, int]]], target: int) -> None:
    sizes = [some([0, *(s for s, _ in item)]) for item in items]
    prices = [some([0, *(p for _, p in item)]) for item in items]
    choices = np.stack(np.meshgrid(*[np.arange(len(s)) for s in sizes], indexing="ij"), -1).reshape(-1, len(items))
    taken = np.array([sum(s[i] for s, i in zip(sizes, c, strict=True)) for c in choices])
    paid = np.array([sum(p[i] for p, i in zip(prices, c, strict=True)) for c in choices])
    levels = cheapest(sizes, prices, target, bins=target)
    if not (taken >= target).any():
        assert levels is None
        return
    assert levels is not None
    assert sum(s[i] for s, i in zip(sizes, levels, strict=True)) >= target
    assert sum(p[i] for p, i in zip(prices, levels, strict=True)) == paid[taken >= target].min()


def test_curves_are_made_to_rise() -> None:
    assert rising(some([0, 2, 1, 1.5, 4])).tolist() == [0, 1.5, 1.5, 1.5, 4]


def heads_and_neurons(dh: int, group: int, kv_heads: int = 2) -> list[Units]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=group * kv_heads, num_key_value_heads=kv_heads,
        head_dim=dh, intermediate_size=8, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        return anatomy(LlamaForCausalLM(config)).units("kv_group", "neuron")


@pytest.mark.parametrize(("dh", "group", "neurons"), [(128, 1, 170.67), (128, 4, 426.67), (64, 3, 170.67)])
def test_a_head_weighs_as_many_neurons_as_flap_says(dh: int, group: int, neurons: float) -> None:
    attention, mlp = heads_and_neurons(dh, group)
    assert attention.cost / mlp.cost == pytest.approx(neurons, abs=0.005)


def test_zscores_rank_heads_and_neurons_together_and_weigh_heads_by_parameters() -> None:
    heads = Units("0.kv_group", 0, 3, 10.0, "kv_group", ())
    neurons = Units("0.neuron", 0, 20, 1.0, "neuron", ())
    scores = [some([1, 2, 3]), np.arange(20.0)]
    # z of heads -1, 0, 1; of neurons -1.606 to 1.606 by 0.169. Lowest first: 4 neurons (4), head 0 (10), 6 neurons ...
    evidence = Evidence(None, scores=scores)  # type: ignore[arg-type]  # the rule measures nothing
    rule = GlobalRank(normalise="zscore")
    assert rule.keep([heads, neurons], Target(4 / 50), evidence).tolist() == [3, 16]
    assert rule.keep([heads, neurons], Target(14 / 50), evidence).tolist() == [2, 16]
    assert rule.keep([heads, neurons], Target(20 / 50), evidence).tolist() == [2, 10]
    np.testing.assert_allclose(normalised(np.full(5, 0.1), "zscore"), 0)  # no spread counts as zeros


def test_scores_of_one_unit_rank_by_parameter() -> None:
    parts = [Units("0.kv_group", 0, 2, 10.0, "kv_group", ()), Units("0.neuron", 0, 4, 1.0, "neuron", ())]
    scores = [some([5, 40]), some([1, 2, 3, 4])]
    keep = GlobalRank().keep(parts, Target(10 / 24), Evidence(None, scores=scores))  # type: ignore[arg-type]  # the rule measures nothing
    assert keep.tolist() == [1, 4]  # .5 a parameter against 1 and more
    keep = GlobalRank(per_parameter=False).keep(parts, Target(3 / 24), Evidence(None, scores=scores))  # type: ignore[arg-type]  # the rule measures nothing
    assert keep.tolist() == [2, 1]


def test_ties_go_to_the_first_part_and_no_layer_loses_more_than_its_cap() -> None:
    parts = [Part(str(i), i, 10, 1.0) for i in range(3)]
    evidence = Evidence(None, scores=[np.zeros(10)] * 3)  # type: ignore[arg-type]  # the rule measures nothing
    assert GlobalRank().keep(parts, Target(0.5, cap=0.9), evidence).tolist() == [1, 4, 10]


def test_heads_rank_by_what_goes_together() -> None:
    heads = [Units(f"{i}.query_head", i, 4, 1.0, "query_head", (), groups=2) for i in range(2)]
    scores = [some([0, 9, 9, 9]), some([4, 9, 4, 9])]  # the lowest of both groups together: 9 against 8
    keep = GlobalRank().keep(heads, Target(0.25), Evidence(None, scores=scores))  # type: ignore[arg-type]  # the rule measures nothing
    assert keep.tolist() == [4, 2]


@pytest.mark.parametrize(
    ("layers", "dh", "g", "h", "kv", "share", "gamma", "groups", "neurons"),
    [
        (32, 128, 4, 14336, 8, 0.2, 3.36, 17.62, 106078.8),
        (30, 64, 3, 1536, 3, 0.25, 1.0, 22.5, 11520),
        (30, 64, 3, 1536, 3, 0.25, 3.0, 9, 13824),
    ],
)
def test_nirvanas_split(
    layers: int, dh: int, g: int, h: int, kv: int, share: float, gamma: float, groups: float, neurons: float
) -> None:
    parts = [
        part
        for i in range(layers)
        for part in (
            Units(f"{i}.kv_group", i, kv, 2.0 * dh * (g + 1), "kv_group", ()),
            Units(f"{i}.neuron", i, h, 3.0, "neuron", ()),
        )
    ]
    rng = np.random.default_rng(0)
    scores = [rng.random(p.count) for p in parts]
    keep = Nirvana(gamma=gamma).keep(parts, Target(share), Evidence(None, scores=scores))  # type: ignore[arg-type]  # the rule measures nothing
    lost = np.array([p.count for p in parts]) - keep
    assert lost[::2].sum() == pytest.approx(groups, abs=0.51)
    # the neurons make up for the part of a group that cannot go
    assert lost[1::2].sum() == pytest.approx(neurons + (groups - lost[::2].sum()) * 2 * dh * (g + 1) / 3, abs=1)
    assert lost @ [p.cost for p in parts] == pytest.approx(share * sum(p.parameters for p in parts), abs=3)


def test_what_attention_cannot_give_the_mlps_do() -> None:
    parts = [Units("0.kv_group", 0, 2, 10.0, "kv_group", ()), Units("0.neuron", 0, 20, 1.0, "neuron", ())]
    scores = [some([1, 2]), np.arange(20.0)]
    keep = Nirvana(gamma=0.2).keep(parts, Target(0.5), Evidence(None, scores=scores))  # type: ignore[arg-type]  # the rule measures nothing
    assert keep.tolist() == [1, 10]


def test_uniform_and_layers_of_one_shape() -> None:
    parts = [Part(str(i), i, 1536, 3.0) for i in range(30)]
    evidence = Evidence(None)  # type: ignore[arg-type]  # the rule measures nothing
    assert set(Uniform().keep(parts, Target(0.2), evidence).tolist()) == {1228, 1229}
    assert set(Uniform(even=True).keep(parts, Target(0.2), evidence).tolist()) == {1229}
    assert set(Uniform(even=True).keep(parts, Target(0.2, multiple=64), evidence).tolist()) == {1216}


RULES: list[Allocation] = [
    Uniform(),
    GlobalRank(),
    GlobalRank(normalise="mean"),
    GlobalRank(normalise="zscore"),
    Nirvana(gamma=2.0),
    owl.Owl(outlier=2.0),
    angular.Angular(),
    adapt.Adapt(),
    farms.Farms(window=8),
    farms.Farms(window=8, fit="peak"),
    capped_proportional.CappedProportional(),
    capped_proportional.CappedProportional(scores="zeroth_order"),
    erk.Erk(),
    dp.Dp(levels=3, rows=2),
    loss_budget.LossBudget(rows=2, tasks=2, step=0.2),
]


@pytest.mark.parametrize("of", ["units", "matrices"])
@pytest.mark.parametrize(
    "rule", RULES, ids=lambda r: "-".join(map(str, r.model_dump(exclude_defaults=True).values())) or r.kind
)
def test_what_every_allocation_guarantees(rule: Allocation, of: str) -> None:
    """The total within one piece, cap and floor kept, at every ratio; the model as it was; the same again."""
    model, calibration = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    body = anatomy(model)
    parts = matrices(body) if of == "matrices" else list[Part](body.units("kv_group", "neuron"))
    if (of, rule.kind) in (("matrices", "nirvana"), ("units", "erk")):
        with pytest.raises(ConfigError, match=f"allocation {rule.kind}"):
            rule.keep(parts, Target(0.3), Evidence(body, calibration, [ones(p.count) for p in parts]))
        return
    rng = np.random.default_rng(0)
    scores = [rng.random(p.count) * (1 + p.layer) for p in parts]
    evidence = Evidence(body, calibration, scores)
    total = sum(p.parameters for p in parts)
    calibration.measure(*rule.probes(body, parts))
    for share in (0.0, 0.1, 0.3, 0.55):
        target = Target(share, cap=0.8, floor=1)
        keep = rule.keep(parts, target, evidence)
        assert keep.dtype == np.int64
        lost = np.array([p.count for p in parts]) - keep
        assert abs(lost @ [p.cost for p in parts] - share * total) <= max(p.cost for p in parts)
        assert (keep >= 1).all()
        assert all(n <= 0.8 * p.count + 1e-9 for n, p in zip(lost, parts, strict=True))
        np.testing.assert_array_equal(rule.keep(parts, target, evidence), keep)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


SAME = [
    r
    for r in RULES
    if r.kind not in ("erk", "dp", "farms", "loss_budget") and getattr(r, "scores", "") != "zeroth_order"
]


@pytest.mark.parametrize("rule", SAME, ids=lambda r: r.kind)
def test_statistics_that_are_all_the_same_give_uniform(rule: Allocation) -> None:
    """All layers of the model are the same and do nothing: every output is zero."""
    model, calibration = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.load_state_dict(model.model.layers[0].state_dict())
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    body = anatomy(model)
    parts = list[Part](body.units("neuron"))
    if rule.kind == "nirvana":
        rule, parts = Nirvana(), list[Part](body.units("kv_group", "neuron"))
    equal = [np.arange(1.0, p.count + 1) * p.cost for p in parts]
    keep = rule.keep(parts, Target(0.5), Evidence(body, calibration, equal))
    assert (np.abs(keep - np.array([p.count for p in parts]) / 2) <= 1e-9).all()


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (GlobalRank(), "nothing is scored"),
        (Nirvana(), "nothing is scored"),
        (owl.Owl(), "needs calibration"),
        (angular.Angular(), "needs calibration"),
        (adapt.Adapt(), "needs calibration"),
        (dp.Dp(), "needs calibration"),
        (loss_budget.LossBudget(), "needs calibration"),
        (capped_proportional.CappedProportional(), "nothing is scored"),
        (capped_proportional.CappedProportional(scores="zeroth_order"), "needs calibration"),
        (capped_proportional.CappedProportional(p_max=0.2), "below ratio"),
    ],
    ids=lambda x: getattr(x, "kind", ""),
)
def test_evidence_that_is_missing_is_named(rule: Allocation, says: str) -> None:
    model, _ = llama()
    body = anatomy(model)
    with pytest.raises(ConfigError, match=says):
        rule.keep(body.units("kv_group", "neuron"), Target(0.4), Evidence(body))


def test_scores_below_zero_have_no_proportions() -> None:
    parts = [Part("a", 0, 4, 1.0)]
    with pytest.raises(ConfigError, match="must not be negative"):
        capped_proportional.CappedProportional().keep(parts, Target(0.4), Evidence(None, scores=[-ones(4)]))  # type: ignore[arg-type]  # the rule measures nothing


def test_half_precision_has_no_slopes() -> None:
    model, calibration = llama()
    model.to(torch.bfloat16)
    body = anatomy(model)
    with pytest.raises(ConfigError, match="float32"):
        capped_proportional.CappedProportional(scores="zeroth_order").keep(
            body.units("neuron"), Target(0.4), Evidence(body, calibration)
        )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.5), st.floats(0.01, 0.3))
def test_a_ranking_is_monotone(seed: int, share: float, more: float) -> None:
    rng = np.random.default_rng(seed)
    parts = [Part(str(i), i, int(n), float(cost)) for i, (n, cost) in enumerate(rng.integers(2, 30, (5, 2)))]
    evidence = Evidence(None, scores=[rng.random(p.count) for p in parts])  # type: ignore[arg-type]  # the rule measures nothing
    before, after = (GlobalRank().keep(parts, Target(s, cap=1, floor=0), evidence) for s in (share, share + more))
    assert (after <= before).all()
