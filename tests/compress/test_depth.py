"""Depth: choices on the numbers of the specification, reruns that equal whole runs, and models that still work."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.compress.depth.choose import greedy, least_sum, one_shot
from pipeline.errors import ConfigError, TamisError

torch = pytest.importorskip("torch")

from pipeline.compress.architecture import anatomy  # noqa: E402
from pipeline.compress.calibration import Calibration, Turns  # noqa: E402
from pipeline.compress.depth.distance import distance  # noqa: E402
from pipeline.compress.depth.rerun import Trial, distances, left_out, output  # noqa: E402
from pipeline.compress.recover._features import normalised_feature_loss  # noqa: E402
from pipeline.compress.steps.depth import Depth, Spans  # noqa: E402
from pipeline.compress.surgery import remove_branches  # noqa: E402
from pipeline.models.training import Shape, lm_loss, new_lm  # noqa: E402

ones = np.ones(3)


def chain(gone: Any) -> float:
    """What leaving out terms changes of x (1 + a) (1 + b) (1 + c) at x = 1."""
    terms = np.array([1.5, 0.6, 1.6])
    return abs(float(np.delete(terms, list(gone)).prod() - terms.prod()))


def harm(gone: Any, candidates: Any) -> np.ndarray:
    return np.array([chain([*gone, i]) for i in candidates])


def test_greedy_beats_one_shot_where_harms_do_not_add_up() -> None:
    alone = harm((), range(3))
    np.testing.assert_allclose(alone, [0.48, 0.96, 0.54])
    shot, steps = one_shot(ones, alone, 2), greedy(ones, 2, harm)
    assert (sorted(shot), steps) == ([0, 2], [0, 1])
    assert (chain(shot), chain(steps), chain([1, 2])) == pytest.approx((0.84, 0.16, 0.06))
    assert min(chain(pair) for pair in combinations(range(3), 2)) == pytest.approx(0.06)
    sums = [alone[list(pair)].sum() for pair in ((0, 2), (0, 1), (1, 2))]
    assert sums == pytest.approx([1.02, 1.44, 1.50])


def test_the_knapsack_takes_the_cheapest_set_that_is_large_enough() -> None:
    cost, alone = np.array([10.0, 30, 12, 6]), np.array([0.48, 0.96, 0.54, 0.10])
    assert least_sum(cost, alone, 30) == [1]
    assert least_sum(cost, alone, 28) == [1]
    assert least_sum(cost, alone, 16) == [0, 3]
    assert least_sum(cost, alone, 59) is None
    assert one_shot(cost, alone, 16) == [3, 0]


def test_late_candidates_wait_until_others_are_gone_or_none_is_left() -> None:
    cost, late = np.ones(4), np.array([True, True, False, False])
    even = lambda gone, candidates: np.array([float(i) for i in candidates])  # noqa: E731
    assert greedy(cost, 3, even, late, after=1.5) == [2, 3, 0]
    assert greedy(cost, 3, even, late, after=9) == [2, 3, 0]
    assert greedy(cost, 2, even, late, after=0) == [2, 0]
    assert greedy(np.array([3.0, 1]), 1, even) == [1]  # the first is three times what is missing


def test_one_of_those_that_are_needed_stays() -> None:
    cost, alone, needed = np.ones(4), np.array([1.0, 2, 3, 9]), np.array([True, True, False, False])
    assert one_shot(cost, alone, 3, needed) == [0, 2, 3]
    assert greedy(cost, 3, lambda gone, candidates: alone[list(candidates)], needed=needed) == [0, 2, 3]
    assert least_sum(cost, alone, 3) == [0, 1, 2]
    assert least_sum(cost, alone, 3, needed) == [0, 2, 3]
    assert least_sum(cost, alone, 4, needed) is None


class States(torch.nn.Module):  # type: ignore[name-defined, misc]  # torch is any to the checker here
    """Blocks that put out given states, behind one token more in front, which must not count."""

    def __init__(self, *states: list[list[float]]) -> None:
        super().__init__()
        self.states = [torch.tensor([[[9.0, -9.0 * i], *state]]) for i, state in enumerate(states)]
        self.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in states[1:])
        for block, state in zip(self.blocks, self.states[1:], strict=True):
            block.forward = lambda hidden_states, state=state: state

    def forward(self, x: Any) -> Any:
        hidden = self.states[0]
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_block_influence_and_angles() -> None:
    model = States([[1, 0], [0, 1]], [[1, 1], [0, 1]], [[1, 1.2], [-1, 1]])
    calibration = Calibration(model, [{"x": torch.zeros(1, 3)}])
    sums = calibration.measure(Turns("blocks"), Spans("blocks", 1), Spans("blocks", 2))
    np.testing.assert_allclose(1 - sums["turn.cosine"] / sums["turn.tokens"], [0.146447, 0.148500], atol=5e-7)
    assert float(sums["turn.angle"][0] / 2) == pytest.approx(0.125)
    spans = Calibration(model, [{"x": torch.zeros(1, 3)}]).measure(Spans("blocks", 2))
    both = np.mean([np.arccos(1 / np.hypot(1, 1.2)), np.pi / 4]) / np.pi
    assert (spans["span.angle"] / spans["span.tokens"]).tolist() == pytest.approx([both])
    one = Calibration(model, [{"x": torch.zeros(1, 3)}]).measure(Spans("blocks", 1))
    np.testing.assert_allclose(one["span.angle"], sums["turn.angle"])


class WithoutMask(torch.nn.Module):  # type: ignore[name-defined, misc]  # torch is any to the checker here
    """A model that is not told which tokens somebody leaves out of a mean."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.model(input_ids)


