"""Experts: the specification's toys, exact counts in every kind of mixture, and what is refused."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

torch = pytest.importorskip("torch")

from pipeline.compress.architecture import anatomy  # noqa: E402
from pipeline.compress.calibration import Calibration, Stage  # noqa: E402
from pipeline.compress.steps._experts import Routing, agglomerate, clusters, representative  # noqa: E402
from pipeline.compress.steps.experts import Experts, reap, stays  # noqa: E402
from pipeline.errors import ConfigError  # noqa: E402
from pipeline.models.training import lm_loss, pack, train_lm, train_tokenizer  # noqa: E402
from tests.tiny_lm import sentences  # noqa: E402

ROWS = np.array([[0, 0], [0.1, 0], [1, 0], [1, 0.1], [3, 3]])
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe")


def make(kind: str, experts: int = 8, **more: Any) -> Any:
    import transformers as t

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 400,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
    }
    moe: dict[str, Any] = {"num_experts": experts, "moe_intermediate_size": 12}
    grouped = {"moe_intermediate_size": 12, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "head_dim": 8}
    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "mixtral": (t.MixtralForCausalLM, t.MixtralConfig, {"num_local_experts": experts}),
        "qwen2_moe": (t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig, moe | {"shared_expert_intermediate_size": 20}),
        "qwen3_moe": (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig, moe | {"head_dim": 8}),
        "olmoe": (t.OlmoeForCausalLM, t.OlmoeConfig, {"num_experts": experts}),
        "glm4_moe": (
            t.Glm4MoeForCausalLM,
            t.Glm4MoeConfig,
            grouped | {"n_routed_experts": experts, "first_k_dense_replace": 0},
        ),
    }
    cls, config, own = classes[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config(**sizes | own | more)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def calibration(model: Any, rows: int = 16, batch: int = 8) -> Calibration:
    ids = np.random.default_rng(0).integers(0, 400, (rows, 24))
    return Calibration.of_blocks(model, ids, batch)


class Stub(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is any to the checker here
    """Three experts whose outputs have given norms, (tokens, experts)."""

    def __init__(self, norms: Any) -> None:
        super().__init__()
        self.norms, self.down_proj = torch.as_tensor(norms), torch.zeros(3, 1, 1)

    def forward(self, x: Any, chosen: Any, weight: Any) -> Any:
        size = (self.norms[x[:, 0].long()].gather(1, chosen) * weight).sum(1, keepdim=True)
        return torch.cat([0.6 * size, 0.8 * size], 1)


def test_reap_of_the_spec() -> None:
    stub = Stub([[1.0, 2, 0], [3, 0, 5], [0, 1, 4]])
    holder = torch.nn.Module()
    holder.experts = stub
    stage = Stage()
    hooks = list(Routing(("experts",)).hooks(holder, stage))
    tokens = torch.arange(3.0)[:, None]
    stub(tokens, torch.tensor([[0, 1], [0, 2], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]))
    for hook in hooks:
        hook.remove()
    routed, saliency = stage["experts.routed"].numpy(), stage["experts.saliency"].numpy()
    assert routed.tolist() == [2, 2, 2]
    np.testing.assert_allclose(reap(saliency, routed), [1.25, 0.75, 1.2], rtol=1e-6)
    # the sums of bare norms, 4, 3 and 9, would order them otherwise
    assert np.argsort(reap(saliency, routed)).tolist() == [1, 2, 0]
    assert np.argsort([4, 3, 9]).tolist() == [1, 0, 2]


def test_stun_of_the_spec() -> None:
    distance = np.linalg.norm(ROWS[:, None] - ROWS[None], axis=-1)
    np.testing.assert_allclose(
        [distance[0, 1], distance[2, 3], distance[1, 2], distance[0, 3]], [0.1, 0.1, 0.9, 1.005], atol=5e-4
    )
    assert clusters(distance, 0.5) == [[0, 1], [2, 3], [4]]
    assert clusters(distance, 0.95) == [[0, 1], [2, 3], [4]]  # 0 and 2 are 1.0 apart
    assert clusters(distance, 1.01) == [[0, 1, 2, 3], [4]]
    assert clusters(distance, 0) == [[0], [1], [2], [3], [4]]
    assert agglomerate(ROWS, 3) == [[0, 1], [2, 3], [4]]
    assert stays(ROWS, 3).tolist() == [True, False, True, False, True]
    assert representative(np.array([[0.0], [1.1], [2.0]]), [0, 1, 2]) == 1
    assert stays(np.concatenate([ROWS[:4], ROWS[:4] + 9]), 4, groups=2).tolist() == [True, False] * 4


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.booleans())
def test_agglomeration_meets_any_count(seed: int, count: int, ties: bool) -> None:
    rows = np.random.default_rng(seed).standard_normal((12, 3))
    rows = np.round(rows) if ties else rows
    found = agglomerate(rows, count)
    assert len(found) == count
    assert sorted(i for c in found for i in c) == list(range(12))
    assert int(stays(rows, count).sum()) == count


@pytest.mark.parametrize("criterion", ["reap", "frequency", "stun", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mixture_loses_a_quarter(kind: str, criterion: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = make(kind)
    before = deepcopy(model)
    outcome = Experts(ratio=0.25, criterion=criterion, least=8).apply(model, calibration(model))
    assert outcome.report["kept"] == {"0.expert": "6 of 8", "1.expert": "6 of 8"}
    removed = outcome.removed
    assert {name: index.tolist() for name, index in removed.items()} == outcome.report["removed"]
    body, dense = anatomy(model), anatomy(before)
    for i in range(2):
        kept = np.delete(np.arange(8), removed[f"{i}.expert"])
        new, old = body.layers[i].experts, dense.layers[i].experts
        assert new is not None
        assert old is not None
        assert new.count == 6
        assert (kept < 4).sum() == 3 or kind != "glm4_moe"  # the same number of each group
        for name in (f"{new.stack}.gate_up_proj", f"{new.stack}.down_proj", f"{new.router}.weight"):
            assert torch.equal(model.get_parameter(name), before.get_parameter(name)[kept])
    after = sum(p.numel() for p in model.parameters())
    assert outcome.report["removed_parameters"] == sum(p.numel() for p in before.parameters()) - after
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 13)


def test_nothing_to_remove_changes_nothing() -> None:
    model = make("mixtral")
    before = deepcopy(model.state_dict())
    own = calibration(model)
    Experts(ratio=0.05).apply(model, own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not own.passes


def test_one_batch_or_three_and_padding() -> None:
    found = []
    for batch in (12, 4):
        model = make("qwen2_moe")
        found.append(Experts(ratio=0.5, least=8).apply(model, calibration(model, 12, batch)).report)
    assert found[0] == found[1]
    model = make("qwen2_moe")
    stack = anatomy(model).layers[0].experts.stack  # type: ignore[union-attr]  # it has them
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 400, (2, 10)))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    routed = Calibration(model, [{"input_ids": ids, "attention_mask": mask}]).measure(Routing((stack,)))
    assert int(routed[f"{stack}.routed"].sum()) == 16 * 2


def test_reap_is_what_removing_changes() -> None:
    """g ||f|| is the size of what an expert adds to the stream for a token."""
    model = make("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False)
    own = calibration(model, 4, 4)
    stack = anatomy(model).layers[1].experts.stack  # type: ignore[union-attr]  # it has them
    sums = own.measure(Routing((stack,)))
    given: list[Any] = []
    handle = model.get_submodule(stack).register_forward_hook(
        lambda m, a, out: given.append((a[1][:, 0], out.norm(dim=-1)))
    )
    with torch.no_grad():
        model(**own.batches[0])
    handle.remove()
    chosen, size = given[0]
    expected = torch.zeros(8).index_add_(0, chosen, size)
    torch.testing.assert_close(sums[f"{stack}.saliency"].float(), expected, rtol=1e-4, atol=1e-6)


def test_experts_that_saw_little_are_not_ranked(caplog: pytest.LogCaptureFixture) -> None:
    model = make("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[6:] = 0
            layer.mlp.gate.weight[:6] *= 20  # the last two are hardly ever among the best two
    own = calibration(model)
    routed = own.measure(Routing(("model.layers.0.mlp.experts",)))["model.layers.0.mlp.experts.routed"]
    least = int(routed[6:].max()) + 1
    assert int(routed[:6].min()) >= least
    dense = deepcopy(model)
    with caplog.at_level(logging.WARNING):
        report = Experts(ratio=0.25, least=least).apply(model, own).report
    assert "2 of 8 experts were routed fewer than" in caplog.text
    assert not {6, 7} & set(report["removed"]["0.expert"])
    by_count = Experts(ratio=0.25, criterion="frequency").apply(dense, calibration(dense)).report
    assert by_count["removed"]["0.expert"] == [6, 7]
    assert by_count["routed"]["0.expert"] == routed.int().tolist()
    few = make("mixtral")
    with pytest.raises(ConfigError, match=r"only \d of 8 experts were routed 32 tokens or more, and 4 are to go"):
        Experts(ratio=0.5).apply(few, calibration(few, 2))


@pytest.mark.parametrize(
    ("kind", "ratio", "says"),
    [
        ("mixtral", 0.9, "leaves 1 of 8 experts in layer 0, and its router chooses 2"),
        ("glm4_moe", 0.75, "leaves 2 of 8"),
    ],
)
def test_fewer_experts_than_are_chosen_are_refused(kind: str, ratio: float, says: str) -> None:
    model = make(kind)
    with pytest.raises(ConfigError, match=says):
        Experts(ratio=ratio, criterion="stun").apply(model, calibration(model))


def test_other_errors(tiny_models: Any) -> None:
    with pytest.raises(ConfigError, match="no mixture of experts: use a width step"):
        Experts(ratio=0.5).apply(tiny_models["llama"].model, Calibration(tiny_models["llama"].model, []))
    with pytest.raises(ValidationError, match="less than 1"):
        Experts(ratio=1.0)


def test_reap_beats_chance_on_a_trained_mixture() -> None:
    texts = sentences(300)
    tokenizer = train_tokenizer(texts, 300)
    model = make("qwen3_moe", vocab_size=300)
    train_lm(model, pack([e.ids for e in tokenizer.encode_batch(texts)], 64, 0), 60, 8, 1e-2, 0)
    blocks = pack([e.ids for e in tokenizer.encode_batch(sentences(60, 1))], 64, 0)

    def loss(**fields: Any) -> float:
        own = deepcopy(model)
        Experts(ratio=0.5, **fields).apply(own, Calibration.of_blocks(own, blocks[:12]))
        return lm_loss(own, blocks[12:])

    chance = np.mean([loss(criterion="random", seed=seed) for seed in range(5)])
    assert loss(criterion="reap", least=1) < chance
