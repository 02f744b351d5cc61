"""Pairs whose captions name what is in the image, and tiny models: for tests of images and image-text models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (30, 60, 220), "yellow": (230, 220, 40)}
PLACES = {"top": (0, 0, 1, 0.5), "bottom": (0, 0.5, 1, 1), "left": (0, 0, 0.5, 1), "right": (0.5, 0, 1, 1)}
CAPTIONS = [f"a {colour} field at the {place}" for colour in COLOURS for place in PLACES]
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def drawn(caption: str, seed: int, size: int = 24) -> bytes:
    """A PNG of what a caption of `CAPTIONS` says, with noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    words = caption.split()
    pixels = rng.integers(90, 130, (size, size, 3))
    x0, y0, x1, y1 = (int(size * side) for side in PLACES[words[-1]])
    pixels[y0:y1, x0:x1] = np.array(COLOURS[words[1]]) + rng.integers(-20, 20, (y1 - y0, x1 - x0, 3))
    return encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def pairs(rows: int, seed: int = 0) -> pa.Table:
    """`image` and `text` of n rows, captions in turn."""
    texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(rows)]
    return pa.table({"image": pa.array([drawn(t, seed + i) for i, t in enumerate(texts)], pa.binary()), "text": texts})


def write_open_clip(folder: Path) -> Path:
    """An untrained CLIP of 1.6 M parameters, nearly all of them word vectors."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    state = open_clip.CLIP(**CLIP).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return folder


def write_vision(folder: Path, kind: str = "ViT", **options: Any) -> Path:
    """An untrained vision model of transformers with 16 pixels a side and a preprocessor of its own."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 16, "patch_size": 4} if kind in ("ViT", "Dinov2", "Dinov2WithRegisters") else {}
    config = getattr(transformers, f"{kind}Config")(**(sizes | options))
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def write_text(folder: Path) -> Path:
    """An untrained BERT whose vocabulary is that of `CAPTIONS`."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for c in CAPTIONS for w in c.split()})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder
