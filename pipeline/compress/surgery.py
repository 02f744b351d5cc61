"""Removing from a model: units to zero, where they stay in place; units, branches, blocks and tokens for good.

`zero` and `cut` leave the same function to float noise, so a zeroed model is what a cut is tested against; what couples
rows and columns stands in `Units`, and what has to be told to the modules and the configuration stands here. Removing
nothing changes nothing, bit for bit.

Channels of the residual stream need more (conventions.md, section 4). A norm that takes the root mean square over d'
instead of d channels divides by sqrt(d / d') times as much, so `cut` multiplies its gain by sqrt(d / d'), and its
epsilon by d / d'. That is exact where the norm divides by the root mean square alone: from 32 to 28 channels of a toy
the logits of the zeroed and the cut model differ by 4e-2 without a correction, by 1.5e-4 with the gain alone, by
1.2e-7 with both.
(Transformers reads one epsilon for all norms of a model, so Qwen3's norms over a head get it too.) LayerNorm also
subtracts a mean, for which nothing is exact; there the gain alone takes the gap of tiny GPT-2, BERT and ViT (32 to 29
channels, mean of 20 draws each) from 8, 8 and 5 % to 5, 5 and 3 %, and norms want training before a model is judged.

A layer that loses all its heads or neurons loses the branch: no module stays there with a width of zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.compress.architecture import WIDTH_OVER_HEADS, Anatomy, BranchName, anatomy, named
from pipeline.compress.units import Member, Removal, Side, Units
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

BRANCH_OF: Mapping[str, BranchName] = {"kv_group": "attention", "query_head": "attention", "neuron": "mlp"}
SPECIAL = "_token_id"
"""How configurations end the names of special tokens' ids."""


def axes(owner: Any, side: Side) -> list[tuple[torch.Tensor, int]]:
    """The parameters of a module (and a router's correction of its scores, a buffer) that have a side, and along which
    axis."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(owner, torch.nn.Parameter):
        return [(owner, owner.ndim - 1)] if side == "out" else []
    if hasattr(owner, "gate_up_proj"):  # experts, stacked: (E, 2h, d) and (E, d, h)
        read, put = owner.gate_up_proj, owner.down_proj
        return {"expert": [(read, 0), (put, 0)], "in": [(read, 2)], "out": [(put, 1)]}[side]
    weight = owner.weight
    if isinstance(owner, nn.Embedding):
        axis = 1
    elif weight.ndim == 1:
        axis = 0
    elif isinstance(owner, Conv1D):
        axis = 1 if side == "out" else 0
    else:
        axis = 0 if side == "out" else 1
    vectors = [getattr(owner, name, None) for name in ("bias", "e_score_correction_bias")] if side == "out" else []
    factor = getattr(owner, {"out": "left", "in": "right"}[side], None)  # of a low-rank part: (out, r), (r, in)
    factors = [] if factor is None else [(factor, 0 if side == "out" else 1)]
    return [(weight, axis), *factors, *((vector, 0) for vector in vectors if vector is not None)]


def entries(member: Member, units: Iterable[int]) -> np.ndarray:
    """Indices along a module's side of some units (int64)."""
    chosen = np.asarray(list(units), np.int64)
    return (member.offset + chosen[:, None] * member.size + np.arange(member.size)).ravel()


def zero(model: nn.Module, groups: Sequence[Units], removal: Removal) -> None:
    """Set everything that belongs to the removed units to 0, in place.

    Raises ConfigError for experts: a router whose row is zero still chooses them.
    """
    import torch

    modules = named(model)
    with torch.no_grad():
        for units in _going(groups, removal):
            if units.kind == "expert":
                raise ConfigError(
                    f"{units.name}: experts are cut, not set to zero: their router would still choose them"
                )
            for member in units.members:
                index = torch.from_numpy(entries(member, removal[units.name]))
                for parameter, axis in axes(modules[member.module], member.side):
                    parameter.index_fill_(axis, index.to(parameter.device), 0)


