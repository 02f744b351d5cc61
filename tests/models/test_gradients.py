"""Per-sample gradients are those of a loop with one row at a time, and the shortcuts are what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.models.gradients import (
    along,
    backward,
    ghost,
    head,
    linear_layers,
    outer,
    squared_norms,
    tapped,
    token_losses,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_toy_of_the_ghost_product() -> None:
    a1, b1 = torch.tensor([[[1.0, 2], [0, 1]]]), torch.tensor([[[1.0, 0, -1], [2, 1, 0]]])
    a2, b2 = torch.tensor([[[1.0, 1]]]), torch.tensor([[[1.0, 1, 0]]])
    assert ghost(a1, b1, a2, b2).item() == 6
    assert (outer(a1, b1) * outer(a2, b2)).sum().item() == 6
    assert ghost(a1, b1, a1, b1).item() == 23
    assert squared_norms(a1, b1).item() == outer(a1, b1).square().sum().item() == 23
    assert along(a1, b1, outer(a2, b2).view(3, 2)).item() == 6


@pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(3, 40, 30), (50, 4, 5)], ids=["ghost", "outer"])
def test_norms_are_the_same_by_either_way(tokens: int, d_in: int, d_out: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, tokens, d_in), torch.randn(4, tokens, d_out)
    expected = torch.einsum("nto,nti->noi", b, a).square().sum(dim=(1, 2))
    torch.testing.assert_close(squared_norms(a, b), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(ghost(a, b, a, b), expected, rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def model() -> object:
    """Two layers, with biases on q, k and v, heads that share keys, and an untied head."""
    config = transformers.Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).eval()


def rows(lengths: list[int]) -> tuple[object, object]:
    """Ids (n, T) padded with 0 at the ends, and the weights of a mean over tokens 3 and later."""
    rng = np.random.default_rng(0)
    ids, weight = np.zeros((len(lengths), max(lengths)), np.int64), np.zeros((len(lengths), max(lengths)), np.float32)
    for i, length in enumerate(lengths):
        ids[i, :length] = rng.integers(1, 50, length)
        weight[i, 2:length] = 1 / (length - 2)
    return torch.from_numpy(ids), torch.from_numpy(weight[:, 1:])


def loop(model: Any, layers: Any, ids: Any, weight: Any, lengths: Any) -> Any:
    """Gradients (n, p) by autograd, one row without padding at a time."""
    model.requires_grad_(True)
    found = []
    for i, length in enumerate(lengths):
        model.zero_grad()
        (token_losses(model, ids[i : i + 1, :length]) * weight[i, : length - 1]).sum().backward()
        parts = []
        for layer in layers.values():
            gradient = layer.weight.grad
            if layer.bias is not None:
                gradient = torch.cat([gradient, layer.bias.grad[:, None]], dim=1)
            parts.append(gradient.flatten())
        found.append(torch.cat(parts))
    model.requires_grad_(False)
    return torch.stack(found)


@pytest.mark.parametrize("which", ["full", "last", "v_proj"])
def test_gradients_of_a_padded_batch_are_those_of_a_loop(model: Any, which: str) -> None:
    layers = {"full": linear_layers, "last": head, "v_proj": lambda m: linear_layers(m, "v_proj")}[which](model)
    assert len(layers) == {"full": 15, "last": 1, "v_proj": 2}[which]
    lengths = [12, 5, 9, 3]
    ids, weight = rows(lengths)
    expected = loop(model, layers, ids, weight, lengths)
    taken = {}
    backward(model, layers, ids, weight, lambda name, a, b: taken.__setitem__(name, (a, b)))
    found = torch.cat([outer(*taken[name]) for name in layers], dim=1)
    assert expected.norm(dim=1).min() > 0.1
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4

    norms = sum(squared_norms(a, b) for a, b in taken.values())
    torch.testing.assert_close(norms, expected.square().sum(dim=1), rtol=1e-4, atol=0)
    direction = torch.randn(expected.shape[1])
    pieces = dict(zip(layers, direction.split([outer(*taken[name]).shape[1] for name in layers]), strict=True))
    products = sum(along(a, b, pieces[name].view(b.shape[2], a.shape[2])) for name, (a, b) in taken.items())
    torch.testing.assert_close(products, expected @ direction, rtol=1e-3, atol=1e-4)


def test_a_row_without_weight_has_no_gradient(model: Any) -> None:
    ids, weight = rows([6, 6])
    weight[1] = 0
    norms = torch.zeros(2)
    model.requires_grad_(False)
    backward(model, head(model), ids, weight, lambda name, a, b: norms.add_(squared_norms(a, b)))
    assert norms[0] > 0
    assert norms[1] == 0


def test_the_graph_begins_at_the_first_layer_that_is_asked_for(model: Any) -> None:
    model.requires_grad_(False)
    seen: list[bool] = []
    probe = model.model.layers[1].register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].requires_grad)
    )
    ids, weight = rows([5])
    for layers in (head(model), linear_layers(model)):
        backward(model, layers, ids, weight, lambda name, a, b: None)
    probe.remove()
    assert seen == [False, True]


def test_hooks_go_when_the_pass_ends_in_an_error(model: Any) -> None:
    layers = head(model)
    with pytest.raises(RuntimeError, match="stop"), tapped(layers, lambda name, a, b: None):
        raise RuntimeError("stop")
    assert not any(layer._forward_hooks for layer in layers.values())


def test_a_model_without_the_layers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="Sequential has no linear layer v_proj or q_proj"):
        linear_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), "v_proj", "q_proj")
