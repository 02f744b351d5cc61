"""A cut model computes what the zeroed one does, on every architecture; and what cannot be removed is refused."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.architecture import anatomy
from pipeline.compress.surgery import cut, keep_tokens, remove_branches, zero
from pipeline.compress.units import Kind
from pipeline.errors import ConfigError
from pipeline.models.training import Shape, new_lm
from tests.compress.conftest import make_tiny

torch = pytest.importorskip("torch")

NAMES = ("llama", "qwen2", "qwen3", "gpt2", "bert", "vit")
GONE = {"kv_group": [1], "query_head": [0, 3], "neuron": [0, 5, 47], "hidden": [1, 8, 30]}
"""Units to remove from every layer; `query_head` one of each of the two groups."""


def removal(model: Any, kind: Kind, gone: list[int] | None = None) -> tuple[Any, dict[str, np.ndarray]]:
    groups = anatomy(model).units(kind)
    return groups, {units.name: np.array(GONE[kind] if gone is None else gone, np.int64) for units in groups}


def gap(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max())


def both(tiny: Any, kind: Kind, gone: list[int] | None = None) -> tuple[Any, Any]:
    """The model with units zeroed, and with the same units cut."""
    zeroed, smaller = deepcopy(tiny.model), deepcopy(tiny.model)
    groups, removed = removal(tiny.model, kind, gone)
    zero(zeroed, groups, removed)
    cut(smaller, groups, removed)
    return zeroed, smaller


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in NAMES for k in ("kv_group", "neuron")]
    + [(n, "query_head") for n in NAMES[:3]]
    + [(n, "hidden") for n in NAMES[:3]],
)
def test_a_cut_model_computes_what_the_zeroed_one_does(name: str, kind: Kind, attention: str) -> None:
    tiny = make_tiny(name)
    tiny.model.set_attn_implementation(attention)
    zeroed, smaller = both(tiny, kind)
    assert gap(tiny.output(zeroed), tiny.output(smaller)) < 1e-5
    assert gap(tiny.output(zeroed), tiny.output()) > 1e-3  # what was removed did something


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_channels_behind_layer_norm_are_cut_approximately(name: str) -> None:
    tiny = make_tiny(name)
    gaps, as_they_were = [], []
    for seed in range(8):
        gone = sorted(np.random.default_rng(seed).permutation(32)[:3].tolist())
        zeroed, smaller = both(tiny, "hidden", gone)
        gaps.append(gap(tiny.output(zeroed), tiny.output(smaller)))
        with torch.no_grad():
            for norm in anatomy(smaller).norms:
                smaller.get_submodule(norm).weight.div_((32 / 29) ** 0.5)
        as_they_were.append(gap(tiny.output(zeroed), tiny.output(smaller)))
    assert 1e-5 < np.mean(gaps) < 0.08  # not exact, and said so
    assert np.mean(gaps) < 0.75 * np.mean(as_they_were)


def test_the_toy_of_the_norm_correction() -> None:
    """32 to 28 channels: off by 4e-2 without a correction, by 1e-4 with the gain alone, by float noise with both."""
    model = new_lm(Shape(hidden=32, layers=2, heads=4, kv_heads=2, mlp=64, vocab=300, context=64), 0).eval()
    ids = torch.arange(64).view(2, 32)
    groups, gone = removal(model, "hidden", [1, 8, 20, 31])
    zeroed, smaller = deepcopy(model), deepcopy(model)
    zero(zeroed, groups, gone)
    cut(smaller, groups, gone)

    def off() -> float:
        with torch.no_grad():
            return float((zeroed(ids).logits - smaller(ids).logits).abs().max())

    assert off() < 1e-6
    for module in smaller.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = model.config.rms_norm_eps
    assert 3e-5 < off() < 5e-4
    with torch.no_grad():
        for norm in anatomy(smaller).norms:
            smaller.get_submodule(norm).weight.div_((32 / 28) ** 0.5)
    assert 1e-2 < off() < 1e-1


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in NAMES for k in ("kv_group", "neuron", "hidden")])
def test_what_goes_is_what_the_units_cost(name: str, kind: Kind) -> None:
    model = make_tiny(name).model
    before = sum(p.numel() for p in model.parameters())
    groups, gone = removal(model, kind)
    cut(model, groups, gone)
    # Entries of a square matrix that lie in a removed row and in a removed column go once, but cost twice.
    twice = 9 if (name, kind) == ("bert", "hidden") else 0
    costs = sum(units.cost * len(gone[units.name]) for units in groups)
    assert before - sum(p.numel() for p in model.parameters()) == costs - twice


@pytest.mark.parametrize("name", NAMES)
def test_removing_nothing_changes_nothing(name: str) -> None:
    tiny = make_tiny(name)
    before, config = deepcopy(tiny.model.state_dict()), tiny.model.config.to_dict()
    groups, none = removal(tiny.model, "neuron", [])
    cut(tiny.model, groups, none)
    zero(tiny.model, groups, none)
    remove_branches(tiny.model, [])
    assert all(torch.equal(before[n], t) for n, t in tiny.model.state_dict().items())
    assert tiny.model.config.to_dict() == config


@settings(max_examples=10)
@given(st.data())
def test_any_ragged_removal_agrees(data: st.DataObject) -> None:
    tiny = make_tiny("llama")
    groups = anatomy(tiny.model).units("kv_group", "neuron", "hidden")
    gone = {
        u.name: np.array(sorted(data.draw(st.sets(st.integers(0, u.count - 1), max_size=u.count - 1))), np.int64)
        for u in groups
    }
    zeroed, smaller = deepcopy(tiny.model), deepcopy(tiny.model)
    zero(zeroed, groups, gone)
    cut(smaller, groups, gone)
    assert gap(tiny.output(zeroed), tiny.output(smaller)) < 2e-5
    assert {u.name: u.count for u in anatomy(smaller).units("kv_group", "neuron", "hidden")} == {
        u.name: u.count - len(gone[u.name]) for u in groups
    }


def test_a_cut_after_a_cut_is_one_cut() -> None:
    tiny = make_tiny("gpt2")
    once, twice = deepcopy(tiny.model), deepcopy(tiny.model)
    cut(once, *removal(once, "kv_group", [0, 2]))
    cut(twice, *removal(twice, "kv_group", [0]))
    cut(twice, *removal(twice, "kv_group", [1]))
    assert torch.equal(tiny.output(once), tiny.output(twice))


def test_modules_and_configuration_know_the_new_sizes() -> None:
    tiny = make_tiny("llama")
    model = tiny.model
    for kind in ("query_head", "neuron", "hidden"):
        cut(model, *removal(model, kind))
    config, attention = model.config, model.model.layers[0].self_attn
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 8)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (29, 45, 2)
    assert attention.num_key_value_groups == 1
    assert (attention.q_proj.in_features, attention.q_proj.out_features) == (29, 16)
    assert (model.model.embed_tokens.num_embeddings, model.model.embed_tokens.embedding_dim) == (96, 29)
    gpt2 = make_tiny("gpt2").model
    cut(gpt2, *removal(gpt2, "kv_group"))
    attention = gpt2.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf, attention.c_proj.nx) == (3, 24, 72, 24)
    bert = make_tiny("bert").model
    cut(bert, *removal(bert, "kv_group"))
    attention = bert.bert.encoder.layer[1].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (3, 24)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_tied_embeddings_stay_one_matrix(name: str) -> None:
    model = make_tiny(name).model
    cut(model, *removal(model, "hidden"))
    keep_tokens(model, np.arange(48))
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table is head
    assert table.untyped_storage().data_ptr() == head.untyped_storage().data_ptr()
    assert tuple(table.shape) == (48, 29)


# Query heads under grouped attention: conventions, section 3.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_key_value_group_goes_and_generation_is_that_of_zeros(attention: str) -> None:
    tiny = make_tiny("llama")
    tiny.model.set_attn_implementation(attention)
    zeroed, smaller = both(tiny, "kv_group")
    assert gap(tiny.output(zeroed), tiny.output(smaller)) < 1e-6
    assert torch.equal(greedy(zeroed, tiny), greedy(smaller, tiny))


def test_a_query_head_of_one_group_alone_is_refused_before_anything_changes() -> None:
    model = make_tiny("llama").model
    before = deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"\[1, 0\] would go from the 2 groups; each must lose the same number"):
        cut(model, *removal(model, "query_head", [1]))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_query_head_of_every_group_goes(attention: str) -> None:
    tiny = make_tiny("qwen3")
    tiny.model.set_attn_implementation(attention)
    zeroed, smaller = both(tiny, "query_head")
    assert smaller.model.layers[1].self_attn.num_key_value_groups == 1
    assert torch.equal(greedy(zeroed, tiny), greedy(smaller, tiny))


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in NAMES for k in ("kv_group", "neuron")] + [("llama", "query_head")]
)
def test_a_layer_that_loses_everything_loses_the_branch(name: str, kind: Kind) -> None:
    tiny = make_tiny(name)
    groups = anatomy(tiny.model).units(kind)
    gone = {groups[0].name: np.arange(groups[0].count)}
    zeroed, smaller = deepcopy(tiny.model), deepcopy(tiny.model)
    zero(zeroed, groups, gone)
    bias = getattr(zeroed.get_submodule(groups[0].consumer), "bias", None)
    if bias is not None:
        bias.data.zero_()  # what a branch adds without any unit goes with the branch
    cut(smaller, groups, gone)
    assert gap(tiny.output(zeroed), tiny.output(smaller)) < 1e-5
    layer = anatomy(smaller).layers[0]
    assert (layer.mlp if kind == "neuron" else layer.attention) is None


# Branches and blocks.


def greedy(model: Any, tiny: Any, use_cache: bool = True) -> Any:
    ids = tiny.batch["input_ids"]
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=use_cache,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def silence(model: Any, i: int, kind: str) -> None:
    """What a removed branch must equal: its last matrix and bias are 0."""
    branch = anatomy(model).layers[i].branch(kind)
    output = model.get_submodule(branch.output)
    for parameter in output.parameters():
        parameter.data.zero_()


@pytest.mark.parametrize(
    "branches", [[(0, "attention")], [(1, "attention")], [(0, "mlp")], [(0, "mlp"), (1, "attention")]]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_removed_branch_adds_nothing(name: str, branches: list[Any]) -> None:
    tiny = make_tiny(name)
    silent, smaller = deepcopy(tiny.model), deepcopy(tiny.model)
    for i, kind in branches:
        silence(silent, i, kind)
    remove_branches(smaller, branches)
    assert gap(tiny.output(silent), tiny.output(smaller)) < 1e-6
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in silent.parameters())
    if name in NAMES[:4]:
        assert torch.equal(greedy(silent, tiny), greedy(smaller, tiny))
        assert torch.equal(greedy(smaller, tiny), greedy(smaller, tiny, use_cache=False))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bert"])
def test_a_removed_block_leaves_the_stream_alone(name: str) -> None:
    tiny = make_tiny(name)
    silent, smaller, by_branches = (deepcopy(tiny.model) for _ in range(3))
    for kind in ("attention", "mlp"):
        silence(silent, 0, kind)
    remove_branches(smaller, [(0, "block")])
    remove_branches(by_branches, [(0, "attention"), (0, "mlp")])
    for model in (smaller, by_branches):
        assert gap(tiny.output(silent), tiny.output(model)) < 1e-6
        assert model.config.num_hidden_layers == 1
    if name in NAMES[:4]:
        assert torch.equal(greedy(smaller, tiny), greedy(smaller, tiny, use_cache=False))


def test_a_removed_block_of_bert_takes_its_norms_with_it() -> None:
    tiny = make_tiny("bert")
    expected = deepcopy(tiny.model)
    del expected.bert.encoder.layer[1]
    remove_branches(tiny.model, [(1, "block")])
    assert torch.equal(tiny.output(), tiny.output(expected))


def test_blocks_that_stay_are_numbered_anew() -> None:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=96, no_rope_layers=[1, 0, 1, 0, 1], pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = SmolLM3ForCausalLM(config)
    remove_branches(model, [(0, "block"), (3, "attention"), (4, "block")])
    assert [getattr(layer.self_attn, "layer_idx", None) for layer in model.model.layers] == [0, 1, None]
    assert (model.config.num_hidden_layers, model.config.layer_types) == (3, ["full_attention"] * 3)
    assert model.config.no_rope_layers == [0, 1, 0]


def test_attention_of_mixed_kinds_goes_only_with_its_block() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            vocab_size=96, use_sliding_window=True, sliding_window=4, max_window_layers=2,
        )
    ).eval()  # fmt: skip
    with pytest.raises(ConfigError, match="mixes kinds of attention"):
        remove_branches(model, [(1, "attention")])
    remove_branches(model, [(1, "block")])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    tiny = make_tiny("qwen2")
    assert torch.equal(greedy(model, tiny), greedy(model, tiny, use_cache=False))


@pytest.mark.parametrize(
    ("branches", "why"),
    [
        ([(2, "block")], "there is no layer 2"),
        ([(-1, "mlp")], "there is no layer -1"),
        ([(0, "block"), (1, "block")], "no block of the model would be left"),
        ([(0, "attention"), (1, "attention")], "no attention would be left"),
        ([(0, "attention"), (1, "block")], "no attention would be left"),
    ],
)
def test_too_much_is_refused(branches: list[Any], why: str) -> None:
    tiny = make_tiny("llama")
    before = tiny.output()
    with pytest.raises(ConfigError, match=why):
        remove_branches(tiny.model, branches)
    assert torch.equal(tiny.output(), before)


def test_a_branch_goes_once() -> None:
    model = make_tiny("llama").model
    remove_branches(model, [(0, "mlp")])
    with pytest.raises(ConfigError, match="layer 0 has no mlp"):
        remove_branches(model, [(0, "mlp")])


def test_nothing_left_is_refused() -> None:
    model = make_tiny("llama").model
    with pytest.raises(ConfigError, match="no channel"):
        cut(model, *removal(model, "hidden", list(range(32))))
    with pytest.raises(ConfigError, match="no attention would be left"):
        cut(model, *removal(model, "kv_group", [0, 1]))
    assert model.model.embed_tokens.weight.shape == (96, 32)


def test_units_of_another_model_are_refused() -> None:
    model = make_tiny("llama").model
    groups, gone = removal(model, "neuron")
    cut(model, groups, gone)
    with pytest.raises(ValueError, match="not those of the model"):
        cut(model, groups, gone)
    with pytest.raises(ValueError, match="different and within 0 to 44"):
        cut(model, *removal(model, "neuron", [45]))
    with pytest.raises(ValueError, match="different"):
        cut(model, *removal(model, "neuron", [1, 1]))


# Vocabulary.


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert"])
def test_kept_tokens_have_the_logits_that_they_had(name: str) -> None:
    tiny = make_tiny(name)
    ids = np.unique(np.r_[:3, tiny.batch["input_ids"].numpy().ravel(), 90])
    if name != "bert":
        tiny.model.config.eos_token_id = tiny.model.generation_config.eos_token_id = 90
    expected = tiny.output()[..., ids]
    smaller = deepcopy(tiny.model)
    keep_tokens(smaller, ids)
    batch = {"input_ids": torch.from_numpy(np.searchsorted(ids, tiny.batch["input_ids"].numpy()))}
    with torch.no_grad():
        assert gap(expected, smaller(**batch).logits) < 1e-6
    assert smaller.config.vocab_size == len(ids) == smaller.get_input_embeddings().num_embeddings
    if name != "bert":
        assert smaller.config.eos_token_id == smaller.generation_config.eos_token_id == list(ids).index(90)


def test_special_tokens_cannot_go() -> None:
    model = make_tiny("llama").model
    with pytest.raises(ConfigError, match="bos_token_id 1 is a special token"):
        keep_tokens(model, np.array([0, 2, 3]))
    with pytest.raises(ValueError, match="ascending"):
        keep_tokens(model, np.array([3, 2]))
    with pytest.raises(ConfigError, match="no vocabulary"):
        keep_tokens(make_tiny("vit").model, np.array([0]))


# Mixtures of experts.


def mixture(name: str) -> Any:
    import transformers as t

    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
        "num_experts_per_tok": 2, "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    config, model, more = {
        "mixtral": (t.MixtralConfig, t.MixtralForCausalLM, {"num_local_experts": 6}),
        "qwen2_moe": (t.Qwen2MoeConfig, t.Qwen2MoeForCausalLM, {"num_experts": 6, "moe_intermediate_size": 16}),
        "qwen3_moe": (t.Qwen3MoeConfig, t.Qwen3MoeForCausalLM, {"num_experts": 6, "moe_intermediate_size": 16}),
        "olmoe": (t.OlmoeConfig, t.OlmoeForCausalLM, {"num_experts": 6}),
        "glm4_moe": (
            t.Glm4MoeConfig,
            t.Glm4MoeForCausalLM,
            {"n_routed_experts": 6, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 8},
        ),
    }[name]
    if name == "qwen2_moe":
        more |= {"shared_expert_intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model(config(**sizes | more)).eval()
        for tensor in [*made.parameters(), *(b for n, b in made.named_buffers() if n.endswith("correction_bias"))]:
            tensor.data.copy_(0.2 * torch.randn_like(tensor))
    return made


MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe")


@pytest.mark.parametrize("name", MIXTURES)
def test_cut_experts_are_those_that_the_router_never_chooses(name: str) -> None:
    """The reference: the whole model whose routers do not see the removed experts' logits."""
    model, ids = mixture(name), torch.arange(24).view(2, 12)
    gone = np.array([0, 4])
    groups = anatomy(model).units("expert")
    smaller = deepcopy(model)
    cut(smaller, groups, {u.name: gone for u in groups})
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, smaller)]
    assert sizes[0] - sizes[1] == sum(2 * u.cost for u in groups)
    kept = np.delete(np.arange(6), gone)
    for layer in anatomy(model).layers:
        if layer.experts:
            _blind(model.get_submodule(layer.experts.router), kept)
    with torch.no_grad():
        assert gap(model(ids).logits, smaller(ids).logits) < 1e-5
    assert all(layer.experts.count == 4 for layer in anatomy(smaller).layers if layer.experts)