def cut(model: nn.Module, groups: Sequence[Units], removal: Removal) -> None:
    """Take the removed units out, in place: matrices are smaller, and modules and configuration know it.

    Where all heads or all neurons of a layer go, the branch does. Raises ConfigError where units cannot go so (query
    heads unevenly, every channel, fewer experts than the router chooses), ValueError where a removal does not fit.
    """
    before = anatomy(model)
    going = _going(groups, removal)
    if not going:
        return
    known = {units.name: units for kind in {u.kind for u in going} for units in before.units(kind)}
    for units in going:
        _check(before, units, known.get(units.name), np.asarray(removal[units.name]))
    emptied = [(u.layer, BRANCH_OF[u.kind]) for u in going if len(removal[u.name]) == u.count]
    lost: dict[int, tuple[torch.Tensor, dict[int, list[np.ndarray]]]] = {}
    for units in going:
        if len(removal[units.name]) == units.count:
            continue
        for member in units.members:
            for parameter, axis in axes(before.modules[member.module], member.side):
                _, along = lost.setdefault(id(parameter), (parameter, {}))
                along.setdefault(axis, []).append(entries(member, removal[units.name]))
    _plan_branches(model, before, emptied)  # refuses before anything has changed
    _replace(model, {key: _without(parameter, along) for key, (parameter, along) in lost.items()})
    after = anatomy(model)
    if after.hidden < before.hidden:
        _narrow(model, after, before.hidden / after.hidden)
    tell(model)
    if emptied:
        remove_branches(model, emptied)


def remove_branches(model: nn.Module, branches: Iterable[tuple[int, BranchName | Literal["block"]]]) -> None:
    """Take the attention or the MLP of layers out, or whole blocks, in place; layers are counted as they are before.

    A branch makes room for one that gives zeros and keeps no keys and values; the norm before it goes with it. A
    block that has no branch left goes altogether where norms stand before branches. Layers that stay are numbered
    anew, in the modules (for the cache) and in the configuration. Raises ConfigError for a branch that is not there,
    and where no attention or no block would stay.
    """
    from torch import nn

    body = anatomy(model)
    single, blocks = _plan_branches(model, body, branches)
    for i, kind in single:
        branch = body.layers[i].branch(kind)
        assert branch is not None
        for name in branch.removable:
            _put(model, name, _absent()(pair=kind == "attention" and name == branch.name))
        if branch.norm:
            _put(model, branch.norm, nn.Identity())
    if blocks:
        kept = [layer for i, layer in enumerate(model.get_submodule(body.blocks)) if i not in blocks]
        _put(model, body.blocks, nn.ModuleList(kept))
        _renumber(model.config, len(body.layers), blocks)
    if single or blocks:
        tell(model)


def keep_tokens(model: nn.Module, ids: np.ndarray) -> None:
    """Keep these tokens (int, ascending, different), in place: row i of embedding and head is that of token `ids[i]`.

    The ids of special tokens in the configurations follow; the tokenizer is the caller's. Raises ConfigError where a
    special token would go, ValueError for ids that are not ascending or out of range.
    """
    import torch

    body = anatomy(model)
    if not body.embedding:
        raise ConfigError(f"a model of {body.family!r} has no vocabulary")
    table = body.modules[body.embedding]
    old, ids = table.num_embeddings, np.asarray(ids, np.int64)
    if not len(ids) or ids[0] < 0 or ids[-1] >= old or (np.diff(ids) <= 0).any():
        raise ValueError(f"token ids must be ascending, different and within 0 to {old - 1}")
    if len(ids) == old:
        return
    configs = [c for c in (model.config, getattr(model, "generation_config", None)) if c is not None]
    special = [(c, n, v) for c in configs for n, v in vars(c).items() if n.endswith(SPECIAL) and v is not None]
    new = {int(token): i for i, token in enumerate(ids)}
    for _, name, value in special:
        if gone := [t for t in _listed(value) if t < old and t not in new]:
            raise ConfigError(f"{name} {gone[0]} is a special token of the model and cannot go: keep it among the ids")
    keep = torch.from_numpy(ids).to(table.weight.device)
    head = body.modules[body.head] if body.head else None
    rows = [p for p in (table.weight, getattr(head, "weight", None), getattr(head, "bias", None)) if p is not None]
    _replace(model, {id(p): _like(p, p.data.index_select(0, keep)) for p in rows})
    if table.padding_idx is not None:
        table.padding_idx = new.get(table.padding_idx)
    for config, name, value in special:
        moved = [new.get(t, t) for t in _listed(value)]
        setattr(config, name, moved if isinstance(value, list) else moved[0])
    for owner in (model.config, *model.modules()):
        _set(owner, {"vocab_size": len(ids)})


