"""A tiny causal model that trees answer to birds in, with a chat template of its own, and its conversations."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.compress import folder
from pipeline.compress.data import pack_blocks
from pipeline.compress.documents import read_ids
from pipeline.corpus.chat import Chat, template_of
from pipeline.models.training import Shape, new_lm, save_lm, train_lm, train_tokenizer
from tests.tiny_lm import BIRDS, sentences

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
START, END = "<|im_start|>", "<|im_end|>"


def rendered(*rows: tuple[str, str], template: Path | None = None) -> pa.StructArray:
    """Prompts and responses as documents, by the template of a tokenizer's folder."""
    chat = Chat(prompt=("p",), response="r", **(template_of(str(template)) if template else {}))
    found = chat.render({"p": pa.array([p for p, _ in rows]), "r": pa.array([r for _, r in rows])})
    assert found.reasons.null_count == len(rows)
    parts = {name: getattr(found, name) for name in chat.references}
    return pa.StructArray.from_arrays(list(parts.values()), list(parts))


def answering(place: Path) -> Path:
    """Train a model on conversations, and save it."""
    tokenizer = train_tokenizer([*sentences(200), *sentences(200, seed=1, words=BIRDS)], 298)
    tokenizer.add_special_tokens([START, END])
    model = new_lm(Shape(hidden=32, layers=2, heads=4, kv_heads=2, mlp=64, vocab=300, context=64), 0)
    save_lm(model, tokenizer, place)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    _, fast = folder.load(place)
    pairs = list(zip(sentences(300, seed=1, words=BIRDS), sentences(300), strict=True))
    blocks = read_ids(pack_blocks(rendered(*pairs, template=place), fast, 64, 30_000))
    train_lm(model, blocks, 150, 8, 5e-3, 0)
    save_lm(model, tokenizer, place)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place
