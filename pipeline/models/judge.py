"""A language model as a judge: it is asked about a row and answers with a number from 0 to 100.

`Judge` is the interface. `TextJudge` is the one that comes along: any instruction-tuned causal model of transformers,
which reads the caption and sees no image. Answers are greedy. Prompts of a batch are padded in front and run together,
`BATCH` at a time in the order of their lengths; in float32 the neighbours of a row are float noise to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.errors import TamisError
from pipeline.models.causal import load_causal

BATCH = 16
NUMBER = re.compile(r"(?<![\d.,-])(\d{1,3}(?:\.\d+)?)(?!,?\d)")


class Judge(Protocol):
    """Answers to prompts. `module:Class` of a user's own is made without arguments, once in every worker."""

    def __call__(self, images: list[bytes] | None, prompts: list[str]) -> list[str]:
        """The answers, as text, to n prompts; of a row's encoded image where the judge said `needs_images`."""
        ...


class TextJudge:
    """A causal language model that is asked in its own chat template, or plainly where it has none."""

    needs_images = False

    def __init__(self, folder: Path, max_tokens: int, max_new_tokens: int, precision: str) -> None:
        import torch

        model, self.tokenizer = load_causal(folder)
        self.device = torch.device("cuda" if precision == "bfloat16" else "cpu")
        self.model = model.to(self.device, getattr(torch, precision))
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "left"
        end = self.tokenizer.eos_token_id
        if self.tokenizer.pad_token_id is None:
            if end is None:
                raise TamisError(f"the tokenizer in {folder} has neither a padding nor an end token")
            self.tokenizer.pad_token_id = end
        self.max_tokens, self.max_new_tokens = max_tokens, max_new_tokens

    def __call__(self, images: list[bytes] | None, prompts: list[str]) -> list[str]:
        import torch

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
            ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
            with torch.inference_mode():
                written = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            found = self.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers

    def _turn(self, prompt: str) -> str:
        for special in self.tokenizer.get_added_vocab():  # a caption must not end its turn and speak for the judge
            prompt = prompt.replace(special, " ")
        if self.tokenizer.chat_template is None:
            return prompt
        turn = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def number_in(answer: str) -> float | None:
    """The first number from 0 to 100 that an answer states; None where it states none."""
    found = NUMBER.search(answer)
    value = float(found[1]) if found else -1.0
    return value if 0 <= value <= 100 else None
