"""Tyr's search: the specification's toys, what it pays, and that it beats uniform shares on a trained model."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

torch = pytest.importorskip("torch")

from pipeline.compress.allocation._evolution import evolve, mutated  # noqa: E402
from pipeline.compress.allocation._supernet import Supernet  # noqa: E402
from pipeline.compress.allocation.base import Evidence, Target  # noqa: E402
from pipeline.compress.allocation.tyr import Tyr  # noqa: E402
from pipeline.compress.architecture import anatomy  # noqa: E402
from pipeline.compress.calibration import Calibration, InputMoments  # noqa: E402
from pipeline.compress.choice import divergence  # noqa: E402
from pipeline.compress.compensation.refit import solved  # noqa: E402
from pipeline.compress.steps.width import Width  # noqa: E402
from pipeline.compress.units import Part, lowest  # noqa: E402
from pipeline.errors import ConfigError  # noqa: E402

SMALL = {"kind": "tyr", "rounds": 2, "offspring": 12, "generations": 6, "halving": ((256, 4), (512, 2))}


def table(costs: list[list[float]]) -> Any:
    """Measures choices by a cost a part and level, which add up."""
    return lambda choices, effort: [sum(c[level] for c, level in zip(costs, choice, strict=True)) for choice in choices]


def test_the_curves_of_the_specification() -> None:
    """{0: 0, 25: 1, 50: 5, 75: 20} and {0: 0, 25: .5, 50: 1, 75: 3}: from (50, 50), which costs 6, to (25, 75): 4."""
    costs = [[0, 1, 5, 20], [0, 0.5, 1, 3]]
    found = evolve((2, 2), [4, 4], [[0, 1]], table(costs), [(1, 4), (2, 2)], 8, 5, 4, np.random.default_rng(0))
    assert found == (1, 3)
    assert table(costs)([(2, 2), found], 1) == [6, 4]


START, TYPES = (1, 2, 1, 1, 2), [[0, 1, 2], [3, 4]]


def searched(seed: int) -> tuple[Any, tuple[int, ...]]:
    """Costs of five parts at four levels, and the mix that the search found."""
    measure = table(np.random.default_rng(seed).random((5, 4)).cumsum(1).tolist())
    rng = np.random.default_rng(seed)
    return measure, evolve(START, [4] * 5, TYPES, measure, [(1, 8), (2, 2)], 64, 20, 4, rng)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_types_keep_their_totals_and_nothing_worse_is_found(seed: int) -> None:
    measure, found = searched(seed)
    assert (sum(found[:3]), sum(found[3:])) == (4, 3)
    assert all(0 <= level < 4 for level in found)
    assert measure([found], 1)[0] <= measure([START], 1)[0]


@pytest.mark.parametrize("seed", range(15))
def test_the_best_of_all_mixes_is_found(seed: int) -> None:
    """Of these seeds: a search by chance may miss it (with seed 53551 it does)."""
    measure, found = searched(seed)
    mixes = [m for m in product(range(4), repeat=5) if sum(m[:3]) == 4 and sum(m[3:]) == 3]
    assert measure([found], 1)[0] == pytest.approx(min(measure(mixes, 1)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_mutation_moves_levels_within_a_type(seed: int, swaps: int) -> None:
    parent = (0, 3, 2, 1, 0)
    child = mutated(parent, [4, 4, 4, 2, 1], [[0, 1, 2], [3, 4]], swaps, np.random.default_rng(seed))
    assert sum(child[:3]) == 5
    assert child[3:] == (1, 0)  # a full part and one that cannot move
    assert max(child) <= 3
    assert sum(abs(a - b) for a, b in zip(child, parent, strict=True)) <= 2 * swaps


def test_halving_measures_few_on_much_and_nothing_twice() -> None:
    asked: list[tuple[int, int]] = []

    def measure(choices: Any, effort: int) -> list[float]:
        asked.append((effort, len(choices)))
        return [float(choice[0]) for choice in choices]

    evolve((3, 0), [5, 5], [[0, 1]], measure, [(1, 3), (9, 2)], 40, 3, 1, np.random.default_rng(0))
    assert asked[0] == (1, 2)  # the parent itself, where a swap cannot be, and (2, 1)
    assert asked[1] == (9, 2)
    assert all(sum(n for e, n in asked if e == effort) <= 4 for effort in (1, 9))  # four mixes there are


def test_parents_that_no_offspring_beats_stay() -> None:
    found = evolve(
        (1, 1), [3, 3], [[0, 1]], lambda choices, effort: [float(c != (1, 1)) for c in choices],
        [(1, 2)], 8, 3, 1, np.random.default_rng(0),
    )  # fmt: skip
    assert found == (1, 1)  # one swap away is (2, 0) or (0, 2)


def test_levels_lie_around_what_goes_now_and_closer_every_round(
    tiny_trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 neurons an eighth is 8, then 4, then 2, on either side."""
    model, _, blocks = tiny_trained
    asked: list[Any] = []
    monkeypatch.setattr(Supernet, "build", lambda self, levels, damping: asked.append(levels))
    monkeypatch.setattr(Supernet, "divergences", lambda self, choices, *rest: [float(len(c)) for c in choices])
    body = anatomy(model)
    groups = body.units("neuron")
    scores = [np.arange(u.count, dtype=float) for u in groups]
    tyr = Tyr.model_validate(SMALL | {"rounds": 3, "reach": 2, "generations": 1})
    evidence = Evidence(body, Calibration.of_blocks(model, blocks[:2]), scores)
    keep = tyr.keep(groups, Target(0.5), evidence)
    assert asked[0] == [[16, 24, 32, 40, 48]] * 3
    assert [np.unique(np.diff(levels)).tolist() for levels in asked] == [[8], [4], [2]]
    assert all(len(own) == 5 for levels in asked for own in levels)
    assert np.sum(keep) == 96


