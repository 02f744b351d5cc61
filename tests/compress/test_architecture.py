"""What a model is made of, read from its modules."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.compress.architecture import anatomy
from pipeline.compress.surgery import axes, entries
from pipeline.compress.units import Kind, Member
from pipeline.errors import ConfigError
from tests.compress.conftest import Tiny, make_tiny
from tests.compress.test_surgery import MIXTURES, NAMES, mixture

torch = pytest.importorskip("torch")


def test_sizes_of_every_architecture(tiny_models: dict[str, Tiny]) -> None:
    kv_heads = {"llama": 2, "qwen2": 2, "qwen3": 2, "gpt2": 4, "bert": 4, "vit": 4}
    for name, tiny in tiny_models.items():
        body = anatomy(tiny.model)
        assert (body.family, body.hidden, len(body.layers)) == (name, 32, 2)
        for layer in body.layers:
            assert layer.attention is not None
            assert layer.mlp is not None
            attention = (layer.attention.heads, layer.attention.kv_heads, layer.attention.head_dim)
            assert attention == (4, kv_heads[name], 8)
            assert layer.mlp.width == (128 if name == "gpt2" else 48)


@pytest.mark.parametrize("name", NAMES)
def test_units_hold_all_that_layers_hold_but_what_the_stream_keeps(name: str) -> None:
    """Heads and neurons together are the layers' parameters without norms and without biases as long as the stream."""
    model = make_tiny(name).model
    body = anatomy(model)
    held = sum(u.parameters for u in body.units("kv_group", "neuron"))
    inside = {n: p for n, p in model.named_parameters() if n.startswith(f"{body.blocks}.")}
    outputs = {n for layer in body.layers for n in (layer.attention.output, layer.mlp.output)}  # type: ignore[union-attr]  # it has them
    of_stream = sum(p.numel() for n, p in inside.items() if "norm" in n.lower() or ".ln_" in n)
    of_stream += sum(p.numel() for n, p in inside.items() if n.removesuffix(".bias") in outputs)
    assert held == sum(p.numel() for p in inside.values()) - of_stream


@pytest.mark.parametrize("name", NAMES)
def test_channels_hold_a_share_of_everything_that_is_as_wide_as_the_stream(name: str) -> None:
    model = make_tiny(name).model
    body = anatomy(model)
    (hidden,) = body.units("hidden")
    touched = {id(p): p for m in body.stream for p, _ in axes(body.modules[m.module], m.side)}
    wide = {id(p): p for p in model.parameters() if 32 in p.shape}
    # A matrix or bias inside of attention may be 32 long as well: 4 heads of 8.
    assert touched.keys() <= wide.keys()
    inner = {n for n, p in model.named_parameters() if id(p) in wide.keys() - touched.keys()}
    assert all(n.endswith(".bias") and ("q_proj" in n or "query" in n or "k" in n or "v" in n) for n in inner)
    assert hidden.count == 32


def test_a_member_is_its_rows() -> None:
    assert entries(Member("q", "out", 4, 8), [0, 2]).tolist() == [8, 9, 10, 11, 16, 17, 18, 19]


def test_fused_queries_keys_and_values_lie_behind_each_other() -> None:
    model = make_tiny("gpt2").model
    (units, _) = anatomy(model).units("kv_group")
    fused = [m for m in units.members if m.module.endswith("c_attn")]
    assert [entries(m, [1])[0] for m in fused] == [8, 40, 72]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_a_mixture(name: str) -> None:
    body = anatomy(mixture(name))
    dense = [layer.mlp is not None for layer in body.layers]
    assert dense == [name == "glm4_moe", False]
    experts = body.layers[1].experts
    assert experts is not None
    assert (experts.count, experts.chosen) == (6, 2)
    assert len(experts.shared) == {"qwen2_moe": 4, "glm4_moe": 3}.get(name, 0)
    (units, *_) = body.units("expert")
    bias = int(name == "glm4_moe")  # a buffer, which is no parameter
    assert units.cost == 3 * 32 * experts.width + 32
    assert sum(p.shape[a] == 6 for m in units.members for p, a in axes(body.modules[m.module], m.side)) == 3 + bias


@pytest.mark.parametrize(
    ("name", "kinds", "why"),
    [
        ("llama", ("kv_group", "query_head"), "both remove heads"),
        ("gpt2", ("query_head",), "layer 0 has a key/value head for every query head"),
        ("llama", ("expert",), "a model of 'llama' has no expert"),
    ],
)
def test_units_that_a_model_has_not_are_refused(name: str, kinds: tuple[Kind, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        anatomy(make_tiny(name).model).units(*kinds)


def test_an_unknown_architecture_is_refused() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(hidden_size=32, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2, vocab_size=96)
    for model in (OPTForCausalLM(config), torch.nn.Linear(2, 2)):
        with pytest.raises(
            ConfigError, match=r"architecture '(opt|Linear)' is not known: units can be removed from bert"
        ):
            anatomy(model)


def test_a_model_without_a_head_is_known_by_the_same_parts() -> None:
    model: Any = make_tiny("llama").model
    bare = anatomy(model.model)
    assert [layer.name for layer in bare.layers] == ["layers.0", "layers.1"]
    assert (bare.embedding, bare.head) == ("embed_tokens", "")
