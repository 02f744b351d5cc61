"""HTML files, one page a file: the main text of each, by `readers.extract`. `file` names where it came from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.corpus.readers import text
from pipeline.corpus.readers.base import RAW, Batch, IngestOptions, Reject, Source, too_large
from pipeline.corpus.readers.extract import PageError, extractor


def schema(source: Source, options: IngestOptions) -> pa.Schema:
    return text.FIELDS


def read(source: Source, options: IngestOptions, fields: pa.Schema) -> Iterator[Batch]:
    with source.open() as stream:
        page = stream.read(options.limit + 1)
    try:
        if len(page) > options.limit:
            raise PageError(too_large(options.limit))
        main = extractor(options.extractor, options.page_seconds).main_text(page)
        yield Batch(text.documents([main.encode()], source, fields), np.ones(1, np.int64))
    except PageError as error:
        yield Batch(
            text.documents([], source, fields), np.empty(0, np.int64), [Reject(1, 0, str(error), len(page), page[:RAW])]
        )
