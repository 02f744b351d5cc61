"""Fuzzy duplicates: MinHash-LSH over word 5-grams, connected across all shards, exactly.

Source: Broder 1997 for MinHash; the presets are those of FineWeb (14 bands of 8 minima, Penedo et al. 2024, arXiv
2406.17557), DCLM (93 x 15, Li et al. 2024, arXiv 2406.11794) and RefinedWeb (450 x 20, Penedo et al. 2023, arXiv
2306.01116). Two texts whose n-gram sets have the Jaccard similarity s become candidates with the probability
1 - (1 - s**rows)**bands, and candidates count as duplicates without another look, as in the published pipelines:

| s | .5 | .6 | .7 | .75 | .8 | .85 | .9 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| fineweb | .053 | .211 | .565 | .772 | .924 | .988 | 1.000 |
| dclm | .003 | .043 | .358 | .714 | .964 | 1.000 | 1.000 |
| refinedweb | .000 | .016 | .302 | .761 | .995 | 1.000 | 1.000 |

Duplicates of duplicates are one group, so a chain of pages that share ever different boilerplate can join texts that
have little in common: of 47,268 real documents, 2,350 pages made from one medical template became one group, with a
median similarity of .55; by other seeds 1,900 to 2,200 of them. `artifacts/<name>-groups/groups.json` names the largest
groups, and one with over a hundredth of the rows is warned of. How texts become n-grams, and where that differs from
the published code, stands in `pipeline.scores._minhash`. The scope is the whole corpus; FineWeb found one crawl at a
time to be better for it, which here is a run for every crawl. Stored: 8 bytes a band and row, not the minima.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.recipe import Column, Transform, fingerprint
from pipeline.scores._duplicates import Duplicates, filled
from pipeline.scores._minhash import band_keys, shingles

if TYPE_CHECKING:
    from pipeline.run import Run

PRESETS = {"fineweb": (14, 8), "dclm": (93, 15), "refinedweb": (450, 20)}
PIECE_BYTES = 1 << 18
"""Text that is worked on at once: what it becomes stays in a core's cache, and a batch of long texts in memory."""


class FuzzyDuplicates(Duplicates):
    """0 for one row of every group of near-duplicates, -1 for the others."""

    claim = "the only row, or the chosen one, of its near-duplicates: Jaccard of word 5-grams above about .7"
    cost = "80 MB/s of text a core at 14 x 8 (bench/dedup.py signatures), and 16 bytes a band and row regrouped"
    source = "Penedo et al. 2024 (FineWeb), arXiv 2406.17557; Broder 1997"
    kind: Literal["fuzzy_duplicates"] = "fuzzy_duplicates"
    preset: Literal["fineweb", "dclm", "refinedweb"] = Field("fineweb", description="bands x rows of a published set")
    bands: int | None = Field(None, ge=1, le=1000, description="more bands find more; with `rows`, instead of a preset")
    rows: int | None = Field(None, ge=1, le=100, description="minima in a band: more of them are stricter")
    ngram: int = Field(5, ge=1, le=100, description="words in a shingle")
    seed: int = Field(1, ge=0, description="seed of the hash functions")

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if (self.bands is None) != (self.rows is None):
            raise ValueError("bands and rows belong together: give both, or a preset")
        if self.bands is not None and "preset" in self.model_fields_set:
            raise ValueError("a preset says how many bands and rows there are: leave out either of them")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Bands, and minima a band."""
        return (self.bands, self.rows) if self.bands and self.rows else PRESETS[self.preset]

    def support(self, run: Run) -> Sequence[Column]:
        return (self.bands_column,)

    @property
    def bands_column(self) -> Column:
        """Support column `minhash-<digits>`: `bands`, one uint64 key a band."""
        from rensa import RMinHash

        shape = (*self.shape, self.ngram, self.seed)
        identity = fingerprint("minhash", 2, shape, RMinHash.ALGORITHM_VERSION, unicodedata.unidata_version)
        fields = pa.schema([("bands", pa.list_(pa.uint64(), shape[0]))])
        name = f"minhash-{fingerprint(shape)[:12]}"
        return Column(name, ("text",), fields, partial(_open, *shape), identity)

    def fill(self, run: Run) -> None:
        component = filled(
            f"{self.column_name}-component", (), pa.schema([("component", pa.int64())]), "component of shared bands 1"
        )
        run.connect_rows(component, f"{self.bands_column.name}.bands")
        self.settle(run, f"{component.name}.component")


def _open(bands: int, rows: int, ngram: int, seed: int) -> Transform:
    def sign(batch: pa.RecordBatch) -> pa.RecordBatch:
        texts = batch.column("text")
        keys = np.empty((len(texts), bands), np.uint64)
        before = np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False), dtype=np.int64)
        cuts = [0, *(np.flatnonzero(np.diff(before // PIECE_BYTES)) + 1).tolist(), len(texts)]
        for start, end in pairwise(cuts if len(texts) else ()):
            keys[start:end] = band_keys(*shingles(texts.slice(start, end - start), ngram), bands, rows, seed)
        values = pa.FixedSizeListArray.from_arrays(pa.array(keys.ravel()), bands)
        return pa.record_batch([values], ["bands"])

    return sign
