"""Tamis: sieve a training corpus down to the budget that a model deserves.

>>> from pipeline import curate
>>> result = curate("configs/quickstart.yaml")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pipeline.curation import Curated, curate

__all__ = ["Curated", "__version__", "curate"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `tamis --help` must not pay for Arrow.
    if name in ("curate", "Curated"):
        from pipeline import curation

        return getattr(curation, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