def tell(model: nn.Module) -> None:
    """Tell modules and configuration the sizes that the matrices have.

    What differs between layers a configuration cannot say: such a value stays as it was.
    """
    body = anatomy(model)
    attentions = [layer.attention for layer in body.layers if layer.attention]
    mlps = [layer.mlp for layer in body.layers if layer.mlp]
    mixtures = [layer.experts for layer in body.layers if layer.experts]
    for i, a in enumerate(attentions):
        own = body.modules[a.name]
        width = a.heads * a.head_dim
        _set(own, {"num_heads": a.heads, "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads})
        _set(own, {"num_key_value_groups": a.group, "all_head_size": width, "split_size": width, "layer_idx": i})
    for m in mlps:
        _set(body.modules[m.name], {"intermediate_size": m.width})
    for e in mixtures:
        for name in (e.name, e.stack, e.router):
            _set(body.modules[name], {"num_experts": e.count, "hidden_dim": body.hidden})
    shared = {
        "hidden_size": {body.hidden},
        "num_hidden_layers": {len(body.layers)},
        "head_dim": {a.head_dim for a in attentions} if body.family not in WIDTH_OVER_HEADS else set(),
        "num_attention_heads": {a.heads for a in attentions},
        "num_key_value_heads": {a.kv_heads for a in attentions},
        "intermediate_size": {m.width for m in mlps},
        "n_inner": {m.width for m in mlps},
        "num_experts": {e.count for e in mixtures},
        "num_local_experts": {e.count for e in mixtures},
    }
    config: Any = model.config
    if len(shared["head_dim"]) == 1:
        config.head_dim = next(iter(shared["head_dim"]))  # what it would be by default, d / H, is wrong from here on
    one = {name: next(iter(sizes)) for name, sizes in shared.items() if len(sizes) == 1}
    _set(config, one)
    _set(model, {"num_experts": one["num_experts"]} if "num_experts" in one else {})


def _going(groups: Sequence[Units], removal: Removal) -> list[Units]:
    return [units for units in groups if len(removal.get(units.name, ()))]


def _check(body: Anatomy, units: Units, known: Units | None, removed: np.ndarray) -> None:
    """Raise where these units cannot go. `known`: those of the name in the model as it is."""
    if len(np.unique(removed)) < len(removed) or removed.min() < 0 or removed.max() >= units.count:
        raise ValueError(f"{units.name}: removed indices must be different and within 0 to {units.count - 1}")
    if known is None or known.count != units.count:
        raise ValueError(f"{units.name}: these units are not those of the model: look at its anatomy again")
    left = units.count - len(removed)
    if units.kind == "hidden" and not left:
        raise ConfigError("hidden: no channel of the residual stream would be left")
    if units.kind == "expert" and (experts := body.layers[units.layer].experts) and left < experts.chosen:
        raise ConfigError(f"{units.name}: {left} experts would be left, of which the router chooses {experts.chosen}")
    lost = np.bincount(removed // (units.count // units.groups), minlength=units.groups)
    if len(np.unique(lost)) > 1:
        raise ConfigError(
            f"{units.name}: {lost.tolist()} would go from the {units.groups} groups; each must lose the same number, "
            "since attention and routers take groups to be of one size"
        )


def _plan_branches(
    model: nn.Module, body: Anatomy, branches: Iterable[tuple[int, BranchName | Literal["block"]]]
) -> tuple[list[tuple[int, BranchName]], set[int]]:
    """Branches to take out one by one, and blocks to take out whole. Raises ConfigError where that cannot be."""
    both: tuple[BranchName, ...] = ("attention", "mlp")
    asked = list(dict.fromkeys(branches))
    blocks = {i for i, kind in asked if kind == "block"}
    single: list[tuple[int, BranchName]] = [(i, kind) for i, kind in asked if kind != "block" and i not in blocks]
    for i, kind in asked:
        if not 0 <= i < len(body.layers):
            raise ConfigError(f"there is no layer {i} to remove from: the model has {len(body.layers)}")
        if kind != "block" and body.layers[i].branch(kind) is None:
            raise ConfigError(f"layer {i} has no {kind} that could go")
    if body.family != "bert":  # there, a norm stands behind each branch and works on without it
        blocks |= {
            i for i, layer in enumerate(body.layers) if all((i, b) in single or not layer.branch(b) for b in both)
        }
    single = [(i, kind) for i, kind in single if i not in blocks]
    if len(blocks) == len(body.layers):
        raise ConfigError("no block of the model would be left")
    left = {i for i, layer in enumerate(body.layers) if layer.attention and i not in blocks} - {
        i for i, kind in single if kind == "attention"
    }
    if asked and not left:
        raise ConfigError("no attention would be left in the model: keep at least one")
    kinds = getattr(model.config, "layer_types", None) or ()
    if len(set(kinds)) > 1 and any(kind == "attention" for _, kind in single):
        raise ConfigError(
            "this model mixes kinds of attention, which its cache tells apart by the layer's number; remove whole "
            "blocks instead of single attentions"
        )
    return single, blocks


def _renumber(config: Any, layers: int, gone: set[int]) -> None:
    """Take blocks out of what a configuration says layer by layer."""
    stay = [i for i in range(layers) if i not in gone]
    sparse = getattr(config, "mlp_only_layers", None), getattr(config, "decoder_sparse_step", 1)
    dense_first = getattr(config, "first_k_dense_replace", None)
    config.num_hidden_layers = len(stay)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(values := getattr(config, name, None), list):
            setattr(config, name, [values[i] for i in stay])
    if sparse[0] is not None:
        dense = [i in sparse[0] or (i + 1) % sparse[1] != 0 for i in stay]
        config.mlp_only_layers, config.decoder_sparse_step = [i for i, is_dense in enumerate(dense) if is_dense], 1
    if dense_first is not None:
        config.first_k_dense_replace = sum(i < dense_first for i in stay)


@cache
def _absent() -> type[nn.Module]:
    """The class of what stands in for a removed branch; made on demand, for torch is imported late."""
    import torch
    from torch import nn

    class Absent(nn.Module):  # type: ignore[misc]  # torch is untyped here
        """Gives zeros of the shape that it reads; as a `pair`, with None for the attention's weights."""

        def __init__(self, pair: bool) -> None:
            super().__init__()
            self.pair = pair

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            zeros = torch.zeros_like(hidden_states)
            return (zeros, None) if self.pair else zeros

    return Absent


def _without(parameter: torch.Tensor, lost: Mapping[int, list[np.ndarray]]) -> torch.Tensor:
    """A parameter or buffer without some entries along some axes."""
    import torch

    data = parameter.data
    for axis, gone in lost.items():
        keep = np.delete(np.arange(data.shape[axis]), np.concatenate(gone))
        data = data.index_select(axis, torch.from_numpy(keep).to(data.device))
    return _like(parameter, data)


def _like(parameter: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    from torch import nn

    return nn.Parameter(data, parameter.requires_grad) if isinstance(parameter, nn.Parameter) else data


def _replace(model: nn.Module, new: Mapping[int, torch.Tensor]) -> None:
    """Put new parameters in the place of old ones (by id): a tied one in every place, so that it stays tied."""
    for module in model.modules():
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in held:
            if id(tensor) in new:
                setattr(module, name, new[id(tensor)])
        resize(module)


def resize(module: nn.Module) -> None:
    """Tell a module the sizes of its weight."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]


def _narrow(model: nn.Module, body: Anatomy, ratio: float) -> None:
    """Correct norms that take the mean over `ratio` times fewer channels now."""
    import torch

    with torch.no_grad():
        for name in body.norms:
            body.modules[name].weight.mul_(ratio**0.5)
    if body.rms:
        config: Any = model.config
        config.rms_norm_eps *= ratio
        for module in model.modules():
            _set(module, {"variance_epsilon": config.rms_norm_eps})


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _set(owner: Any, values: Mapping[str, int | float]) -> None:
    """Set the attributes that an object has."""
    for name, value in values.items():
        if hasattr(owner, name):
            setattr(owner, name, value)


def _listed(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
