"""Perplexity: its definition, ranks and bands beside NumPy, runs with a model that is given or trained."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from tiny_lm import BIRDS, TINY, sentences, trained

from pipeline.artifact import Artifact
from pipeline.config import parse
from pipeline.corpus.storage import Store
from pipeline.curation import curate
from pipeline.engine.pool import InlinePool
from pipeline.models.causal import load_causal
from pipeline.scores.perplexity import BINS, LARGEST, Losses, Perplexity, _open, _open_loss, _write_ranks


def score_of(nats: np.ndarray, reference: np.ndarray, around: float | None = None, shards: int = 1) -> pa.RecordBatch:
    """Score batch of n losses, ranked among a reference."""
    statistic = Losses("loss.nats")
    parts = [p for p in np.array_split(reference.astype(np.float32), shards) if len(p)]
    state = statistic.merge([statistic.update({}, pa.record_batch([p], ["loss.nats"])) for p in parts])
    with tempfile.TemporaryDirectory() as directory:
        _write_ranks(state, Path(directory))
        transform = _open(Artifact("ranks", "", Store(directory)), around)
        return transform(pa.record_batch([nats.astype(np.float32)], ["loss.nats"]))


@pytest.mark.parametrize(("length", "expected"), [(9, 21.5443), (8, 31.6228)])
def test_the_definition(length: int, expected: float) -> None:
    """Twelve orders of magnitude over nine tokens, or over eight."""
    logp = pa.array([[-12 * math.log(10) / length] * length, [-1.0] * 3], pa.list_(pa.float32()))
    loss = _open_loss()(pa.record_batch([logp], ["lm.logp"]))
    assert loss["tokens"].to_pylist() == [length, 3]
    nats = loss["nats"].to_numpy()
    found = score_of(nats, nats)
    assert found["perplexity"][0].as_py() == pytest.approx(expected, abs=1e-4)
    assert found["score"][0].as_py() == pytest.approx(-math.log10(expected), abs=1e-5)


@given(arrays(np.float32, st.integers(1, 300), elements=st.floats(0, 30, width=32)), st.integers(1, 4), st.floats(0, 1))
def test_ranks_are_shares_to_the_width_of_a_bin(nats: np.ndarray, shards: int, around: float) -> None:
    found = score_of(nats, nats, around, shards)
    rank, width = found["rank"].to_numpy(), LARGEST / BINS * 1.01
    assert (rank >= [np.mean(nats < x - width) - 1e-6 for x in nats]).all()
    assert (rank <= [np.mean(nats <= x + width) + 1e-6 for x in nats]).all()
    np.testing.assert_allclose(found["score"].to_numpy(), -np.abs(rank - around), atol=1e-6)
    order = np.argsort(nats, kind="stable")
    assert (np.diff(rank[order]) >= 0).all()


def test_bands_are_thirty_thirty_and_forty_percent() -> None:
    nats = np.linspace(2, 8, 1000)
    found = score_of(nats, nats)["band"].to_pylist()
    assert [found.count(band) for band in ("head", "middle", "tail")] == pytest.approx([300, 300, 400], abs=1)
    assert found == sorted(found)


def test_a_band_is_kept_by_the_distance_to_its_rank() -> None:
    nats = np.random.default_rng(0).gamma(4, 1, 2000)
    found = score_of(nats, nats, 0.45)
    inside = found["score"].to_numpy() >= -0.15
    middle = np.array(found["band"].to_pylist()) == "middle"
    assert (inside != middle).sum() <= 2


def test_a_loss_beyond_every_number_is_infinite_and_last() -> None:
    found = score_of(np.array([1.0, 200.0]), np.array([1.0, 200.0]))
    assert found["perplexity"].to_pylist() == [pytest.approx(math.e), math.inf]
    assert found["band"].to_pylist() == ["head", "tail"]
    assert np.argmax(found["score"].to_numpy()) == 0


def run_score(directory: Path, texts: list[str], fields: dict[str, Any], select: dict[str, Any]) -> list[str]:
    """Texts kept by a run."""
    pq.write_table(pa.table({"text": texts}), directory / "corpus.parquet", row_group_size=max(1, len(texts) // 3))
    config = {
        "corpus": {"path": str(directory / "corpus.parquet"), "shard_mb": 1e-6},
        "scores": [{"kind": "perplexity", **fields}],
        "select": select,
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "run": str(directory / "run"),
    }
    result = curate(parse(config), pool=InlinePool, quiet=True)
    return [t for f in sorted(Path(result.path).glob("*.parquet")) for t in pq.read_table(f)["text"].to_pylist()]


def stored(directory: Path, column: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(p) for p in sorted((directory / "run/columns" / column).glob("*.parquet")))


def test_a_run_with_a_model_that_is_given(tmp_path: Path) -> None:
    import torch

    folder = trained(tmp_path / "model", sentences(200))
    texts = [*sentences(40, 1), *sentences(10, 2, BIRDS)]
    kept = run_score(tmp_path, texts, {"model": str(folder), "max_tokens": 32}, {"budget": {"rows": 30}})
    model, tokenizer = load_causal(folder)
    table = stored(tmp_path, "perplexity")
    for text, found in zip(texts, table["perplexity"].to_pylist(), strict=True):
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=32)["input_ids"]])
        with torch.no_grad():
            assert found == pytest.approx(math.exp(model(ids, labels=ids).loss), rel=1e-4)
    assert set(kept) <= set(texts[:40])  # what the model knows comes first
    ranks = np.argsort(np.argsort(table["perplexity"].to_numpy()))
    np.testing.assert_allclose(table["rank"].to_numpy(), (ranks + 0.5) / 50, atol=0.031)  # two of them share a bin


def test_a_run_with_a_model_that_is_trained_keeps_the_high_end(tmp_path: Path) -> None:
    texts = [*sentences(60, 1), *sentences(6, 2, BIRDS)]
    train = {"shape": vars(TINY), "steps": 40, "batch": 8, "sample": 100}
    kept = run_score(tmp_path, texts, {"train": train, "around": 1}, {"budget": {"rows": 6}})
    assert (tmp_path / "run/artifacts/perplexity-prior/model.safetensors").is_file()
    assert len(set(kept) & set(texts[60:])) >= 5  # what is rare in the corpus
    table = stored(tmp_path, "perplexity")
    np.testing.assert_allclose(table["score"].to_numpy(), table["rank"].to_numpy() - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"around": 30}, "less than or equal to 1"),
        ({"model": "hf://a/b", "train": {"steps": 3}}, "trained already"),
        ({"model": "no/where"}, "there is no folder"),
        ({"train": {"steps": 0}}, "greater than or equal to 1"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Perplexity.model_validate(fields)
