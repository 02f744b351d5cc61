"""Models in folders: written whole or not at all, read back whatever shape they have.

Where all layers have one shape, the folder is what transformers writes, and `AutoModelForCausalLM.from_pretrained`
reads it. Where they differ (a layer lost more heads, a branch is gone, a bias was added; Llama's configuration also
wants a width that is a multiple of the heads), no configuration can say so, and transformers would fill what it misses
with random numbers. Such a folder has `tamis_shapes.json` beside the
configuration, and its weights are named `ragged.safetensors`, so that from_pretrained finds none and fails. `load`
reads it: the model is built without weights, takes the shapes that lie in the file, and is checked against
`tamis_shapes.json`. Its `per_layer_config` has the names that transformers gives per-layer values:

    {"format": 1, "architecture": "LlamaForCausalLM", "config": {"num_attention_heads": 9, "num_key_value_heads": 3},
     "per_layer_config": {
        "0": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "scaling": 0.125,
              "intermediate_size": 1024},
        "1": {"intermediate_size": 1536, "skip": ["attention"]}}}

A matrix with a low-rank part beside it (SLiM: y = W x + L (R x)) is such a thing as well: the factors lie in the same
file as `MODULE.left` (out, r) and `MODULE.right` (r, in), and the sidecar names their ranks, `"low_rank": {MODULE: r}`.

Biases of o_proj and down_proj that a compensation added come with biases of zero elsewhere, where Llama's configuration
knows them only together. Masks of sparse weights lie in `masks.safetensors`, a bit a weight. No code in a folder is
ever run.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from pipeline import __version__
from pipeline.compress._weights import matrix
from pipeline.compress.architecture import WIDTH_OVER_HEADS, BranchName, anatomy
from pipeline.compress.surgery import remove_branches, resize, tell
from pipeline.errors import TamisError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHAPES = "tamis_shapes.json"
RAGGED = "ragged.safetensors"
MASKS = "masks.safetensors"
FORMAT = 1
HEADS = ("num_attention_heads", "num_key_value_heads")
"""What configurations are checked by, against a width that need not fit them in every layer."""
BRANCHES: tuple[BranchName, ...] = ("attention", "mlp")
DENOMINATORS = {
    "prunable": "weights of the layers' matrices",
    "non_embedding": "parameters without embeddings",
    "all": "all parameters",
    "flops_per_token": "forward FLOPs a token",
}


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    card: Mapping[str, Any],
    masks: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model, its tokenizer, masks (True where a weight is kept, by parameter) and README.md from `card`.

    All of it first goes to a folder beside it, which then takes its name: what was there before is replaced. `card` is
    JSON-able; of `before` and `after` (`count`) it makes the table of ratios.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    incoming, old = folder.with_name(f".{folder.name}.incoming"), folder.with_name(f".{folder.name}.old")
    for left in (incoming, old):
        shutil.rmtree(left, ignore_errors=True)
    incoming.mkdir(parents=True)
    ragged = _write_weights(model, incoming)
    if tokenizer is not None:
        tokenizer.save_pretrained(incoming)
    if masks:
        _write_masks(masks, incoming / MASKS)
    (incoming / "README.md").write_text(_readme(folder.name, card, ragged, bool(_low_rank(model))), encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    incoming.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(
    folder: Path, device: str = "cpu", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Model (in eval mode) and tokenizer (None where there is none) of a folder, with ragged shapes or without.

    Raises TamisError for a folder that is not whole, and where its weights or its tokenizer are not those of the model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(folder)
    if not folder.is_dir() or not (folder / "config.json").exists():
        begun = folder.with_name(f".{folder.name}.incoming").exists()
        raise TamisError(
            f"{folder} is no folder of a model"
            + ("; writing it was cut off: write it again" if begun else ": it has no config.json")
        )
    try:
        model = _load_ragged(folder) if (folder / SHAPES).exists() else _load_plain(folder)
        has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options) if has_tokenizer else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise TamisError(f"{folder} cannot be read as a model: {error}") from error
    if tokenizer is not None and len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise TamisError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its model {rows}: they do not match")
    for parameter in model.parameters():  # and no buffer: rotations want their float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.to(device).eval(), tokenizer


def masks(folder: Path) -> dict[str, torch.Tensor]:
    """Masks that `save` wrote: bool, True where a weight is kept, by parameter; none where there are none."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not (Path(folder) / MASKS).exists():
        return {}
    try:
        with safe_open(Path(folder) / MASKS, "numpy") as file:
            shapes = json.loads(file.metadata()["shapes"])
            packed = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TamisError(f"{Path(folder) / MASKS} cannot be read: {error}") from error
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    bits = {name: np.unpackbits(values, count=sizes[name]).astype(bool) for name, values in packed.items()}
    return {name: torch.from_numpy(bits[name].reshape(shape)) for name, shape in shapes.items()}


