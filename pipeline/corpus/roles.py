"""What the columns of a corpus are for: the roles that a configuration gives them, checked against its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.corpus.images import is_image
from pipeline.corpus.listing import schema_with
from pipeline.corpus.text import is_text
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig


def wanted_columns(corpus: CorpusConfig) -> list[str] | None:
    """Columns that every file must have, alike in all; None: all columns."""
    if corpus.columns is None:
        return None
    roles = [corpus.text, corpus.image, *corpus.chat_columns, corpus.id]
    return list(dict.fromkeys([*corpus.columns, *(name for name in roles if name is not None)]))


def checked_schema(corpus: CorpusConfig, listing: pa.Table) -> pa.Schema:
    """The columns of a listed corpus. Raises ConfigError for a role whose column is missing or of the wrong type."""
    named = {"text": corpus.text, "image": corpus.image, "id": corpus.id, "source": corpus.source}
    schema = schema_with(listing, [n for n in (*named.values(), *corpus.chat_columns) if n is not None])
    for role, name in named.items():
        if name is not None and name not in schema.names:
            raise ConfigError(f"corpus.{role}: the corpus has no column {name!r}; it has {', '.join(schema.names)}")
    if corpus.text is not None and not is_text(kind := schema.field(corpus.text).type):
        raise ConfigError(f"corpus.text: column {corpus.text!r} is {kind}, not text")
    if corpus.image is not None and not is_image(kind := schema.field(corpus.image).type):
        raise ConfigError(f"corpus.image: column {corpus.image!r} is {kind}, not images: bytes or paths")
    return schema
