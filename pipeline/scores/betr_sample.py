"""BETR at the paper's price: only the rows of the sample are embedded, and the classifier carries the ranking to all.

Everything that `betr` says holds here, but for the vectors: a row outside of the sample is never embedded, so the
classifier reads words (fastText). `embed` is the embedding of sample and examples, LSA where nothing is said; its
vectors stay as the column `<name>-sample`, null outside of the sample.

The sample is of distinct texts. Where another step of the run needs vectors of every row, `betr` ranks by those at no
further price; asking for both is refused, for an embedding's files have one place in a run.

Costs beside fastText's: an embedding of `sample` rows, 10,000,000 in the paper: less than a thousandth of its pool.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, SerializeAsAny

from pipeline.config import recipe_in
from pipeline.embed.base import Embed
from pipeline.embed.lsa import Lsa
from pipeline.errors import ConfigError
from pipeline.hashing import KEY as KEY_TYPE
from pipeline.hashing import hash64, row_keys
from pipeline.recipe import Column, Transform, fingerprint
from pipeline.scores.betr import Betr

if TYPE_CHECKING:
    from pipeline.run import Run


class BetrSample(Betr):
    """P(among the rows of best rank), in [0, 1], with vectors of a sample alone."""

    needs: ClassVar[Literal["text", "vectors", "concepts"]] = "text"
    claim = "as betr: like the rows of a sample that lie nearest to an example of the target benchmarks"
    cost = "that of fastText; an embedding for the rows of the sample alone"
    key: ClassVar[str] = "text"
    kind: Literal["betr_sample"] = "betr_sample"  # type: ignore[assignment]  # a kind of its own
    classifier: Literal["fasttext"] = Field("fasttext", description="what learns the ranking")
    embed: SerializeAsAny[Annotated[Embed, recipe_in("pipeline.embed", Embed)]] = Field(
        Lsa(), description="embedding of sample and examples"
    )

    def fit(self, run: Run) -> None:
        if run.config.embed is not None or run.config.needs_vectors:
            raise ConfigError(
                f"{self.column_name}: this run embeds every row anyway: use `kind: betr`, which ranks by these vectors"
            )
        self.embed.fit(run)
        super().fit(run)

    def _embedding(self, run: Run) -> Column:
        return self.embed.column(run)

    def _reads(self, run: Run) -> str:
        return run.identity("text")

    def _sampled(self, run: Run, seed: int, last: int) -> tuple[str, str]:
        embed, name = self._embedding(run), f"{self.column_name}-sample"
        fields = pa.schema([pa.field("key", KEY_TYPE), embed.fields.field("vector")])
        inputs = tuple(dict.fromkeys(["text", *embed.inputs]))
        opened = partial(_open_sampled, embed.open, embed.inputs, fields, seed, last)
        identity = fingerprint("betr sample", embed.identity, seed, last)
        run.materialize([Column(name, inputs, fields, opened, identity, embed.resources, embed.batch_rows)])
        return f"{name}.key", f"{name}.vector"


def _open_sampled(
    open_embed: Callable[[], Transform], reads: tuple[str, ...], fields: pa.Schema, seed: int, last: int
) -> Transform:
    embed = open_embed()

    def vectors(batch: pa.RecordBatch) -> pa.RecordBatch:
        keys = row_keys(batch.column("text"))
        inside = hash64(keys, seed) <= np.uint64(last)
        some = batch.filter(pa.array(inside)).select(list(reads))
        at = pa.array(np.cumsum(inside) - 1, mask=~inside)
        found: Any = embed(some).column("vector") if len(some) else pa.nulls(0, fields.field("vector").type)
        return pa.record_batch([keys, found.take(at)], schema=fields)

    return vectors