def test_block_influence_is_that_of_optipfair(tiny_trained: tuple[Any, Any, np.ndarray]) -> None:
    depth = pytest.importorskip("optipfair.pruning.depth")
    model, _, blocks = tiny_trained
    ids = torch.from_numpy(blocks[:6].astype(np.int64))
    mask = torch.ones_like(ids)
    mask[:, 0] = 0  # the first token of all, where attention drains to, does not count with us
    batches = [{"input_ids": ids, "attention_mask": mask}]
    theirs = depth.analyze_layer_importance(WithoutMask(model), batches, "model.model.layers", show_progress=False)
    sums = Calibration.of_blocks(model, blocks[:6], 3).measure(Turns(anatomy(model).blocks))
    ours = 1 - sums["turn.cosine"] / sums["turn.tokens"]
    np.testing.assert_allclose(ours, [theirs[i] for i in range(len(theirs))], rtol=1e-4)


def test_distances() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    b = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert float(distance("fro", a, b)) == pytest.approx(3**0.5)
    assert float(distance("mse", a, b)) == pytest.approx(1.5)
    assert float(distance("angle", a, b)) == pytest.approx(np.pi / 4, abs=1e-3)
    assert float(distance("angle", a, -a)) == pytest.approx(np.pi / 2)  # negative cosines count as none
    p, q = (x.double().softmax(-1).numpy()[0] for x in (a, b))
    kl = (p * np.log(p / q)).sum(-1).mean()
    middle = (p + q) / 2
    jsd = ((p * np.log(p / middle)).sum(-1) + (q * np.log(q / middle)).sum(-1)).mean() / 2
    assert float(distance("kl", a, b)) == pytest.approx(kl, rel=1e-5)
    assert float(distance("jsd", a, b)) == pytest.approx(jsd, rel=1e-5)
    assert float(distance("jsd", 1000 * a, 1000 * b)) == pytest.approx(np.log(2) / 2, rel=1e-5)
    padded = torch.tensor([[True, False]])
    assert float(distance("mse", a, b, padded)) == pytest.approx(2)
    assert float(distance("kl", a[:, 0], b[:, 0])) == pytest.approx(float(distance("kl", a[:, :1], b[:, :1])))


@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
def test_a_branch_left_out_is_a_branch_removed(tiny_models: dict[str, Any], kind: Any) -> None:
    for name, tiny in tiny_models.items():
        before = tiny.output()
        with left_out(tiny.model, anatomy(tiny.model), [(1, kind)]):
            without = output(tiny.model, tiny.batch)
        assert torch.equal(tiny.output(), before), name
        remove_branches(tiny.model, [(1, kind)])
        torch.testing.assert_close(without, tiny.output(), msg=name)
        assert not torch.allclose(without, before), name


