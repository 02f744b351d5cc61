"""The choice of a calibration set: divergences with known answers, planted sets, and whole runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr
from tiny_lm import TINY, sentences, trained

from pipeline import curate
from pipeline.config import parse
from pipeline.errors import ConfigError, TamisError
from pipeline.models.causal import load_causal
from pipeline.models.training import lm_loss
from pipeline.scores._divergence import between, kl
from pipeline.scores._wanda import wanda
from pipeline.scores.calibration import choose, divergence_of, packed

SMALL = {"candidates": 4, "rows": 6, "tokens": 24, "probe_rows": 12, "probe_tokens": 16}


def of(p: Any, q: Any) -> float:
    return float(kl(torch.tensor(p).log(), torch.tensor(q).log()).mean())


def test_divergence_by_hand() -> None:
    assert of([[0.7, 0.3], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]) == pytest.approx(0.010801, abs=1e-6)
    assert of([[0.5, 0.5]], [[0.9, 0.1]]) == pytest.approx(0.510826, abs=1e-6)
    assert of([[0.9, 0.1]], [[0.5, 0.5]]) == pytest.approx(0.368064, abs=1e-6)


def test_divergence_is_positive_and_blind_to_a_shift_of_logits() -> None:
    torch.manual_seed(0)
    p, q = 30 * torch.randn(2, 50, 100)
    found = kl(p.log_softmax(-1), q.log_softmax(-1))
    assert (found >= 0).all()
    assert torch.isfinite(found).all()  # q is below the smallest float32 here and there, in log space it is not 0
    assert (q.softmax(-1) == 0).any()
    torch.testing.assert_close(kl((p + 3).log_softmax(-1), (q - 5).log_softmax(-1)), found, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("model"), sentences(300), steps=150)


def blocks(folder: Path, count: int, tokens: int, seed: int) -> np.ndarray:
    _, tokenizer = load_causal(folder)
    rows = [tokenizer(text)["input_ids"] for text in sentences(4 * count, seed)]
    ids, _ = packed(rows, count, tokens, tokenizer.eos_token_id)
    assert len(ids) == count
    return ids


def test_a_model_that_is_not_pruned_has_not_changed(folder: Path) -> None:
    model, _ = load_causal(folder)
    probe = blocks(folder, 4, 32, 1)
    found = divergence_of(model, [probe], probe, lambda *_: None, 0.5)
    assert found.shape == (1, 4)
    assert abs(found).max() < 1e-7
    value, _ = between(model, model, probe.ravel(), np.arange(0, 129, 32), kl)
    assert abs(value).max() < 1e-7


def test_a_set_of_random_tokens_is_never_chosen(folder: Path) -> None:
    model, _ = load_causal(folder)
    before = copy.deepcopy(model.state_dict())
    probe = blocks(folder, 24, 32, 9)
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(1, TINY.vocab, (8, 48))
        sets = [blocks(folder, 8, 48, 10 * seed + i) for i in (1, 2, 3)]
        sets.insert(seed, noise)
        order, differ = choose(divergence_of(model, sets, probe, wanda, 0.5))
        assert differ
        assert order[-1] == seed
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # copies were pruned


@pytest.mark.parametrize("rows", [1, 8])
def test_the_divergence_foretells_the_loss_elsewhere(folder: Path, rows: int) -> None:
    """The paper's figure 3. (At sparsity 0.3 pruning moves the loss of this model by less than the probe's noise.)"""
    model, _ = load_causal(folder)
    sets = [blocks(folder, rows, 32, 100 + i) for i in range(8)]
    probe, other = blocks(folder, 64, 32, 50), blocks(folder, 200, 32, 60)
    losses = []
    for ids in sets:
        pruned = copy.deepcopy(model)
        wanda(pruned, ids, 0.5)
        losses.append(lm_loss(pruned, other))
    assert spearmanr(divergence_of(model, sets, probe, wanda, 0.5).mean(axis=1), losses).statistic > 0.7


def test_wanda_takes_the_least_of_every_output(folder: Path) -> None:
    model, _ = load_causal(folder)
    dense, ids = copy.deepcopy(model), blocks(folder, 4, 32, 3)
    wanda(model, ids, 0.25)
    layer, whole = model.model.layers[0].mlp.gate_proj, dense.model.layers[0].mlp.gate_proj
    seen: list[torch.Tensor] = []
    whole.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, -2)))
    with torch.inference_mode():
        dense(input_ids=torch.from_numpy(ids.astype(np.int64)))
    matters = whole.weight.abs() * torch.cat(seen).norm(dim=0)
    for i in range(len(matters)):
        gone = layer.weight[i] == 0
        assert gone.sum() == 8  # of 32
        assert matters[i][gone].max() <= matters[i][~gone].min()
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)


def test_the_choice() -> None:
    noise = 0.01 * np.random.default_rng(0).standard_normal((4, 128))
    assert choose(np.array([[3.0], [1], [2], [4]]) + noise) == ([1, 2, 0, 3], True)
    broken = np.array([[np.nan], [2.0], [1], [np.inf]]) + noise
    assert choose(broken) == ([2, 1], True)
    assert choose(np.ones((3, 5))) == ([0, 1, 2], False)
    with pytest.raises(TamisError, match="not finite: lower the sparsity"):
        choose(np.full((2, 5), np.nan))


def test_what_does_not_differ_is_not_chosen_among() -> None:
    """Eight sets that are alike but for noise. That all means lie within one standard error, which is the obvious rule,
    holds for hardly any of them; and where the noise is that of the probe's sequences, it hides what is there."""
    doubts, within = 0, 0
    for seed in range(200):
        kl = np.random.default_rng(seed).gamma(4, 0.25, (8, 128))
        order, differ = choose(kl)
        doubts += not differ
        assert differ or order[0] == 0
        within += np.ptp(kl.mean(axis=1)) <= kl.std(axis=1).mean() / np.sqrt(128)
    assert doubts >= 180
    assert within <= 20
    hard = np.random.default_rng(0).gamma(1, 1, 128)  # how hard the sequences are, the same for every set
    kl = hard * np.array([[1.02], [1], [1.01]])
    assert choose(kl) == ([1, 2, 0], True)
    assert np.ptp(kl.mean(axis=1)) < kl.std(axis=1).mean() / np.sqrt(128)