def test_variants_are_the_exact_solution_of_the_specification() -> None:
    """H and W of the specification without channel 0: [[0, 2.3333, .8333], [0, .6667, -1.3333]]."""
    h = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]], dtype=torch.float64)
    w = torch.tensor([[0.5, 2, 1], [1, 0, -1]])
    goes, stays = torch.tensor([0]), torch.tensor([1, 2])
    torch.testing.assert_close(
        w[:, stays] + solved(w, h, goes, stays, "tyr"), torch.tensor([[7 / 3, 5 / 6], [2 / 3, -4 / 3]])
    )


def supernet(model: Any, blocks: np.ndarray) -> tuple[Supernet, Any, list[np.ndarray]]:
    body = anatomy(model)
    groups = body.units("neuron")
    rng = np.random.default_rng(0)
    scores = [rng.random(u.count) for u in groups]
    return Supernet(Calibration.of_blocks(model, blocks), body, groups, scores), groups, scores


def test_deeper_variants_are_measured_behind_the_mean_of_those_before(tiny_trained: Any) -> None:
    """By hand: the first block's down_proj at the mean of its variants, weighed by what they keep, then a forward."""
    model, _, blocks = tiny_trained
    net, groups, scores = supernet(model, blocks[:4])
    levels = [[0, 32], [16], [0]]
    before = deepcopy(model.state_dict())
    net.build(levels, 0.01)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert net.calibration.passes["forward"] == round(4 * 64 * (2 * 3 - 1) / 3)
    by_hand = deepcopy(model)
    weight = by_hand.get_submodule(groups[0].consumer).weight
    variants = []
    for stays, values in net.variants[0]:
        variants.append(torch.zeros_like(weight))
        variants[-1][:, stays] = values
    assert torch.equal(variants[0], weight)
    with torch.no_grad():
        weight.copy_(2 / 3 * variants[0] + 1 / 3 * variants[1])
        name = groups[1].consumer
        sums = Calibration.of_blocks(by_hand, blocks[:4]).measure(InputMoments((name,), gram=True))
        h = sums[f"{name}.gram"] / sums[f"{name}.count"]
        h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
        goes = torch.from_numpy(lowest(scores[1], groups[1].count - 16))
        stays, found = net.variants[1][0]
        old = before[f"{name}.weight"]
        torch.testing.assert_close(found, old[:, stays] + solved(old, h, goes, stays, ""), rtol=1e-3, atol=1e-5)