def _blind(router: Any, kept: np.ndarray) -> None:
    """Make a router choose among the kept experts alone: it sees their rows, and its choices are translated."""
    index = torch.from_numpy(kept)
    router.weight = torch.nn.Parameter(router.weight.data[index])
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias = router.e_score_correction_bias[index]
        router.num_experts = len(kept)
    router.register_forward_hook(lambda _, __, out: (out[0], out[1], index[out[2]]))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_loses_channels_and_branches(name: str) -> None:
    model, ids = mixture(name), torch.arange(24).view(2, 12)
    groups, gone = removal(model, "hidden", [1, 8, 20, 30])  # torch multiplies stacks of multiples of 4 floats only
    zeroed, smaller, without = deepcopy(model), deepcopy(model), deepcopy(model)
    zero(zeroed, groups, gone)
    cut(smaller, groups, gone)
    remove_branches(without, [(1, "mlp")])
    with torch.no_grad():
        assert gap(zeroed(ids).logits, smaller(ids).logits) < 1e-5
        assert without(ids).logits.isfinite().all()
    assert anatomy(without).layers[1].experts is None


def test_experts_stay_enough_for_the_router() -> None:
    model = mixture("mixtral")
    groups = anatomy(model).units("expert")
    with pytest.raises(ConfigError, match="1 experts would be left, of which the router chooses 2"):
        cut(model, groups, {groups[0].name: np.arange(5)})
    with pytest.raises(ConfigError, match="cut, not set to zero"):
        zero(model, groups, {groups[0].name: np.arange(2)})
    with pytest.raises(ConfigError, match="over all heads"):
        anatomy(mixture("olmoe")).units("kv_group")


def test_dense_layers_of_a_mixture_are_remembered() -> None:
    """Qwen2-MoE says by a step which layers are sparse; without a block, the step no longer fits."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        num_experts=4, num_experts_per_tok=2, intermediate_size=24, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, decoder_sparse_step=2,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    remove_branches(model, [(0, "block")])
    again = Qwen2MoeForCausalLM(model.config)
    assert [bool(x.experts) for x in anatomy(model).layers] == [True, False, True]
    assert [bool(x.experts) for x in anatomy(again).layers] == [True, False, True]