def count(
    model: nn.Module, masks: Mapping[str, torch.Tensor] | None = None, length: int = 512
) -> dict[str, float | None]:
    """A model's size by four denominators: what "sparsity" may be a share of.

    `prunable`: entries of matrices in the blocks. `non_embedding`: all parameters but tables of embeddings (and with
    them the head where it is tied). `all`. `flops_per_token`: forward, at `length` tokens; None for encoders and
    mixtures of experts. A tied parameter counts once; what a mask sets to zero does not count, but saves no FLOPs.
    """
    from torch import nn

    from pipeline.compare.flops import ModelShape

    body = anatomy(model)
    gone = {name: mask.numel() - int(mask.sum()) for name, mask in (masks or {}).items()}
    sizes = {name: p.numel() - gone.get(name, 0) for name, p in model.named_parameters()}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and name.startswith(f"{body.blocks}.")}
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    known = body.family not in ("bert", "vit")
    return {
        "prunable": sum(sizes[name] for name in matrices),
        "non_embedding": sum(size for name, size in sizes.items() if name not in tables),
        "all": sum(sizes.values()),
        "flops_per_token": ModelShape.of(model).forward(length) if known else None,
        "length": length,
    }


def ratios(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> dict[str, float]:
    """Share that was removed, by every denominator of `count` that both have."""
    if before.get("length") != after.get("length"):
        raise ValueError(f"FLOPs at {before.get('length')} and at {after.get('length')} tokens cannot be compared")
    known = {name: (before.get(name), after.get(name)) for name in DENOMINATORS}
    return {name: 1 - b / a for name, (a, b) in known.items() if a and b is not None}


def _write_weights(model: PreTrainedModel, folder: Path) -> bool:
    """Write weights and configuration; says whether they are ragged."""
    from safetensors.torch import save_file

    if (plain := _plain(model)) is not None:
        config, added = plain
        model.save_pretrained(folder, state_dict=model.state_dict() | added)
        config.save_pretrained(folder)
        return False
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    heads = {name: getattr(config, name) for name in HEADS if hasattr(config, name)}
    if config.hidden_size % config.num_attention_heads:
        _set_all(config, dict.fromkeys(heads, 1))
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    sidecar = {"format": FORMAT, "architecture": type(model).__name__, "config": heads}
    sidecar |= {"per_layer_config": per_layer(model)}
    if ranks := _low_rank(model):
        sidecar["low_rank"] = ranks
    (folder / SHAPES).write_text(json.dumps(sidecar, indent=2), encoding="utf-8")
    persistent = model.state_dict()
    held = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in persistent}}
    save_file({name: t.detach().contiguous() for name, t in held.items()}, folder / RAGGED, {"format": "pt"})
    return True


def _low_rank(model: nn.Module) -> dict[str, int]:
    """Ranks of the low-rank parts, by the modules that they stand beside."""
    from pipeline.compress.sparse._modules import LowRankPart

    return {name: m.left.shape[1] for name, m in model.named_modules() if isinstance(m, LowRankPart)}


