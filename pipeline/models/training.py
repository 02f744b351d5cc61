"""Small language models trained here: for who has a corpus and no model that fits it.

A byte-level BPE tokenizer, a Llama-shaped decoder and a plain training loop: AdamW with betas 0.9 and 0.95, no weight
decay, gradients clipped at 1, linear warm-up, cosine to a tenth of the rate; the settings of CoLoR-Filter's auxiliary
models (Brandfonbrener et al. 2024, arXiv 2406.10670), but for their eps of 1e-15 and their z-loss, which models of this
size do not need. The defaults of `Shape` are ours: 1.3 M parameters, for CPUs.

The same inputs and seed give the same model on the same machine and threads; sums of BLAS round otherwise elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import ConfigDict

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM, PreTrainedModel

IGNORED = -100
END = "<|endoftext|>"
"""The one special token, id 0: it ends every document. What looks like it in a text is read as plain text."""


@dataclass(frozen=True)
class Shape:
    """Of a Llama: widths of the residual stream and of the MLP, heads that query and that hold keys and values, pieces
    of the vocabulary, tokens that it is trained on at a time. Embeddings are tied."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    vocab: int = 4096
    context: int = 256

    def __post_init__(self) -> None:
        if min(self.hidden, self.layers, self.heads, self.kv_heads, self.mlp) < 1 or self.context < 2:
            raise ValueError("sizes of a model must be positive, its context at least 2")
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden ({self.hidden}) must be a multiple of twice the heads ({self.heads}), and these of kv_heads "
                f"({self.kv_heads})"
            )
        if self.vocab < 257:
            raise ValueError(f"vocab ({self.vocab}) must be at least 257: all bytes and the end of a text")


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab` pieces, `END` first; determined by the texts alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def pack(token_lists: Iterable[Sequence[int] | np.ndarray], length: int, eos: int) -> np.ndarray:
    """Documents end to end, each closed by `eos`, cut into (n, length) int32 blocks.

    The last block is filled up from the beginning: no token is lost, and n >= 1. Raises ValueError without a document.
    """
    pieces = [np.asarray([*tokens, eos], np.int32) for tokens in token_lists]
    if not pieces:
        raise ValueError("there is no document to pack")
    stream = np.concatenate(pieces)
    return np.resize(stream, (-(-len(stream) // length), length))


def new_lm(shape: Shape, seed: int) -> LlamaForCausalLM:
    """An untrained model; its weights are drawn from the seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_lm(
    model: PreTrainedModel,
    blocks: np.ndarray,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    warmup: int | None = None,
    stop: Callable[[int], bool] | None = None,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Train in place on `steps` batches of blocks (n, length); returns the loss of every step, nats a token (float32).

    Blocks come in a new random order every epoch. `warmup`: steps of rising rate (default: a twentieth of all).
    `stop` is asked after every step, with the steps done, and ends the training where it says True. `counts`: bool
    (n, length), which tokens are learnt (default: all but the first of a block); the others are only read.
    """
    import torch

    warmup = max(1, steps // 20) if warmup is None else warmup
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, warmup))
    order = _batches(len(blocks), batch, seed)
    losses: list[float] = []
    model.train()
    for step in range(1, steps + 1):
        rows = next(order)
        ids = torch.from_numpy(blocks[rows]).to(device)
        loss = _loss(model, ids, None if counts is None else torch.from_numpy(counts[rows]).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if stop is not None and stop(step):
            break
        model.train()  # `stop` may have measured
    model.eval()
    return np.asarray(losses, np.float32)


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step from 0: linear warm-up, then cosine to a tenth at the last one."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


def lm_loss(model: PreTrainedModel, blocks: np.ndarray, batch: int = 16, counts: np.ndarray | None = None) -> float:
    """Mean loss of a model over blocks (n, length), nats a token: of those that count (n, length), or of all."""
    import torch

    device, total, weight = next(model.parameters()).device, 0.0, 0
    model.eval()
    with torch.inference_mode():
        for rows in map(slice, range(0, len(blocks), batch), range(batch, len(blocks) + batch, batch)):
            ids = torch.from_numpy(blocks[rows]).to(device)
            told = None if counts is None else torch.from_numpy(counts[rows]).to(device)
            tokens = len(ids) if told is None else int(told[:, 1:].sum())
            total, weight = total + float(_loss(model, ids, told)) * tokens, weight + tokens
    return total / max(weight, 1)


def save_lm(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer, as AutoModelForCausalLM and AutoTokenizer read them."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=model.config.max_position_embeddings,
    )
    fast.save_pretrained(folder)


def _loss(model: PreTrainedModel, ids: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy of the tokens from the second on, or of those of them that count (0 where none does);
    bfloat16 on GPUs, with the loss in float32."""
    import torch

    ids = ids.long()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    flat, labels = logits.flatten(0, 1).float(), ids[:, 1:].flatten()
    if counts is None:
        return torch.nn.functional.cross_entropy(flat, labels)
    labels = labels.masked_fill(~counts[:, 1:].flatten(), IGNORED)
    total = torch.nn.functional.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _batches(rows: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of `batch` rows for ever; the rows follow each other in a new random order an epoch."""
    rng = np.random.default_rng(seed)
    waiting = np.empty(0, np.int64)
    while True:
        while len(waiting) < batch:
            waiting = np.concatenate([waiting, rng.permutation(rows)])
        yield waiting[:batch]
        waiting = waiting[batch:]
