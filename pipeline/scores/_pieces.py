"""Text as the classifier of Ultra-FineWeb reads it: lower-cased, without accents, its words the pieces of a tokenizer.

Source: the script released with `openbmb/Ultra-FineWeb-classifier` (Wang et al. 2025, arXiv 2505.05427), in its order.
Pieces are words in any script, so that a classifier of words also works for those that put no space between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.storage import resolve
from pipeline.errors import ConfigError, MissingExtra

FILE = "tokenizer.json"


class Pieces:
    """A tokenizer of the `tokenizers` library, from the content of its file. Raises ConfigError and MissingExtra."""

    def __init__(self, content: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra("a classifier over pieces", "models", "tokenizers") from error
        try:
            self.tokenizer: Any = Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"tokenizer: this is no tokenizer.json: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        size = self.tokenizer.get_vocab_size()
        # Every piece is decoded on its own, so their texts are a table.
        self.table = pa.array(
            [self.tokenizer.decode([i], skip_special_tokens=False) for i in range(size)], pa.large_string()
        )

    def __call__(self, texts: pa.Array) -> pa.LargeStringArray:
        """The n texts, normalised and cut into pieces joined by spaces; no line break is left in them.

        Three or more line breaks become two; lower case; compatibility decomposition without the marks (Mn); pieces;
        line feed, carriage return and tab are written as two characters; one space between pieces, none at the ends.
        """
        import polars as pl

        plain = pl.Series(texts.cast(pa.large_string())).str.replace_all(r"\n{3,}", "\n\n").str.to_lowercase()
        decomposed = pl.Series(pc.utf8_normalize(plain.to_arrow().cast(pa.large_string()), "NFKD"))
        encodings = self.tokenizer.encode_batch_fast(
            decomposed.str.replace_all(r"\p{Mn}", "").to_list(), add_special_tokens=False
        )
        offsets = np.cumsum([0, *map(len, encodings)])
        ids = np.concatenate([np.empty(0, np.int64), *(e.ids for e in encodings)]).astype(np.int64)
        pieces = pa.LargeListArray.from_arrays(pa.array(offsets), self.table.take(pa.array(ids)))
        joined = pl.Series(pieces).list.join(" ")
        for character, written in (("\n", r"\n"), ("\r", r"\r"), ("\t", r"\t")):
            joined = joined.str.replace_all(character, written, literal=True)
        return joined.str.replace_all(" {2,}", " ").str.strip_chars(" ").to_arrow().cast(pa.large_string())


def store_pieces(uris: list[str], directory: Path) -> Pieces | None:
    """Put a tokenizer into an artifact, and open it; None where there is no address. Local or on an object store."""
    for uri in uris:
        filesystem, path = resolve(uri)
        with filesystem.open_input_stream(path) as source:
            (directory / FILE).write_bytes(source.read())
    return stored_pieces(directory)


def stored_pieces(directory: Path) -> Pieces | None:
    """The tokenizer that an artifact holds; None where it holds none."""
    file = directory / FILE
    return Pieces(file.read_text(encoding="utf-8", errors="replace")) if file.exists() else None