def test_reruns_from_a_block_equal_whole_runs_and_are_charged_for_what_ran(tiny_models: dict[str, Any]) -> None:
    for name in ("llama", "gpt2", "bert", "vit"):
        model, batch = tiny_models[name].model, tiny_models[name].batch
        body = anatomy(model)
        calibration = Calibration(model, [batch])
        changes: list[Any] = [[(i, kind)] for i in range(2) for kind in ("attention", "mlp", "block")]
        trials = [Trial(change[0][0], partial(left_out, model, body, change)) for change in changes]
        found = distances(calibration, body, trials, "fro", 2, base=[(0, "mlp")])
        rows = {key: value[:2] for key, value in batch.items()}
        dense = output(model, rows)
        for change, value in zip(changes, found, strict=True):
            with left_out(model, body, [(0, "mlp"), *change]):
                whole = distance("fro", dense, output(model, rows)).mean()
            assert value == pytest.approx(float(whole), rel=1e-6), (name, change)
    tokens = 2 * 12  # of a BERT without a head of tokens' share: two whole runs, three of both blocks, three of one
    calibration = Calibration(tiny_models["bert"].model, [tiny_models["bert"].batch])
    distances(calibration, body := anatomy(calibration.model), trials[:0], "fro", 2)
    assert calibration.passes["forward"] == tokens
    half = [Trial(1, partial(left_out, calibration.model, body, [(1, "mlp")]))]
    distances(calibration, body, half, "fro", 2)
    head = sum(p.numel() for p in calibration.model.get_submodule(body.head).parameters()) if body.head else 0
    block = sum(p.numel() for p in calibration.model.get_submodule(body.blocks)[1].parameters())
    assert calibration.passes["forward"] == 2 * tokens + round(tokens * (head + block) / (head + 2 * block))


def test_outputs_that_are_not_finite_stop_the_work(tiny_models: dict[str, Any]) -> None:
    tiny = tiny_models["llama"]
    with torch.no_grad():
        tiny.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(TamisError, match="not finite"):
        Depth(ratio=0.5, method="finercut").apply(tiny.model, Calibration(tiny.model, [tiny.batch]))


DEEP = Shape(hidden=16, layers=6, heads=2, kv_heads=1, mlp=24, vocab=257, context=16)


def deep() -> tuple[Any, Calibration]:
    model = new_lm(DEEP, 0).eval()
    return model, Calibration.of_blocks(model, np.random.default_rng(0).integers(0, 257, (3, 12)), batch=2)


