"""Latent semantic analysis: hashed TF-IDF and a randomized SVD. Needs no model, no download and no torch.

Words (and single characters in scripts that are written without spaces: Chinese, Japanese, Thai, Lao, Tibetan, Burmese,
Khmer) are hashed to `features` buckets, damped to 1 + log tf, weighted by smooth idf and projected on the first `dims`
right singular vectors of a sample of texts. Rows are near when they share topics and vocabulary; synonyms meet only as
far as the sample shows them in the same company, and languages stay apart.

Fitted on the `sample` distinct texts with the smallest content hashes, in one worker, so the fit does not grow with the
corpus. A sample of a lower rank than `dims` (fewer texts, say) gives that many dimensions and zeros behind them. Only
the first `max_chars` characters of a text are looked at, in the fit and after.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.embed.base import Embed
from pipeline.errors import CorpusError
from pipeline.recipe import Column, State, Transform
from pipeline.sample import Sample, draw, needs_fit, texts
from pipeline.vectors import unit_vectors, vector_schema
from pipeline.words import hashed_words

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

PROJECTION = "projection.npy"


class Lsa(Embed):
    """Deerwester et al. 1990, with hashed words (Weinberger et al. 2009) and the SVD of Halko et al. 2011."""

    kind: Literal["lsa"] = "lsa"
    dims: int = Field(128, ge=1, description="length of a vector")
    sample: int = Field(10_000, ge=1, description="distinct texts that idf and singular vectors are fitted on")
    features: int = Field(
        1 << 16, ge=1 << 8, description="buckets that words are hashed to; the model is 4 * dims bytes a bucket"
    )
    max_chars: int = Field(8192, ge=1, description="characters of a text that are looked at")
    seed: int | None = Field(None, description="seed of the sample and of the SVD (default: the run's)")

    def fit(self, run: Run) -> None:
        self._projection(run)

    def column(self, run: Run) -> Column:
        projection = self._projection(run)
        transform = partial(_open, projection, self.max_chars)
        return Column("embed", ("text",), vector_schema(self.dims), transform, self.identity(projection.fingerprint))

    def _projection(self, run: Run) -> Artifact:
        seed = run.seed if self.seed is None else self.seed
        identity = self.identity(str(seed), run.identity("text"))
        sample = Sample(("text",), self.sample, run.rows, seed, key="text", max_bytes=4 * self.max_chars)
        state = draw(run, sample) if needs_fit(run, "lsa", identity) else {}
        return run.artifact("lsa", identity, partial(_fit, state, self.model_copy(update={"seed": seed})))


def _fit(sample: State, recipe: Lsa, directory: Path) -> None:
    if not sample:
        raise CorpusError("lsa: the corpus has no usable text; see quarantine/row for the reasons")
    counts = word_counts(pa.array(texts(sample), pa.large_string()), recipe.features, recipe.max_chars)
    np.save(directory / PROJECTION, projection(counts, recipe.dims, recipe.seed or 0))


def _open(artifact: Artifact, max_chars: int) -> Transform:
    from scipy.sparse.linalg import norm

    weights = np.asarray(
        np.load(artifact.local() / PROJECTION, mmap_mode="r")
    )  # mapped: a machine's actors share the pages

    def embed(batch: pa.RecordBatch) -> pa.RecordBatch:
        counts = word_counts(batch.column("text"), len(weights), max_chars)
        x: np.ndarray = counts @ weights
        reasons = np.full(len(x), "", dtype=object)
        # What the sample does not span projects to rounding errors, whose direction means nothing.
        reasons[np.linalg.norm(x, axis=1) <= 1e-5 * norm(counts, axis=1)] = "no word in common with the sample"
        reasons[np.diff(counts.indptr) == 0] = f"no word in the first {max_chars} characters"
        return unit_vectors(x, reasons)

    return embed


def word_counts(values: pa.Array, features: int, max_chars: int) -> Any:
    """Sparse CSR (n, features) float32 of 1 + log(count) of the hashed words of n texts."""
    from scipy.sparse import csr_matrix

    words, offsets = hashed_words(values, features, max_chars)
    counts = csr_matrix((np.ones(len(words), np.float32), words, offsets), shape=(len(values), features))
    counts.sum_duplicates()
    counts.data = 1 + np.log(counts.data)
    return counts


def projection(counts: Any, dims: int, seed: int) -> np.ndarray:
    """(features, dims) float32: idf times the right singular vectors of the row-normalised TF-IDF of `word_counts`.

    Columns beyond the rank of `counts` are zero.
    """
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    rows, features = counts.shape
    idf = np.log((1 + rows) / (1 + np.bincount(counts.indices, minlength=features))) + 1
    weighted = normalize(counts.multiply(idf).tocsr().astype(np.float32))
    _, strengths, vectors = randomized_svd(weighted, min(dims, rows), n_iter=4, random_state=seed & 0xFFFFFFFF)
    vectors[strengths <= 1e-5 * strengths[0]] = 0
    weights = np.zeros((features, dims), np.float32)
    weights[:, : len(vectors)] = vectors.T * idf[:, None]
    return weights
