"""A language model as a judge: it is asked about a row and answers with a number from 0 to 100.

`Judge` is the interface. Two come along, for models of transformers: `TextJudge`, any instruction-tuned causal model,
which reads the caption and sees no image, and `ImageJudge`, any that takes an image beside the text (LLaVA, Qwen-VL,
SmolVLM and so on); `sees` tells which a folder holds. Answers are greedy. Prompts of a batch are padded in front and
run together, `BATCH` at a time, those of a `TextJudge` in the order of their lengths; in float32 the neighbours of a
row are float noise to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import TamisError
from pipeline.models.causal import load_causal

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH = 16
NUMBER = re.compile(r"(?<![\d.,-])(\d{1,3}(?:\.\d+)?)(?!,?\d)")


class Judge(Protocol):
    """Answers to prompts. `module:Class` of a user's own is made without arguments, once in every worker."""

    def __call__(self, images: list[Image] | None, prompts: list[str]) -> list[str]:
        """The answers, as text, to n prompts; of a row's image, decoded to RGB, where the judge said `needs_images`."""
        ...


def sees(folder: Path) -> bool:
    """Whether a model of transformers takes images beside texts."""
    return "vision_config" in json.loads((folder / "config.json").read_text())


class TextJudge:
    """A causal language model that is asked in its own chat template, or plainly where it has none."""

    needs_images = False

    def __init__(self, folder: Path, max_tokens: int, max_new_tokens: int, precision: str) -> None:
        model, self.tokenizer = load_causal(folder)
        self.model = _placed(model, precision)
        _pad_in_front(self.tokenizer, folder)
        self.max_tokens, self.max_new_tokens = max_tokens, max_new_tokens

    def __call__(self, images: list[Image] | None, prompts: list[str]) -> list[str]:
        asked = [self._turn(prompt) for prompt in prompts]
        answers = [""] * len(asked)
        order = np.argsort([len(text) for text in asked], kind="stable")
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            tokens = self.tokenizer(
                [asked[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                add_special_tokens=self.tokenizer.chat_template is None,
                return_tensors="pt",
            )
            given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            for row, answer in zip(rows, _said(self.model, self.tokenizer, given, self.max_new_tokens), strict=True):
                answers[row] = answer
        return answers

    def _turn(self, prompt: str) -> str:
        prompt = _spoken(prompt, self.tokenizer)
        if self.tokenizer.chat_template is None:
            return prompt
        turn = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


class ImageJudge:
    """A model that is shown the image in front of what it is asked, in its own chat template and by its own processor.

    Raises TamisError where a folder holds no such model, or one without a chat template.
    """

    needs_images = True

    def __init__(self, folder: Path, max_tokens: int, max_new_tokens: int, precision: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        logging.disable_progress_bar()  # the engine shows its own
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor = AutoProcessor.from_pretrained(folder, **options)
            model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **options)
        except (OSError, ValueError, ImportError) as error:
            raise TamisError(f"{folder} cannot be read as a model of images and texts: {error}") from error
        if not getattr(self.processor, "chat_template", None):
            raise TamisError(f"{folder} has no processor with a chat template: nothing says where the image goes")
        self.tokenizer: PreTrainedTokenizerFast = self.processor.tokenizer
        if not self.tokenizer.is_fast:
            raise TamisError(f"{folder} has no fast tokenizer (tokenizer.json)")
        self.model = _placed(model.float().eval(), precision)
        self.takes = signature(self.model.forward).parameters
        _pad_in_front(self.tokenizer, folder)
        self.max_tokens, self.max_new_tokens = max_tokens, max_new_tokens

    def __call__(self, images: list[Image] | None, prompts: list[str]) -> list[str]:
        assert images is not None
        answers: list[str] = []
        for start in range(0, len(prompts), BATCH):
            asked = [self._turn(prompt) for prompt in prompts[start : start + BATCH]]
            begin = self.tokenizer.bos_token
            inputs = self.processor(
                text=asked,
                images=[[image] for image in images[start : start + BATCH]],
                padding=True,
                add_special_tokens=not (begin and asked[0].startswith(begin)),
                return_tensors="pt",
            )
            given = {name: value for name, value in inputs.items() if name in self.takes}
            answers += _said(self.model, self.tokenizer, given, self.max_new_tokens)
        return answers

    def _turn(self, prompt: str) -> str:
        prompt = _spoken(prompt, self.tokenizer)
        ends = self.tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).offsets
        if len(ends) > self.max_tokens:  # of the words: an image that loses a token is none
            prompt = prompt[ends[-self.max_tokens][0] :]
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        return str(self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def _placed(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    import torch

    device = torch.device("cuda" if precision == "bfloat16" else "cpu")
    return model.to(device, getattr(torch, precision))


def _pad_in_front(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise TamisError(f"the tokenizer in {folder} has neither a padding nor an end token")
        tokenizer.pad_token_id = tokenizer.eos_token_id


def _spoken(prompt: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A prompt without special tokens: a caption must not end its turn and speak for the judge, or bring an image."""
    for special in tokenizer.get_added_vocab():
        prompt = prompt.replace(special, " ")
    return prompt


def _said(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Mapping[str, Any], max_new_tokens: int
) -> list[str]:
    """What a model answers to tokens (n, length) and whatever comes with them, floats in its own precision."""
    import torch

    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    with torch.inference_mode():
        written = model.generate(
            **given, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
        )
    answers: list[str] = tokenizer.batch_decode(written[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def number_in(answer: str) -> float | None:
    """The first number from 0 to 100 that an answer states; None where it states none."""
    found = NUMBER.search(answer)
    value = float(found[1]) if found else -1.0
    return value if 0 <= value <= 100 else None
