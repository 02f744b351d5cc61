"""Small trainings on buckets of planted noise, and the budget that follows from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import curate
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.report.plan import make_plan

pytest.importorskip("torch")

SHAPE = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64, "vocab": 320, "context": 32}
WORDS = ["ban", "del", "fip", "gor", "kan", "lel", "mip", "nor"]
ORDER = np.random.default_rng(7).permutation(len(WORDS))


def clean(rng: np.random.Generator, words: int) -> list[str]:
    """A walk on a cycle of words: after one there is but one next."""
    start = int(rng.integers(len(WORDS)))
    return [WORDS[ORDER[(start + i) % len(WORDS)]] for i in range(words)]


def noisy(file: int, rows: int) -> dict[str, list[str]]:
    """The longer a text, the fewer of its words are random letters: all of 20 words, none of 60."""
    rng = np.random.default_rng(file)
    found = []
    for words in rng.integers(20, 60, rows):
        text = clean(rng, int(words))
        junk = rng.random(words) < (60 - words) / 40
        found.append(
            " ".join("".join(rng.choice(list("qvxyz"), 3)) if j else w for w, j in zip(text, junk, strict=True))
        )
    return {"id": [f"{file}-{i}" for i in range(rows)], "text": found}


@pytest.fixture
def configuration(write_corpus: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    corpus = write_corpus(files=2, rows=160, rows_of=noisy)
    rng = np.random.default_rng(99)
    pq.write_table(pa.table({"text": [" ".join(clean(rng, 30)) for _ in range(40)]}), tmp_path / "target.parquet")
    proxies = {
        "target": str(tmp_path / "target.parquet"),
        "share": 0.25,
        "epochs": [1, 2, 4],
        "shape": SHAPE,
        "lr": 0.01,
    }

    def make(run: str = "run", compute: float = 1e9, **changes: Any) -> dict[str, Any]:
        budget = {"compute": compute, "params": 1000, "proxies": proxies | changes}
        return {
            "corpus": {"path": str(corpus), "id": "id"},
            "scores": ["length"],
            "select": {"budget": budget},
            "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
            "engine": {"address": "inline"},
            "run": str(tmp_path / run),
        }

    return make


def test_proxies_tell_the_buckets_apart_and_set_the_budget(
    configuration: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = configuration()
    before = make_plan(parse(config))
    assert any("known once they have been trained" in w for w in before.warnings)
    result = curate(config, quiet=True)
    place = tmp_path / "run" / "artifacts" / "qqt"
    measured = json.loads((place / "measured.json").read_text())
    errors = np.array(measured["errors"])
    assert (errors[0] < errors[-1]).all()  # the cleanest bucket beats the noisiest at every length of training
    assert (np.diff(errors[0]) < 0).all()
    law = json.loads((place / "law.json").read_text())
    assert all(b < 0 for b in law["utility"])
    training = json.loads((tmp_path / "run" / "artifacts" / "selection" / "selection.json").read_text())["training"]
    assert training["buckets"] <= len(law["utility"])
    after = make_plan(parse(config))
    assert after.training[1].best.buckets == training["buckets"]
    assert not any("trained" in w for w in after.warnings)

    written = place.joinpath("law.json").stat().st_mtime_ns
    again = curate(configuration(compute=1e8), quiet=True)  # another compute trains nothing anew
    assert place.joinpath("law.json").stat().st_mtime_ns == written
    assert again.tokens_kept <= result.tokens_kept


def test_buckets_too_small_to_train_on_are_refused(configuration: Callable[..., dict[str, Any]]) -> None:
    for changes, message in (
        ({"rows": 20, "share": 0.01}, "is empty: raise rows or share"),
        ({"rows": 40, "batch": 500}, "less than a batch of 500"),
        ({"target": "nowhere.parquet"}, "no such file"),
    ):
        with pytest.raises(Exception, match=message):
            curate(configuration("small", **changes), quiet=True)


def test_a_proxy_that_cannot_be_fitted_is_refused_at_the_door(configuration: Callable[..., dict[str, Any]]) -> None:
    for changes, message in (({"epochs": [2, 1, 4]}, "ascending"), ({"buckets": 5}, "more than there is")):
        with pytest.raises(ConfigError, match=message):
            parse(configuration(**changes))
