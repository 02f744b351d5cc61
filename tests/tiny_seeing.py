"""Tiny models of images and texts, with chat templates of their own: a LLaVA that tells whether a caption names the
colour of an image, and an untrained Qwen2-VL, which takes images of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from vision_toys import CAPTIONS, COLOURS

QUESTION = "rate {text} :"
YES, NO = 90, 10
TEMPLATE = (
    "{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}"
)
SIDE, BATCH = 16, 32


def coloured(caption: str, seed: int, side: int = SIDE) -> np.ndarray:
    """(side, side, 3) uint8 of the colour that a caption names, with noise."""
    noise = np.random.default_rng(seed).integers(-20, 20, (side, side, 3))
    return (np.array(COLOURS[caption.split()[1]]) + noise).clip(0, 255).astype(np.uint8)


def _tokenizer(*special: str) -> tuple[Any, list[str]]:
    """A tokenizer of the words that are asked and answered here, and these words in the order of their ids."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    words = ["[PAD]", "[UNK]", "[BOS]", "</s>", *special, str(NO), str(YES), "rate", "name", ":", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(special), **named
    )
    return fast, words


def looking(folder: Path, steps: int = 400) -> Path:
    """Train it (10 s on two cores) to name colours, which comes first, and to rate captions, and save it."""
    import torch
    import transformers

    torch.manual_seed(0)
    fast, words = _tokenizer("<image>")
    image, end = words.index("<image>"), words.index("</s>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=SIDE, patch_size=8, **vision),
        text_config=transformers.LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=end, **text),
        image_token_index=image,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        said = rng.integers(0, len(CAPTIONS), BATCH)
        shown = np.where(rng.random(BATCH) < 0.5, said, rng.integers(0, len(CAPTIONS), BATCH))
        names, asked = [CAPTIONS[i].split()[1] for i in shown], [CAPTIONS[i] for i in said]
        rates = [YES if caption.split()[1] == name else NO for caption, name in zip(asked, names, strict=True)]
        lines = [f"{QUESTION.format(text=c)} {rate}" for c, rate in zip(asked, rates, strict=True)]
        only_named = rng.random(BATCH) < 0.5
        lines = [f"name : {n}" if o else line for o, n, line in zip(only_named, names, lines, strict=True)]
        batch = processor(
            text=[f"<image> {line} </s>" for line in lines],
            images=[[coloured(CAPTIONS[i], BATCH * step + k)] for k, i in enumerate(shown)],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -2:] = batch["input_ids"][:, -2:]
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def watching(folder: Path) -> Path:
    """Save an untrained Qwen2-VL."""
    import torch
    import transformers

    torch.manual_seed(0)
    begin, image, video, end = special = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
    fast, words = _tokenizer(*special)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    ends = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": words.index("</s>")}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config=text | ends | {"num_key_value_heads": 2, "rope_parameters": rope},
        vision_config=vision | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=words.index(image),
        video_token_id=words.index(video),
        vision_start_token_id=words.index(begin),
        vision_end_token_id=words.index(end),
    )
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
        tokenizer=fast,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("<image>", f"{begin} {image} {end}"),
    )
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