def test_short_rows_are_packed() -> None:
    ids, used = packed([[1, 2, 3, 4, 5], [6], [7, 8], [9]], 2, 4, end=0)
    assert (ids.tolist(), used) == ([[1, 2, 3, 4], [6, 0, 7, 8]], 3)
    ids, used = packed([[1, 2], [3]], 2, 4, end=None)
    assert (ids.shape, used) == ((0, 4), 2)


def corpus(directory: Path, rows: int = 400) -> Path:
    (directory / "corpus").mkdir()
    table = pa.table({"text": sentences(rows, 5)})
    for half in (0, 1):
        part = table.slice(half * rows // 2, rows // 2)
        pq.write_table(part, directory / "corpus" / f"{half}.parquet", row_group_size=60)
    return directory / "corpus"


def configuration(place: Path, run: Path, folder: Path, budget: Any = None, **fields: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(place), "shard_mb": 1e-6},
        "scores": [{"kind": "calibration", "model": str(folder)} | SMALL | fields],
        "select": {"budget": budget or {"rows": 5}},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "engine": {"address": "inline"},
        "run": str(run),
    }


def test_a_budget_of_its_rows_keeps_the_winner(tmp_path: Path, folder: Path) -> None:
    place = corpus(tmp_path)
    config = configuration(place, tmp_path / "run", folder)
    curate(parse(config), quiet=True)
    sets = json.loads((tmp_path / "run/artifacts/calibration-sets/sets.json").read_text())
    winner = sets["chosen"]
    assert sets["differ"]
    assert sets["sets"][winner]["kl"] == min(of_set["kl"] for of_set in sets["sets"])
    config["select"] = {"budget": {"rows": sets["sets"][winner]["rows"]}}
    result = curate(parse(config), quiet=True)
    rows = pl.read_parquet(tmp_path / "run/columns/calibration/*.parquet")
    keep = pl.read_parquet(tmp_path / "run/columns/select/*.parquet")["keep"]
    assert set(rows.filter(keep)["candidate"]) == {winner}
    assert result.rows_kept == (rows["candidate"] == winner).sum()
    place_of = {number: i for i, number in enumerate(sets["order"])} | {-1: np.inf}
    expected = [1 / (1 + place_of[number]) for number in rows["candidate"]]
    np.testing.assert_allclose(rows["score"], expected, rtol=1e-6)

    tokens = np.load(tmp_path / "run/artifacts/calibration-sets/sets.npz", allow_pickle=False)
    assert (tokens["ids"].shape, tokens["probe"].shape, tokens["kl"].shape) == ((4, 6, 24), (12, 16), (4, 12))
    table = pl.read_parquet(tmp_path / "run/artifacts/calibration-sets/rows.parquet")
    shards = [pl.read_parquet(f) for f in sorted((tmp_path / "run/columns/calibration").glob("*.parquet"))]
    for row in table.filter(pl.col("candidate") == winner).to_dicts():  # the addresses are those of the rows
        assert shards[row["address.shard"]]["candidate"][row["address.row"]] == winner


