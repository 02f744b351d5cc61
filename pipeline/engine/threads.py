"""Thread counts follow the cores that an actor was given, so that results and speed do not depend on the machine.

Arrow, OpenMP (FAISS), BLAS and polars all start one thread a core of the machine by default; four actors on four cores
would run sixteen threads, and sums in BLAS would differ with the core count.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_cpus = 1


def cpus() -> int:
    """Threads that the code running now may use; recipes pass it to libraries that ask (FAISS, torch, fastText)."""
    return _cpus


def prepare_process(count: float) -> None:
    """Limit every library in this process, before it is imported. For actors, which own their process."""
    threads = str(max(1, int(count)))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = threads
    _set(int(threads))


def limited(count: float) -> AbstractContextManager[Any]:
    """Limit the libraries that are loaded already, inside the block. For work in the caller's own process."""
    _set(max(1, int(count)))
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    return threadpool_limits(limits=_cpus)


def _set(count: int) -> None:
    global _cpus
    _cpus = count
    import pyarrow as pa

    pa.set_cpu_count(count)