def test_a_subnet_is_the_cut_model_and_its_distance_is_charged(tiny_trained: Any) -> None:
    model, _, blocks = tiny_trained
    net, groups, scores = supernet(model, blocks[:4])
    net.build([[0, 24]] * 3, None)
    spent = net.calibration.passes["forward"]
    choices = [(0, 0, 0), (1, 0, 1)]
    found = net.divergences(choices, 100, 300)
    assert net.calibration.passes["forward"] - spent == 2 * 64 * 3  # two rows hold 100 tokens; the dense model, and two
    assert found[0] == pytest.approx(0, abs=1e-6)
    net.restore()
    cut = deepcopy(model)
    from pipeline.compress.surgery import cut as remove

    remove(cut, groups, {groups[i].name: lowest(scores[i], 40) for i in (0, 2)})
    assert found[1] == pytest.approx(divergence(model, cut, blocks[:2]), rel=1e-4)
    assert 0 < net.divergences(choices, 100, 4)[1] != pytest.approx(found[1], rel=1e-3)  # of four logits


def step(allocation: Any, **more: Any) -> Width:
    importance, compensation = {"kind": "obs"}, {"kind": "refit", "inputs": "pruned"}
    fields = {"ratio": 0.2, "importance": importance, "compensation": compensation, "allocation": allocation}
    return Width.model_validate(fields | more)


def test_it_beats_uniform_shares_and_the_same_seed_finds_the_same(tiny_trained: Any) -> None:
    model, _, blocks = tiny_trained
    far: dict[str, float] = {}
    kept: dict[str, Any] = {}
    for name, allocation in {"uniform": {"kind": "uniform"}, "tyr": SMALL, "again": SMALL}.items():
        own = deepcopy(model)
        calibration = Calibration.of_blocks(own, blocks[:8])
        outcome = step(allocation).apply(own, calibration)
        kept[name] = outcome.report["kept"]
        far[name] = divergence(model, own, blocks[8:])
        assert outcome.report["of_prunable"] == pytest.approx(0.2, abs=0.03)  # of two heads a layer, one or none goes
    assert kept["tyr"] == kept["again"] != kept["uniform"]
    assert far["tyr"] == far["again"] < 0.5 * far["uniform"], far


def test_the_model_is_put_back_whatever_happens(tiny_trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, blocks = tiny_trained
    body = anatomy(model)
    groups = body.units("kv_group", "neuron")
    scores = [np.arange(u.count, dtype=float) for u in groups]
    before = deepcopy(model.state_dict())
    evidence = Evidence(body, Calibration.of_blocks(model, blocks[:4]), scores)
    keep = Tyr(**SMALL).keep(groups, Target(0.3), evidence)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert np.array_equal(Tyr(**SMALL).keep(groups, Target(0), evidence), [u.count for u in groups])
    removed = sum((u.count - int(k)) * u.cost for u, k in zip(groups, keep, strict=True))
    largest = max(u.cost for u in groups)
    assert abs(removed - 0.3 * sum(u.parameters for u in groups)) <= largest / 2 + 1e-6

    def fails(*args: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Supernet, "divergences", fails)
    with pytest.raises(RuntimeError):
        Tyr(**SMALL).keep(groups, Target(0.3), evidence)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_it_refuses(tiny_trained: Any) -> None:
    model, _, blocks = tiny_trained
    body = anatomy(model)
    evidence = Evidence(body, Calibration.of_blocks(model, blocks[:2]))
    with pytest.raises(ConfigError, match="not for single weights"):
        Tyr().keep([Part("x", 0, 10, 1.0)], Target(0.5), evidence)
    with pytest.raises(ConfigError, match="not for hidden"):
        Tyr().keep(body.units("hidden"), Target(0.5), evidence)
    with pytest.raises(ConfigError, match="here nothing is scored"):
        Tyr().keep(body.units("neuron"), Target(0.5), evidence)
    with pytest.raises(ConfigError, match="needs calibration data"):
        Tyr().keep(body.units("neuron"), Target(0.5), Evidence(body))
    with pytest.raises(ValidationError, match="at least"):
        Tyr(halving=((0, 2),))