def test_shards_do_not_show_and_seeds_do(tmp_path: Path, folder: Path) -> None:
    place = corpus(tmp_path)
    found = []
    for name, changes in (("split", {}), ("whole", {}), ("other", {"seed": 1})):
        config = configuration(place, tmp_path / name, folder, **changes)
        if name == "whole":
            config["corpus"] = {"path": str(place)}
        curate(parse(config), quiet=True)
        found.append(pl.read_parquet(tmp_path / name / "columns/calibration/*.parquet"))
    assert found[0].equals(found[1])
    assert not found[0].equals(found[2])


def test_no_set_holds_a_text_of_the_probe(tmp_path: Path, folder: Path) -> None:
    texts = sentences(400, 5)
    pq.write_table(pa.table({"text": texts[:100]}), tmp_path / "probe.parquet")
    fields = {"probe": str(tmp_path / "probe.parquet"), "probe_rows": 60}
    curate(parse(configuration(corpus(tmp_path), tmp_path / "run", folder, **fields)), quiet=True)
    rows = pl.read_parquet(tmp_path / "run/columns/calibration/*.parquet")["candidate"]
    probe = np.load(tmp_path / "run/artifacts/calibration-sets/sets.npz", allow_pickle=False)["probe"]
    _, tokenizer = load_causal(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts[:100]]
    _, used = packed(ids, 60, 16, tokenizer.eos_token_id)
    assert len(probe) == 60
    assert used > 50
    held_out = set(texts[:used])
    drawn = [text for text, candidate in zip(texts, rows, strict=True) if candidate >= 0]
    assert drawn
    assert not held_out & set(drawn)


def test_a_pruner_of_ones_own_that_makes_no_difference(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_pruner.py").write_text("def nothing(model, ids, sparsity):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = configuration(corpus(tmp_path), tmp_path / "run", folder, pruner="own_pruner:nothing")
    curate(parse(config), quiet=True)
    sets = json.loads((tmp_path / "run/artifacts/calibration-sets/sets.json").read_text())
    assert (sets["chosen"], sets["differ"]) == (0, False)
    assert max(of_set["kl"] for of_set in sets["sets"]) < 1e-7


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"pruner": "no_such_module:f"}, "pruner 'no_such_module:f' cannot be imported"),
        ({"pruner": "magnitude"}, "pattern"),
        ({"model": "nowhere"}, "there is no folder 'nowhere'"),
        ({"candidates": 1}, "greater than or equal to 2"),
        ({"tokens": 100}, "100 is more than the model takes, 64"),
        ({"rows": 3000}, r"rows fill \d+ of the 3,000 sequences of 24 tokens that a set needs"),
    ],
)
def test_errors_at_the_door(tmp_path: Path, folder: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        curate(parse(configuration(corpus(tmp_path), tmp_path / "run", folder, **fields)), quiet=True)
