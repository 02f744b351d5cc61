"""DEALRec on sequences of items: the recommender, its gradients and its Hessian, and a whole draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")

from pipeline.artifact import Artifact
from pipeline.corpus.storage import Store
from pipeline.curation import curate
from pipeline.errors import ConfigError
from pipeline.models import sasrec
from pipeline.models.sasrec import Sequences, load_sasrec, losses, new_sasrec, recall, train_sasrec
from pipeline.sample import Sample, sampled
from pipeline.scores.dealrec_sequences import _fit_surrogate, _open_parts

sys.path.insert(0, str(Path(__file__).parents[2]))


def walks(count: int, seed: int, items: int = 12) -> list[list[int]]:
    """Sequences of 2 to 14 of twelve items, numbered by tens, each followed by the next one."""
    rng = np.random.default_rng(seed)
    starts, sizes = rng.integers(0, items, count), rng.integers(2, 15, count)
    return [(10 * ((start + np.arange(size)) % items)).tolist() for start, size in zip(starts, sizes, strict=True)]


def sequences(rows: list[list[int]], length: int = 8) -> Sequences:
    return Sequences.of(pa.array(rows, pa.list_(pa.int32())), np.arange(0, 120, 10), length)


def test_sequences_are_cut_at_their_beginning_and_numbered() -> None:
    found = sequences([[0, 10], [5, 110, 20], list(range(0, 120, 10))], length=3)
    assert found.items.tolist() == [[1, 2, 0, 0], [0, 12, 3, 0], [9, 10, 11, 12]]
    assert found.sizes.tolist() == [2, 3, 4]
    sliced = Sequences.of(pa.array([[0, 10], [20, 30]], pa.list_(pa.int64())).slice(1), np.arange(0, 120, 10), 3)
    assert sliced.items.tolist() == [[3, 4, 0, 0]]


def test_what_stands_beside_a_row_changes_nothing() -> None:
    import torch

    model = new_sasrec(12, 8, 0).eval()
    rows = sequences(walks(9, 1))
    with torch.no_grad():
        together = losses(model, rows)
        for row in range(9):
            torch.testing.assert_close(losses(model, rows.take(np.array([row])))[0], together[row])


def test_gradients_and_hessian_are_those_of_autograd() -> None:
    import torch

    from pipeline.models.gradients import along, outer, squared_norms

    model = new_sasrec(12, 8, 0).eval().requires_grad_(False)
    rows, h = sequences(walks(5, 2)), torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight = sasrec.observed(model).weight
    found: dict[str, torch.Tensor] = {}

    def take(layer: str, a: torch.Tensor, b: torch.Tensor) -> None:
        found.update(whole=outer(a, b), along=along(a, b, h), norm=squared_norms(a, b).sqrt())

    sasrec.gradients(model, rows, take)
    for row in range(5):
        one = rows.take(np.array([row]))
        weight.requires_grad_(True)
        (by_hand,) = torch.autograd.grad(losses(model, one).sum(), weight)
        weight.requires_grad_(False)
        torch.testing.assert_close(found["whole"][row].view(64, 64), by_hand, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["along"][row], (by_hand * h).sum(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found["norm"][row], by_hand.norm(), rtol=1e-4, atol=1e-6)
    one, step = rows.take(np.array([0])), 1e-2

    def gradient_at(shift: float) -> torch.Tensor:
        with torch.no_grad():
            weight.add_(shift * h)
        weight.requires_grad_(True)
        (found,) = torch.autograd.grad(losses(model, one).sum(), weight)
        weight.requires_grad_(False)
        with torch.no_grad():
            weight.sub_(shift * h)
        return found

    by_difference = (gradient_at(step) - gradient_at(-step)) / (2 * step)
    torch.testing.assert_close(sasrec.hessian_product(model, one, h), by_difference, rtol=0.02, atol=2e-4)
    assert not weight.requires_grad


def test_a_recommender_learns_what_follows_what() -> None:
    """One of twelve items follows: 20 guesses are sure to hold it, so the loss says what was learnt (ln 13 is none)."""
    import torch

    rows, held_out = sequences(walks(200, 3)), sequences(walks(40, 4))
    model, facts = train_sasrec(rows, held_out, 12, 40, 0)
    assert facts["recall"] == recall(model, held_out) == 1
    with torch.no_grad():
        assert float(losses(model, held_out).mean()) < 1.5 < float(losses(new_sasrec(12, 8, 0), held_out).mean())
    one, again = (train_sasrec(rows, held_out, 12, 2, 0)[0].state_dict() for _ in range(2))
    for name, value in one.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_a_sample_carries_lists_of_integers() -> None:
    lists = pa.array([[i] * (i % 4) + [7] for i in range(50)], pa.list_(pa.int32()))
    batch = pa.record_batch([pa.array([f"t{i}" for i in range(50)]), lists], ["text", "corpus.items"])
    sample = Sample(("text", "corpus.items"), 9, 50, 0, "text")
    state = sample.merge([sample.update({}, batch.slice(0, 20)), sample.update({}, batch.slice(20))])
    numbers = [int(text[1:]) for text in sampled(state).to_pylist()]
    assert sampled(state, "corpus.items").to_pylist() == [lists[i].as_py() for i in numbers]


def job(folder: Path, table: pa.Table, **score: Any) -> dict[str, Any]:
    (folder / "corpus").mkdir()
    pq.write_table(table, folder / "corpus/part.parquet", row_group_size=40)
    return {
        "corpus": {"path": str(folder / "corpus"), "prompt": "prompt", "response": "response", "shard_mb": 1e-6},
        "scores": [{"kind": "dealrec_sequences", "items": "items", "length": 8, "epochs": 30, "steps": 60} | score],
        "select": {"budget": {"rows": 20}},
        "engine": {"address": "inline", "max_bad_fraction": 0.5},
        "run": str(folder / "run"),
    }


def interactions(count: int) -> pa.Table:
    rows = walks(count, 5)
    rows[3] = [10]
    said = [" ".join(map(str, row)) for row in rows]
    items = pa.array([None if i == 5 else row for i, row in enumerate(rows)], pa.list_(pa.int64()))
    return pa.table({"items": items, "prompt": said, "response": [f"{row[-1]}." for row in rows]})


def test_a_draw_of_sequences(tmp_path: Path) -> None:
    """Rows with nothing to predict are refused; the others take turns, the hardest tenth last."""
    table = interactions(120)
    done = curate(job(tmp_path, table), quiet=True)
    assert done.rows_kept == 20
    scores = ds.dataset(tmp_path / "run/columns/dealrec_sequences").to_table()
    turns = -np.sort(-scores["score"].drop_null().to_numpy())
    np.testing.assert_array_equal(turns, -np.arange(118))
    pruned = np.array(scores["rule"].drop_null().to_pylist()) == "hard_prune"
    assert 0 < pruned.sum() <= 12
    refused = ds.dataset(tmp_path / "run/quarantine/dealrec_sequences-parts").to_table()
    assert sorted(refused["reason"].to_pylist()) == ["corpus.items is null", "fewer than two items"]
    facts = json.loads((tmp_path / "run/artifacts/dealrec_sequences-surrogate/surrogate.json").read_text())
    assert facts["rows"] == len({row["prompt"] for row in table.to_pylist() if len(row["items"] or []) > 1})
    assert facts["v"] > 0
    parts = ds.dataset(tmp_path / "run/columns/dealrec_sequences-parts").to_table()
    assert np.std(parts["influence"].drop_null().to_numpy()) > 0


@pytest.mark.parametrize("v", ["validation", "train"])
def test_influence_is_along_the_mean_gradient_that_is_asked_for(tmp_path: Path, v: str) -> None:
    """A scale that leaves nothing of the Hessian, and one step: h is v + (1 - damping) v."""
    import torch

    lists = pa.array([row for row in walks(90, 6) if len(row) > 1], pa.list_(pa.int64()))
    texts = pa.array([str(i) for i in range(len(lists))])
    sample = Sample(("text", "corpus.items"), 1000, 90, 0, "text")
    state = sample.update({}, pa.record_batch([texts, lists], ["text", "corpus.items"]))
    asked = {"v": v, "epochs": 3, "length": 8, "damping": 0.5, "scale": 1e12, "steps": 1}
    _fit_surrogate(state, "corpus.items", asked, 0, tmp_path)

    model, known, length = load_sasrec(tmp_path)
    weight = sasrec.observed(model).weight

    def gradients(rows: pa.Array) -> torch.Tensor:
        weight.requires_grad_(True)
        each = losses(model, Sequences.of(rows, known, length))
        found = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in each])
        weight.requires_grad_(False)
        return found

    drawn = sampled(state, "corpus.items")
    held = len(drawn) // 5
    h = 1.5 * gradients(drawn.slice(0, held) if v == "validation" else drawn.slice(held)).mean(dim=0)
    np.testing.assert_allclose(np.load(tmp_path / "h.npy"), h, rtol=1e-3, atol=1e-6)
    opened = _open_parts(Artifact("surrogate", "0", Store(str(tmp_path))))
    parts = opened(pa.record_batch([lists], ["corpus.items"]))
    expected = (gradients(lists) * h).sum(dim=(1, 2))
    np.testing.assert_allclose(parts["influence"].to_numpy(), expected, rtol=1e-2, atol=1e-5)
    effort = pa.array(np.arange(len(lists), dtype=np.float32))
    with_model = opened(pa.record_batch([lists, effort], ["corpus.items", "effort"]))
    assert with_model["effort"].equals(effort)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"items": "nothing"}, r"dealrec_sequences\.items: the corpus has no column 'nothing'; it has items, prompt"),
        (
            {"items": "prompt"},
            r"dealrec_sequences\.items: column 'prompt' is string: it takes a list of integers a row",
        ),
    ],
)
def test_items_are_lists_of_integers(tmp_path: Path, score: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        curate(job(tmp_path, interactions(40), **score), quiet=True)


def test_too_few_sequences_are_an_error(tmp_path: Path) -> None:
    config = job(tmp_path, interactions(12)) | {"select": {"budget": {"rows": 2}}}
    with pytest.raises(ConfigError, match="10 sequences are too few to learn from: it takes 20"):
        curate(config, quiet=True)


def test_movielens_is_a_corpus_of_interactions(shared_data: Path, tmp_path: Path) -> None:
    from bench.movielens import interactions as of_movielens

    table = of_movielens(shared_data / "recsys")
    assert len(table) == 575
    assert table["items"].list.len().sum() == 84_018
    first = table.row(0, named=True)
    assert first["items"][0] == 2294
    assert first["prompt"].endswith("Which one comes next?")
    assert table["prompt"].str.count_matches("; ").max() == 19
    config = job(tmp_path, table.head(80).to_arrow(), epochs=2, steps=5)
    assert curate(config, quiet=True).rows_kept == 20