def _plain(model: PreTrainedModel) -> tuple[Any, dict[str, torch.Tensor]] | None:
    """The configuration that describes the model, and biases of zero that it needs to; None where there is none."""
    import torch
    from huggingface_hub.errors import StrictDataclassError

    state = model.state_dict()
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for flag, module in (("attention_bias", "self_attn.o_proj"), ("mlp_bias", "mlp.down_proj")):
        if hasattr(config, flag) and any(name.endswith(f"{module}.bias") for name in state):
            setattr(config, flag, True)
    try:
        config.validate()
        with torch.device("meta"):
            described = type(model)(copy.deepcopy(config))
    except (StrictDataclassError, ValueError):
        return None  # sizes that no configuration allows, such as a width that is no multiple of the heads
    if per_layer(described) != per_layer(model):
        return None
    wanted = {name: t.shape for name, t in described.state_dict().items()}
    missing = wanted.keys() - state.keys()
    if any(not name.endswith(".bias") for name in missing) or any(wanted.get(n) != t.shape for n, t in state.items()):
        return None
    return config, {name: torch.zeros(wanted[name], dtype=model.dtype) for name in sorted(missing)}


def per_layer(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Sizes of every layer under the names of transformers' configurations, and the branches that are `skip`ped."""
    body = anatomy(model)
    found: dict[str, dict[str, Any]] = {}
    for i, layer in enumerate(body.layers):
        sizes: dict[str, Any] = {}
        if a := layer.attention:
            sizes |= {"num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim}
            sizes |= {"scaling": body.modules[a.name].scaling}
        if layer.mlp:
            sizes |= {"intermediate_size": layer.mlp.width}
        if e := layer.experts:
            sizes |= {"num_experts": e.count, "moe_intermediate_size": e.width}
        if skipped := [name for name in BRANCHES if not layer.branch(name)]:
            sizes |= {"skip": skipped}
        found[str(i)] = sizes
    return found


def _load_plain(folder: Path) -> PreTrainedModel:
    import transformers

    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    made = _model_class((config.architectures or [""])[0]) or transformers.AutoModelForCausalLM
    model, about = made.from_pretrained(folder, output_loading_info=True, **options)
    if absent := sorted(about["missing_keys"]):
        raise ValueError(f"its weights lack {_few(absent)}")
    return model


def _load_ragged(folder: Path) -> PreTrainedModel:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, GenerationConfig

    from pipeline.compress.sparse._modules import put, with_low_rank

    sidecar = json.loads((folder / SHAPES).read_text(encoding="utf-8"))
    if sidecar.get("format") != FORMAT:
        raise ValueError(f"{SHAPES} has format {sidecar.get('format')!r}; this version of Tamis reads {FORMAT}")
    made = _model_class(sidecar["architecture"])
    if made is None:
        raise ValueError(f"transformers has no model {sidecar['architecture']!r}")
    shapes: dict[str, dict[str, Any]] = sidecar["per_layer_config"]
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _set_all(config, sidecar["config"])
    told = {name: value for name, value in vars(copy.deepcopy(config)).items() if not name.startswith("_")}
    _set_all(config, dict.fromkeys(sidecar["config"], 1))  # one head fits every width; the weights bring theirs
    dims = [shape["head_dim"] for shape in shapes.values() if "head_dim" in shape]
    if dims and config.model_type not in WIDTH_OVER_HEADS:
        config.head_dim = dims[0]  # rotations have its size
    with torch.device("meta"):
        model = made(config)
    remove_branches(model, [(int(i), branch) for i, shape in shapes.items() for branch in shape.get("skip", ())])
    _set_all(config, told)
    for name in sidecar.get("low_rank", {}):
        with torch.device("meta"):
            put(model, name, with_low_rank(model.get_submodule(name), torch.empty(0, 0), torch.empty(0, 0)))
    _fill(model, load_file(folder / RAGGED))
    body = anatomy(model)
    for layer, shape in zip(body.layers, shapes.values(), strict=True):
        if layer.attention:
            attention = body.modules[layer.attention.name]
            size = "head_dim" if hasattr(attention, "head_dim") else "attention_head_size"
            setattr(attention, size, shape["head_dim"])
            attention.scaling = shape["scaling"]
    tell(model)
    if (found := per_layer(model)) != shapes:
        wrong = next(i for i in shapes if found.get(i) != shapes[i])
        raise ValueError(f"layer {wrong} is {found.get(wrong)} in its weights, {shapes[wrong]} in {SHAPES}")
    for name, rank in sidecar.get("low_rank", {}).items():
        part = model.get_submodule(name)
        found_shapes = tuple(part.left.shape), tuple(part.right.shape)
        rows, columns = matrix(body, name).shape
        if found_shapes != ((rows, rank), (rank, columns)):
            raise ValueError(f"the factors of {name} are {found_shapes}, in {SHAPES} of rank {rank}")
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _fill(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Put weights into a model on the meta device, whatever shapes they have, and make what no file holds."""
    import torch
    from torch import nn

    modules = dict(model.named_modules())
    for name, tensor in weights.items():
        owner, _, own = name.rpartition(".")
        module = modules.get(owner)
        if module is None or not hasattr(module, own):
            raise ValueError(f"its weights hold {name}, which the model has not")
        if own in dict(module.named_buffers(recurse=False)):
            setattr(module, own, tensor)
        else:
            module.register_parameter(own, nn.Parameter(tensor))
    for module in modules.values():
        resize(module)
    model.tie_weights()
    if absent := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"its weights lack {_few(absent)}")
    for module in modules.values():
        computed = [(name, b) for name, b in module.named_buffers(recurse=False) if b.is_meta]
        for name, buffer in computed:
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if computed:  # rotations and positions, which every model of transformers knows to compute
            model._init_weights(module)


def _model_class(name: str) -> Any:
    """A model class of transformers, of that library alone; None where it has none of the name."""
    import transformers

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _set_all(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _write_masks(masks: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.numpy import save_file

    packed = {name: np.packbits(mask.cpu().numpy().astype(bool)) for name, mask in masks.items()}
    save_file(packed, path, {"shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()})})


def _readme(name: str, card: Mapping[str, Any], ragged: bool, low_rank: bool) -> str:
    front = yaml.safe_dump({"library_name": "transformers", "tags": ["tamis", "pruned"]}, sort_keys=False)
    why = "Its matrices have low-rank parts beside them" if low_rank else "Its layers differ in shape"
    how = (
        f"{why}, so transformers alone does not read it:\n\n```python\n"
        "from pipeline.compress.folder import load\n\nmodel, tokenizer = load(FOLDER)\n```"
        if ragged
        else "`transformers` reads it: `AutoModelForCausalLM.from_pretrained(FOLDER)`."
    )
    rest = {key: value for key, value in card.items() if key not in ("before", "after")}
    scalars = {key: value for key, value in rest.items() if not isinstance(value, Mapping | list | tuple)}
    parts = [f"---\n{front}---", f"# {_plain_text(name)}", f"Made smaller by Tamis {__version__}. {how}"]
    if scalars:
        parts.append(_table(("", ""), scalars.items()))
    if "before" in card and "after" in card:
        parts += ["## How much smaller", _sizes(card["before"], card["after"])]
    for key, value in rest.items():
        if key not in scalars:
            parts += [f"## {_plain_text(key)}", *_section(value)]
    return "\n\n".join(parts) + "\n"


def _sizes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    removed = ratios(before, after)
    rows = [(DENOMINATORS[n], f"{before[n]:,.0f}", f"{after[n]:,.0f}", f"{share:.2%}") for n, share in removed.items()]
    at = f"at {before['length']} tokens" if before.get("length") else ""
    return _table(("share of", "before", "after", "removed"), rows) + (f"\n\nFLOPs {at}." if at else "")


def _section(value: Any) -> list[str]:
    """A mapping as a table, a list of mappings as one after the other."""
    if isinstance(value, Mapping):
        return [_table(("", ""), value.items())]
    if all(isinstance(part, Mapping) for part in value):
        return [_table(("", ""), part.items()) for part in value]
    return ["\n".join(f"- {_plain_text(part)}" for part in value)]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain_text(value: Any) -> str:
    """A value as Markdown shows it: on one line, nothing in it marks up."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, Mapping | list | tuple):
        value = json.dumps(value, ensure_ascii=False)
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", " ".join(str(value).split()))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
