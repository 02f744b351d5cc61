"""Single weights of stacked experts: each measured on its own tokens, counted exactly, written, read and healed."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pipeline.compress import folder  # noqa: E402
from pipeline.compress._weights import matrix, place  # noqa: E402
from pipeline.compress.allocation._blocks import linears, matrices  # noqa: E402
from pipeline.compress.architecture import anatomy  # noqa: E402
from pipeline.compress.calibration import Calibration  # noqa: E402
from pipeline.compress.healing import heal  # noqa: E402
from pipeline.compress.recover.perp import Perp  # noqa: E402
from pipeline.compress.sparse.base import Matrix, Quota  # noqa: E402
from pipeline.compress.sparse.wanda import Wanda  # noqa: E402
from pipeline.compress.steps.experts import Experts  # noqa: E402
from pipeline.compress.steps.sparse import Sparse  # noqa: E402
from pipeline.compress.steps.stun import Stun  # noqa: E402
from pipeline.errors import ConfigError  # noqa: E402
from pipeline.models.training import lm_loss  # noqa: E402
from tests.compress.test_experts import KINDS, calibration, make  # noqa: E402

GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def sparse(**fields: Any) -> Sparse:
    return Sparse.model_validate(fields)


def seen_by_hand(model: Any, batches: Any) -> tuple[list[Any], list[Any]]:
    """What every expert of the first layer reads, and what its down_proj does: token by token, expert by expert."""
    stack, rows = model.model.layers[0].mlp.experts, []
    hook = stack.register_forward_pre_hook(lambda module, args: rows.append((args[0].clone(), args[1].clone())))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    first: list[Any] = [[] for _ in stack.down_proj]
    for x, chosen in rows:
        for token, experts in zip(x, chosen, strict=True):
            for e in experts.tolist():
                first[e].append(token)
    inside = []
    with torch.no_grad():
        for e, tokens in enumerate(first):
            gate, up = (torch.stack(tokens) @ stack.gate_up_proj[e].T).chunk(2, 1)
            inside.append(torch.nn.functional.silu(gate) * up)
    return [torch.stack(tokens) for tokens in first], inside


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gblm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mixture_loses_exactly_half(kind: str, method: str) -> None:
    model = make(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    body = anatomy(model)
    inside = {place(body, name)[0] for block in matrices(body) for name in block}
    assert {n.rpartition(".")[2] for n in inside} == {"weight", "gate_up_proj", "down_proj"}
    outcome = sparse(ratio=0.5, method=method).apply(model, calibration(model))
    assert set(outcome.masks) == inside
    for name, value in model.named_parameters():
        if name not in inside:
            assert torch.equal(value, before[name])
            continue
        mask = outcome.masks[name]
        assert (value[~mask] == 0).all()
        for own in mask if mask.ndim == 3 else [mask]:  # each expert its half
            assert int(own.sum()) == own.numel() // 2
    assert outcome.report["removed_weights"] == sum(before[n].numel() for n in inside) // 2
    own = before[GATE_UP][0].numel()
    assert outcome.report["kept"][f"{GATE_UP}.7"] == f"{own // 2} of {own}"


def test_an_expert_is_pruned_by_what_is_routed_to_it() -> None:
    """Wanda on stacked experts is Wanda on a list of them, each with the tokens that reach it."""
    model = make("mixtral")
    measured = calibration(model)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = sparse(ratio=0.5, method="wanda", least=1, propagate="dense").apply(deepcopy(model), measured).masks
    # the step measured another model's copy: its first block reads the same as this one's
    first, inside = seen_by_hand(model, measured.batches)
    for name, read in ((GATE_UP, first), (DOWN, inside)):
        for e, x in enumerate(read):
            alone = Matrix("", dense[name][e], len(x), {"square": x.double().square().sum(0)})
            expected = Wanda().prune(alone, Quota(dense[name][e].numel() // 2)).mask
            assert float((masks[name][e] == expected).float().mean()) > 0.995  # ties of float noise aside


def test_experts_that_few_tokens_reach_go_by_magnitude() -> None:
    model = make("mixtral")
    bare = deepcopy(model)
    outcome = sparse(ratio=0.5, method="wanda", least=100).apply(model, calibration(model))
    routed = outcome.report["routed"]["model.layers.0.mlp.experts"]
    assert sum(routed.values()) == 2 * 16 * 24
    few = {int(e) for e, tokens in routed.items() if tokens < 100}
    assert 0 < len(few) < 8
    noted = {int(name.rpartition(".")[2]) for name in outcome.report["notes"] if name.startswith(GATE_UP)}
    assert noted == few
    rows = sparse(ratio=0.5, method={"kind": "magnitude", "scope": "row"}).apply(bare, calibration(bare))
    for e in range(8):
        assert torch.equal(outcome.masks[GATE_UP][e], rows.masks[GATE_UP][e]) == (e in few)


def test_padding_reaches_no_expert() -> None:
    model = make("qwen2_moe")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 400, (4, 24)))
    padded = torch.ones_like(ids)
    padded[:, 16:] = 0
    masks, routed = [], []
    for batch in ({"input_ids": ids, "attention_mask": padded}, {"input_ids": ids[:, :16]}):
        own = deepcopy(model)
        outcome = sparse(ratio=0.5, method="wanda", least=1).apply(own, Calibration(own, [batch]))
        masks.append(outcome.masks)
        routed.append(outcome.report["routed"])
    assert routed[0] == routed[1]
    for name, mask in masks[0].items():  # of experts, and of the shared one, which reads tokens without their rows
        assert float((mask == masks[1][name]).float().mean()) > 0.995


@pytest.mark.parametrize("allocation", ["owl", "farms", "erk", "snip"])
def test_allocations_know_experts(allocation: str) -> None:
    model = make("qwen3_moe")
    outcome = sparse(ratio=0.5, method="wanda", allocation=allocation, cap=1).apply(model, calibration(model))
    total = sum(mask.numel() for mask in outcome.masks.values())
    assert abs(sum(int((~mask).sum()) for mask in outcome.masks.values()) - total / 2) <= 1
    shares = {float(mask.float().mean()) for mask in outcome.masks.values()}
    assert len(shares) > 1


def test_stun_takes_experts_and_then_weights_to_one_ratio() -> None:
    model = make("mixtral")
    body = anatomy(model)
    before = sum(matrix(body, name).numel() for block in matrices(body) for name in block)
    outcome = Stun(ratio=0.4, experts=0.25).apply(model, calibration(model))
    assert anatomy(model).layers[0].experts.count == 6  # type: ignore[union-attr]  # it has them
    assert outcome.report["experts"]["kept"] == {"0.expert": "6 of 8", "1.expert": "6 of 8"}
    body = anatomy(model)
    left = [matrix(body, name) for block in matrices(body) for name in block]
    stay = sum(m.numel() for m in left) - sum(int((~mask).sum()) for mask in outcome.masks.values())
    assert stay == pytest.approx(0.6 * before, abs=1)
    assert outcome.report["of_prunable"] == pytest.approx(0.4, abs=1 / before)
    assert outcome.masks[GATE_UP].shape == (6, 48, 16)
    with pytest.raises(ConfigError, match=r"stun: 0\.5 of the experts are 0\.4.* of the weights, above ratio 0\.1"):
        Stun(ratio=0.1, experts=0.5).apply(make("mixtral"), calibration(model))


def test_experts_of_the_control_are_drawn_by_the_seed() -> None:
    def gone(step: Experts | Stun) -> dict[str, list[int]]:
        model = make("mixtral")
        removed = step.apply(model, calibration(model)).removed
        return {name: np.asarray(units).tolist() for name, units in removed.items()}

    drawn = [gone(Stun(ratio=0.4, experts=0.25, criterion="random", seed=seed)) for seed in range(3)]
    assert drawn == [gone(Experts(ratio=0.25, criterion="random", seed=seed)) for seed in range(3)]
    assert drawn[0] != drawn[1] != drawn[2]
    assert gone(Stun(ratio=0.4, experts=0.25)) == gone(Experts(ratio=0.25, criterion="stun"))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_a_sparse_mixture_is_loaded_generates_and_heals_without_losing_a_zero(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    outcome = Stun(ratio=0.5, experts=0.25).apply(model, calibration(model))
    before = folder.count(make(kind))
    folder.save(model, None, tmp_path / "model", {}, outcome.masks)
    again, _ = folder.load(tmp_path / "model")
    masks = folder.masks(tmp_path / "model")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 16)
    assert folder.ratios(before, folder.count(again, masks))["prunable"] == pytest.approx(0.5, abs=0.02)
    blocks = np.random.default_rng(0).integers(0, 40, (16, 16)).astype(np.int32)
    cut = lm_loss(again, blocks)
    healed = heal(again, Perp(rank=4, lr=1e-2, batch=4), blocks, 2048, directory=tmp_path / "heal", masks=masks)
    assert lm_loss(healed.model, blocks) < cut
    for name, mask in masks.items():
        weight = healed.model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight, model.get_parameter(name))


def test_factors_have_no_room_beside_experts_and_are_folded_into_them() -> None:
    model = make("mixtral")
    with pytest.raises(ConfigError, match="no room for factors beside their weights: set fold"):
        sparse(ratio=0.5, method="wanda", low_rank={}).apply(model, calibration(model))
    armor = {"kind": "armor", "block": 4, "iterations": 1, "fold": False}
    with pytest.raises(ConfigError, match="no room for factors"):
        sparse(pattern={"keep": 2, "of": 4}, method=armor).apply(model, calibration(model))
    ids, dense = calibration(model), deepcopy(model)
    off = {}
    for name, low_rank in {"bare": None, "folded": {"rank": 0.5, "fold": True}}.items():
        own = deepcopy(model)
        outcome = sparse(ratio=0.5, method="wanda", low_rank=low_rank).apply(own, Calibration(own, ids.batches))
        assert bool(outcome.masks) == (name == "bare")
        with torch.no_grad():
            off[name] = float((own(**ids.batches[0]).logits - dense(**ids.batches[0]).logits).norm())
    assert off["folded"] < off["bare"]


def test_names_of_matrices() -> None:
    body = anatomy(make("qwen2_moe"))
    blocks = matrices(body)
    shared = "model.layers.0.mlp.shared_expert"
    assert set(blocks[0]) - set(linears(body)[0]) == {
        *(f"{shared}.{n}_proj" for n in ("gate", "up", "down")),
        *(f"{own}.{e}" for own in (GATE_UP, DOWN) for e in range(8)),
    }
    assert place(body, f"{DOWN}.3") == (DOWN, 3)
    assert place(body, f"{shared}.up_proj") == (f"{shared}.up_proj.weight", -1)
    stack = body.modules["model.layers.0.mlp.experts"]
    assert torch.equal(matrix(body, f"{DOWN}.3"), stack.down_proj[3])
    matrix(body, f"{DOWN}.3").zero_()
    assert not stack.down_proj[3].any()
