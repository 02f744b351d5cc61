"""A tiny causal model, trained once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that has learned `sentences`."""
    pytest.importorskip("torch")
    from tiny_lm import sentences, trained

    return trained(tmp_path_factory.mktemp("tiny-lm"), sentences(400))
