"""Thread counts follow the cores that an actor was given, so that results and speed do not depend on the machine.

Arrow, OpenMP (FAISS), BLAS, polars and tokenizers all start one thread a core of the machine by default; four actors
on four cores would run sixteen threads, and sums in BLAS would differ with the core count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_cpus = 1

BLAS_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
VARIABLES = (*BLAS_VARIABLES, "POLARS_MAX_THREADS", "RAYON_NUM_THREADS")  # the last is that of tokenizers


def cpus() -> int:
    """Threads that the code running now may use; recipes pass it to libraries that ask (FAISS, torch, fastText)."""
    return _cpus


def prepare_process(count: float) -> None:
    """Limit every library in this process, loaded already or not. For actors, which own their process."""
    for name in VARIABLES:
        os.environ[name] = str(_whole(count))
    _set(_whole(count))
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=_cpus)  # NumPy came with this very module, before the variables


@contextmanager
def limited(count: float) -> Iterator[None]:
    """Limit the libraries inside the block, loaded already or by it. For work in the caller's own process."""
    import pyarrow as pa
    from threadpoolctl import threadpool_limits

    before, arrow = _cpus, pa.cpu_count()
    variables = {name: os.environ.get(name) for name in BLAS_VARIABLES}
    _set(_whole(count))
    # A library that the block imports asks these: else its first fit would run on all cores, and round otherwise.
    os.environ.update(dict.fromkeys(BLAS_VARIABLES, str(_cpus)))
    try:
        with threadpool_limits(limits=_cpus):
            yield
    finally:
        for name, value in variables.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _set(before)
        pa.set_cpu_count(arrow)


def _whole(count: float) -> int:
    return max(1, int(count))


def _set(count: int) -> None:
    global _cpus
    _cpus = count
    import pyarrow as pa

    pa.set_cpu_count(count)
