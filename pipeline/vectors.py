"""Vectors between Arrow and NumPy, and FAISS at the speed that this CPU has.

A vector column holds `vector`: FixedSizeList<float16>[d], unit norm. What cannot be a unit vector (NaN, infinite, zero)
is null there, with the reason in `quarantine`.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engine import threads
from pipeline.recipe import QUARANTINE

BLOCK = 512
"""Rows whose nearest points are gathered at once: 512 x 384 float32 stay in a core's cache."""


CORE_TYPE = "OPENBLAS_CORETYPE"


def vector_schema(dims: int) -> pa.Schema:
    """Fields of an embedding of `dims` dimensions."""
    return pa.schema([("vector", pa.list_(pa.float16(), dims)), (QUARANTINE, pa.string())])


def matrix(values: pa.FixedSizeListArray) -> np.ndarray:
    """The (n, d) array behind n vectors without nulls, in their own type; a view, not a copy."""
    flat: np.ndarray = values.flatten().to_numpy()
    return flat.reshape(len(values), values.type.list_size)


def unit_vectors(x: np.ndarray, reasons: np.ndarray | None = None) -> pa.RecordBatch:
    """Normalise (n, d) floats to a batch of `vector_schema(d)`.

    `reasons`: n str objects, why a row is refused already, "" where it is not; a refused row may hold anything.
    """
    reasons = np.full(len(x), "", dtype=object) if reasons is None else reasons.copy()
    # Divided by its largest component first, so that squares neither overflow nor vanish, whatever the scale.
    peak = np.abs(x).max(axis=1, initial=0.0, keepdims=True)
    reasons[(reasons == "") & ~np.isfinite(peak[:, 0])] = "vector is not finite"
    reasons[(reasons == "") & (peak[:, 0] == 0)] = "vector is zero"
    refused = reasons != ""
    scaled = np.divide(x, peak, out=np.zeros_like(x), where=~refused[:, None]).astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
    norms[refused] = 1.0
    flat = pa.array((scaled / norms[:, None]).astype(np.float16).ravel())
    mask = pa.array(refused) if refused.any() else None
    vectors = pa.FixedSizeListArray.from_arrays(flat, x.shape[1], mask=mask)
    return pa.record_batch([vectors, pa.array(reasons, pa.string(), mask=~refused)], schema=vector_schema(x.shape[1]))


def load_faiss() -> ModuleType:
    """Import FAISS with the BLAS kernels that fit this CPU.

    The wheels of faiss-cpu carry an OpenBLAS of 2021, which takes a CPU that it does not know for one of 2004 and then
    multiplies matrices with SSE3 (4 to 5 times slower on a Xeon of 2023). NumPy's own OpenBLAS knows, and is asked.
    """
    if "faiss" not in sys.modules and CORE_TYPE not in os.environ:
        from threadpoolctl import threadpool_info

        numpy_blas = [i for i in threadpool_info() if i["internal_api"] == "openblas" and "numpy" in i["filepath"]]
        if numpy_blas:
            newer = {"SapphireRapids": "SkylakeX"}  # kernels that the old library lacks: the nearest that it has
            core = numpy_blas[0]["architecture"]
            os.environ[CORE_TYPE] = newer.get(core, core)
            import faiss

            # SciPy's OpenBLAS would obey it, too, if loaded later: results would depend on the order of imports.
            del os.environ[CORE_TYPE]
    import faiss

    faiss.omp_set_num_threads(threads.cpus())
    module: ModuleType = faiss
    return module


def as_float32(vectors: np.ndarray) -> np.ndarray:
    """(n, d) float16 or float32 as contiguous float32; FAISS converts with all threads, NumPy with one."""
    if vectors.dtype != np.float16:
        return np.ascontiguousarray(vectors, dtype=np.float32)
    faiss = load_faiss()
    codec = faiss.ScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16)
    decoded: np.ndarray = codec.decode(np.ascontiguousarray(vectors).view(np.uint8))
    return decoded


def flat_index(points: np.ndarray) -> Any:
    """FAISS's exact inner-product index over (k, d) float32."""
    index = load_faiss().IndexFlatIP(points.shape[1])
    index.add(points)
    return index


def nearest(vectors: np.ndarray, points: np.ndarray, index: Any) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of k unit points for each of (n, d) vectors: its number (int32) and 1 - cosine (float32), both (n,).

    `index` is `flat_index(points)`. The distance is worked out again row by row: so it does not depend on the rows of
    the same batch, as matrix products do in their last bits, and holds for the vector as it is stored, whose norm
    float16 leaves off by up to 5e-4.
    """
    x = as_float32(vectors)
    found = index.search(x, 1)[1][:, 0].astype(np.int32)
    cosine = np.empty(len(x), np.float32)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        cosine[rows] = np.vecdot(x[rows], points[found[rows]]) / np.sqrt(np.vecdot(x[rows], x[rows]))
    return found, np.clip(1.0 - cosine, 0.0, 2.0)
