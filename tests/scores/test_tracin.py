"""TracIn: exact products of gradients, summed over checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from scipy.stats import rankdata

pytest.importorskip("torch")

import torch
from two_domains import MASKED, Domains, two_domains

from pipeline.models.causal import load_causal
from pipeline.models.gradients import head, linear_layers
from pipeline.models.training import save_lm, train_lm
from pipeline.scores._influence import MASKED as NO_TOKEN
from pipeline.scores._influence import NOT_FINITE, scored
from pipeline.scores.tracin import Tracin


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return two_domains(tmp_path_factory.mktemp("tracin"))


@pytest.fixture(scope="module")
def earlier(domains: Domains) -> Path:
    """Another checkpoint, whose weights have moved."""
    model, tokenizer = load_causal(domains.model)
    ids = np.arange(64, dtype=np.int32)[None] % 300
    train_lm(model, ids, 3, 1, 1e-2, 0)
    save_lm(model, tokenizer.backend_tokenizer, domains.folder / "earlier")
    return domains.folder / "earlier"


def gradients(folder: Path, texts: list[str], which: str) -> Any:
    """Gradients (n, p) by autograd, one text at a time, of the linear layers' own uses of their weights."""
    model, tokenizer = load_causal(folder)
    layer = model.get_output_embeddings()
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())  # a head of its own, for its gradient alone
    layers = head(model) if which == "last" else linear_layers(model)
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer.backend_tokenizer.encode(text).ids[:48]])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        rows.append(torch.cat([layer.weight.grad.flatten() for layer in layers.values()]))
    return torch.stack(rows)


@pytest.mark.parametrize("which", ["last", "full"])
@pytest.mark.parametrize("normalise", [False, True])
def test_scores_are_the_products_that_autograd_gives(
    domains: Domains, earlier: Path, which: str, normalise: bool
) -> None:
    checkpoints, rates = [str(earlier), str(domains.model)], [3.0, 1.0]
    options = {"gradients": which, "normalise": normalise, "subtask": "task", "pool": "mean"}
    found = domains.run(f"{which}{normalise}", {"kind": "tracin", "checkpoints": checkpoints, "rates": rates} | options)
    rows = [1, 2, 77, 100]
    target = pq.read_table(domains.target)["text"].to_pylist()
    expected = np.zeros(len(rows))
    for folder, rate in zip(checkpoints, (0.75, 0.25), strict=True):
        of_rows, of_target = (gradients(Path(folder), t, which) for t in ([domains.texts[i] for i in rows], target))
        if normalise:
            of_rows, of_target = (torch.nn.functional.normalize(g, dim=1) for g in (of_rows, of_target))
        expected += rate * (of_rows @ of_target.mean(dim=0)).numpy()
    np.testing.assert_allclose(found["score"].to_numpy()[rows], expected, rtol=2e-4, atol=1e-6)


def test_the_best_tenth_is_of_the_target_and_masked_rows_score_nothing(domains: Domains) -> None:
    found = domains.run("run", {"kind": "tracin", "checkpoints": [str(domains.model)], "gradients": "full"})
    assert domains.birds[found["keep"].to_numpy()].mean() > 0.9
    score, rule = found["score"].to_numpy(), np.array(found["rule"].to_pylist())
    assert (score[list(MASKED)] == 0).all()
    assert np.flatnonzero(rule == NO_TOKEN).tolist() == list(MASKED)


def test_without_normalising_shorter_rows_win(domains: Domains) -> None:
    birds = domains.birds & ~np.isin(np.arange(len(domains.texts)), MASKED)
    lengths = rankdata([len(text) for text in domains.texts])[birds]
    with_length = {}
    for normalise in (False, True):
        options = {"checkpoints": [str(domains.model)], "gradients": "full", "normalise": normalise}
        found = domains.run(f"short{normalise}", {"kind": "tracin"} | options)
        with_length[normalise] = np.corrcoef(rankdata(found["score"].to_numpy()[birds]), lengths)[0, 1]
    assert with_length[False] < -0.15
    assert with_length[True] > 0


def test_a_score_that_is_not_finite_is_refused_and_a_masked_row_named() -> None:
    batch = scored(np.array([1.0, np.nan, np.inf, 0.0]), np.array([False, False, False, True]))
    assert batch["score"].to_pylist() == [1, None, None, 0]
    assert batch["quarantine"].to_pylist() == [None, NOT_FINITE, NOT_FINITE, None]
    assert batch["rule"].to_pylist() == ["", "", "", NO_TOKEN]
    assert batch.schema.field("score").type == pa.float32()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"checkpoints": []}, "at least 1"),
        ({"checkpoints": ["hf://a/b"], "rates": [1, 2]}, "2 rates for 1 checkpoints: give one each"),
        ({"checkpoints": ["nowhere"]}, "no folder 'nowhere'"),
    ],
)
def test_errors_at_the_door(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Tracin.model_validate({"target": "t.txt"} | fields)