SETTINGS: list[dict[str, Any]] = [
    {"method": "bi"},
    {"method": "angular"},
    {"method": "bi", "iterative": True},
    {"method": "contiguous"},
    {"method": "finercut"},
    {"method": "finercut", "units": "branch", "distance": "jsd"},
    {"method": "finercut", "units": "branch", "distance": "angle", "iterative": False},
    {"method": "additive"},
    {"method": "additive", "units": "branch"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_method_meets_the_ratio_and_leaves_a_model_that_generates(settings: dict[str, Any]) -> None:
    choices = []
    for _ in range(2):
        model, calibration = deep()
        before = sum(p.numel() for p in model.model.layers.parameters())
        outcome = Depth(ratio=1 / 3, layers=(0, None), **settings).apply(model, calibration)
        after = sum(p.numel() for p in model.model.layers.parameters())
        assert before - after == outcome.report["removed_parameters"]
        assert outcome.report["of_prunable"] == pytest.approx(1 / 3, abs=0.5 / 6)
        ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert ids.shape == (1, 7)
        choices.append(outcome.report["removed"])
    assert choices[0] == choices[1]


@pytest.mark.parametrize("method", ["bi", "contiguous", "finercut", "additive"])
def test_what_does_nothing_goes_first(method: Any) -> None:
    model, calibration = deep()
    with torch.no_grad():
        for i in (3, 4):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    before = output(model, calibration.batches[0])
    outcome = Depth(ratio=2 / 6, method=method, spare=0).apply(model, calibration)
    assert sorted(outcome.report["removed"]) == ["3.block", "4.block"]
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    torch.testing.assert_close(output(model, calibration.batches[0]), before)


def test_layers_that_are_left_out_stay() -> None:
    for method in ("bi", "contiguous", "finercut", "additive"):
        model, calibration = deep()
        outcome = Depth(ratio=0.5, method=method, layers=(2, -1)).apply(model, calibration)
        assert set(outcome.report["removed"]) < {"2.block", "3.block", "4.block"}
        assert outcome.report["removed"]


def test_nothing_goes_at_ratio_0() -> None:
    for settings in SETTINGS:
        model, calibration = deep()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        outcome = Depth(ratio=0, **settings).apply(model, calibration)
        assert outcome.report["removed"] == []
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_harms_that_do_not_add_up_are_chosen_greedily(tiny_trained: tuple[Any, Any, np.ndarray]) -> None:
    model, _, blocks = tiny_trained
    step = Depth(ratio=0.4, method="additive", units="branch", tolerance=0)
    report = step.apply(model, Calibration.of_blocks(model, blocks[:4])).report
    assert report["additive"] is False
    assert report["off"] == pytest.approx(abs(report["measured"] - report["predicted"]) / report["predicted"])


def test_finercut_beats_chance_and_the_worst_choice_on_a_trained_model(
    tiny_trained: tuple[Any, Any, np.ndarray],
) -> None:
    from copy import deepcopy

    model, _, blocks = tiny_trained
    train, held_out = blocks[:8], blocks[8:24]
    body = anatomy(model)
    cut = deepcopy(model)
    report = (
        Depth(ratio=0.3, method="finercut", units="branch", spare=0)
        .apply(cut, Calibration.of_blocks(cut, train))
        .report
    )
    branches: list[Any] = [(i, kind) for i in range(3) for kind in ("attention", "mlp")]
    chosen = [(int(name[0]), name[2:]) for name in report["removed"]]
    assert len(chosen) >= 1
    same = [
        set_
        for set_ in combinations(branches, len(chosen))
        if sorted(k for _, k in set_) == sorted(k for _, k in chosen)
    ]
    losses = []
    for other in same:
        with left_out(model, body, other):
            losses.append(lm_loss(model, held_out))
    assert lm_loss(cut, held_out) < np.mean(losses) - 0.1
    assert lm_loss(cut, held_out) <= np.quantile(losses, 0.5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ratio": 1}, "less than 1"),
        ({"ratio": 0.2, "units": "branch"}, "looks at whole blocks"),
        ({"ratio": 0.2, "method": "contiguous", "iterative": True}, "all at once"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Depth.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"ratio": 0.95}, "would remove all 6 blocks"), ({"ratio": 0.2, "layers": (6, None)}, "leaves no block")],
)
def test_errors_of_a_model(fields: dict[str, Any], says: str) -> None:
    model, calibration = deep()
    with pytest.raises(ConfigError, match=says):
        Depth(**fields).apply(model, calibration)


def test_features_of_every_layer_weigh_alike_in_distillation() -> None:
    rng = torch.Generator().manual_seed(0)
    shallow, deep_ = torch.randn(2, 3, 4, generator=rng), 100 * torch.randn(2, 3, 4, generator=rng)
    zero = [torch.zeros_like(shallow)] * 2
    assert float(normalised_feature_loss([shallow, deep_], zero, squared=True)) == pytest.approx(2)
    expected = float(shallow.norm() + deep_.norm())  # ||F||^2 / ||F||
    assert float(normalised_feature_loss([shallow, deep_], zero)) == pytest.approx(expected)
    assert float(normalised_feature_loss([shallow], [shallow])) == 0
    student = shallow.clone()
    student[:, 1:] += 5
    mask = torch.tensor([[True, False, False]] * 2)
    assert float(normalised_feature_loss([shallow], [student], mask)) == 0
    assert float(normalised_feature_loss([torch.zeros(1, 1, 2)], [torch.zeros(1, 1, 2)])) == 0
