"""Small models for criteria of pairs, made in seconds from what `bench.planted.corpora` writes to learn from.

`clip`: an OpenCLIP model whose both towers learn from the trusted pairs with CLIP's loss. `vision`, `reader`: a vision
model and a text encoder of transformers as their seeds draw them, on which `dfn` trains its heads; features of an
untrained network still tell colours apart. `judge`: a causal model that learned from other captions to answer 90,
or 10 to a broken one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.3, 0.3, 0.3], "interpolation": "bilinear"}
CLIP_EPOCHS, CLIP_BATCH, CLIP_LR = 20, 64, 2e-3
JUDGE = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 192, "vocab": 512, "context": 64}
JUDGE_STEPS, JUDGE_BATCH, JUDGE_LR = 300, 16, 3e-3
ASKED = "{text} =>"
"""What the judge is asked, as its seat has it."""


def train_clip(trusted: Path, folder: Path, seed: int) -> None:
    """Train both towers on the trusted pairs and write a folder that open_clip reads."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    from pipeline.models.dual_encoder import contrastive_loss
    from pipeline.models.images import Preprocess, stream

    table, preprocess = pq.read_table(trusted), Preprocess.of_open_clip(PREPROCESS)
    parts = stream(table["image"].combine_chunks(), preprocess, 256, 1)
    pixels = preprocess.normalise(np.concatenate([p.pixels for p in parts]), torch.device("cpu"), torch.float32)
    texts = table["text"].to_pylist()
    tokens = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])(texts)
    same = torch.from_numpy(np.unique(texts, return_inverse=True)[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**CLIP)
        optimizer = torch.optim.AdamW(model.parameters(), lr=CLIP_LR, weight_decay=0.0)
        for _ in range(CLIP_EPOCHS):
            for rows in torch.randperm(len(texts)).split(CLIP_BATCH):
                image, text, scale = model(pixels[rows], tokens[rows])
                loss = contrastive_loss(scale.clamp(max=100) * image @ text.T, same[rows, None] == same[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": PREPROCESS}))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def write_vision(folder: Path, seed: int) -> None:
    """A vision model of 32 pixels a side, untrained."""
    import torch
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def write_reader(trusted: Path, folder: Path, seed: int) -> None:
    """A text encoder whose tokens are the words of the trusted captions, untrained."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    texts = pq.read_table(trusted)["text"].to_pylist()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for t in texts for w in t.replace(",", " ,").split()})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=48
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)


def train_judge(judged: Path, folder: Path, seed: int) -> None:
    """Train a causal model on captions and answers, one a block, and save it."""
    from pipeline.models.training import END, Shape, new_lm, save_lm, train_lm, train_tokenizer

    table, shape = pq.read_table(judged), Shape(**JUDGE)
    asked = [ASKED.replace("{text}", text) for text in table["text"].to_pylist()]
    said = [f"{question} {answer}" for question, answer in zip(asked, table["answer"].to_pylist(), strict=True)]
    tokenizer = train_tokenizer(said, shape.vocab)
    end = tokenizer.token_to_id(END)
    blocks = np.full((len(said), shape.context), end, np.int32)
    counts = np.zeros(blocks.shape, bool)
    for row, encoded in enumerate(tokenizer.encode_batch(said)):
        ids = encoded.ids[-shape.context + 1 :]
        blocks[row, : len(ids)] = ids
        counts[row, : len(ids) + 1] = True
    model = new_lm(shape, seed)
    train_lm(model, blocks, JUDGE_STEPS, JUDGE_BATCH, JUDGE_LR, seed, counts=counts)
    save_lm(model, tokenizer, folder)


def train(corpora: Path, directory: Path, seed: int) -> None:
    """Write the folders `clip`, `vision`, `reader` and `judge`."""
    trusted = corpora / "trusted.parquet"
    train_clip(trusted, directory / "clip", seed)
    write_vision(directory / "vision", seed)
    write_reader(trusted, directory / "reader", seed)
    train_judge(corpora / "judged.parquet", directory / "judge", seed)
