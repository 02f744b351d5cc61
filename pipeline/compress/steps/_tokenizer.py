"""A byte-level BPE tokenizer with fewer tokens: what could be written still can, most texts with the same tokens.

Merges whose parts or result are gone are dropped; what is left over of a word is written with smaller pieces, in the
end with single bytes, which always stay, as do special tokens. `closed` adds the pieces that kept tokens are merged
from. Then a text all of whose tokens are kept is cut exactly as before: each merge that applied to it made a piece of
a kept token and is still there, and merges keep their order. (Where a token can be merged in several ways, as in
vocabularies that were converted from tiktoken, the first way is kept and the statement holds for most words.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FEWEST_BYTES = 128
"""Single bytes that a vocabulary must have: some leave out those that no text of theirs had."""


def closed(tokenizer: Tokenizer, ids: Iterable[int]) -> np.ndarray:
    """These tokens, those they are merged from, all single bytes and all added tokens; ids (int64), ascending.

    Raises ConfigError for a tokenizer that is not byte-level BPE.
    """
    described = _described(tokenizer)
    vocabulary = described["model"]["vocab"]
    content = {i: piece for piece, i in vocabulary.items()}
    made_of: dict[str, tuple[str, str]] = {}
    for a, b in _merges(described):
        made_of.setdefault(a + b, (a, b))
    waiting = [content[int(i)] for i in ids if int(i) in content]
    waiting += _alphabet(vocabulary)
    kept: set[str] = set()
    while waiting:
        piece = waiting.pop()
        if piece not in kept:
            kept.add(piece)
            waiting += made_of.get(piece, ())
    added = {token["id"] for token in described["added_tokens"]}
    return np.array(sorted({vocabulary[piece] for piece in kept} | added), np.int64)


def trimmed(tokenizer: Tokenizer, ids: np.ndarray) -> Tokenizer:
    """The tokenizer with these tokens alone (int64, ascending, from `closed`): `ids[i]` becomes i."""
    from tokenizers import Tokenizer

    described = _described(tokenizer)
    new = {int(token): i for i, token in enumerate(ids)}
    model = described["model"]
    model["vocab"] = {piece: new[i] for piece, i in model["vocab"].items() if i in new}
    there = model["vocab"]
    model["merges"] = [[a, b] for a, b in _merges(described) if a in there and b in there and a + b in there]
    for token in described["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(described["post_processor"], new)
    return Tokenizer.from_str(json.dumps(described))


def trimmed_fast(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> PreTrainedTokenizerFast:
    """The same for a tokenizer of transformers: special tokens, chat template and length limit stay."""
    from transformers import PreTrainedTokenizerFast

    new = PreTrainedTokenizerFast(
        tokenizer_object=trimmed(tokenizer.backend_tokenizer, ids),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map,
    )
    new.chat_template = tokenizer.chat_template
    return new


def rewritten(tokenizer: Tokenizer, new: Tokenizer, ids: np.ndarray) -> list[np.ndarray]:
    """For every token of a tokenizer the tokens (int64) that write it after it was trimmed to `ids`."""
    kept = {int(token): i for i, token in enumerate(ids)}
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    found: list[np.ndarray] = []
    for token in range(size):
        if token in kept:
            found.append(np.array([kept[token]], np.int64))
        else:
            pieces = new.model.tokenize(tokenizer.id_to_token(token) or "")
            found.append(np.array([piece.id for piece in pieces], np.int64))
    return found


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json says. Raises ConfigError where it is not byte-level BPE with single bytes to fall back on."""
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    model = described["model"]
    byte_level = model["type"] == "BPE" and '"ByteLevel"' in json.dumps(described["decoder"])
    # not all 256: SmolLM2's lacks 21, rare ones and such as no UTF-8 has
    if not byte_level or len(_alphabet(model["vocab"])) < FEWEST_BYTES:
        raise ConfigError(
            f"a {model['type']} tokenizer's vocabulary cannot be trimmed: it takes byte-level BPE with single bytes"
        )
    return described


def _merges(described: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ") if isinstance(m, str) else m for m in described["model"]["merges"])
    return [(a, b) for a, b in pairs]


def _alphabet(vocabulary: Mapping[str, int]) -> list[str]:
    """The single bytes that a vocabulary has."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(byte for byte in ByteLevel.alphabet() if byte in vocabulary)


def _renumber(processor: Any, new: dict[int, int]) -> None:
    """Ids in a post-processor: of templates, of BERT's and RoBERTa's pairs, in sequences of them."""
    if processor is None:
        return
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [new[i] for i in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = new[processor[name][1]]
    for inner in processor.get("processors", []):
        _renumber(inner, new)
