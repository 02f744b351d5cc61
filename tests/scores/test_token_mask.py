"""Token masks: the numbers of Rho-1's example, the line through all tokens, and a run that hands masks to a trainer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from tiny_lm import BIRDS, TREES, sentences, trained

from pipeline.curation import curate
from pipeline.errors import ConfigError
from pipeline.models.causal import load_causal
from pipeline.models.training import pack, save_lm, train_lm
from pipeline.scores._token_mask import Excess, excess, lowest_bin, masks

LOSS, REFERENCE = [2, 0.1, 3, 0.5, 1], [0.5, 0.05, 2.9, 0.6, 0.2]
"""Losses of five tokens under the model in training and under the reference."""


def logs(*rows: list[float]) -> pa.ListArray:
    return pa.array([[-loss for loss in row] for row in rows], pa.list_(pa.float32()))


def line(prior: pa.ListArray, conditional: pa.ListArray, share: float) -> int:
    batch = pa.record_batch([prior, conditional], ["p", "c"])
    return lowest_bin(Excess("p", "c").update({}, batch)["tokens"], share)


def test_the_example_of_five_tokens() -> None:
    prior, reference = logs(LOSS), logs(REFERENCE)
    values = excess(prior, reference)
    np.testing.assert_allclose(values, [1.5, 0.05, 0.1, -0.1, 0.8], atol=1e-6)
    (mask,) = masks(values, np.array([5]), line(prior, reference, 0.6)).to_pylist()
    assert mask == [False, True, False, True, False, True]  # the first token of a row has no loss; of the five 0, 2, 4
    assert np.mean(np.array(LOSS)[mask[1:]]) == 2.0
    assert np.mean(LOSS) == pytest.approx(1.32)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 10**6), st.floats(0.01, 1))
def test_the_share_is_of_all_tokens_whatever_the_shards(lengths: list[int], seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    prior, conditional = (logs(*(rng.gamma(2, 1, n).tolist() for n in lengths)) for _ in range(2))
    values, tokens = excess(prior, conditional), np.array(lengths)
    statistic, cut = Excess("p", "c"), len(lengths) // 2
    parts = [slice(a, b) for a, b in pairwise([0, cut, len(lengths)]) if b > a]
    states = [statistic.update({}, pa.record_batch([prior[s], conditional[s]], ["p", "c"])) for s in parts]
    lowest = lowest_bin(statistic.merge(states)["tokens"], share)
    assert lowest == line(prior, conditional, share)

    found = masks(values, tokens, lowest)
    assert found.value_lengths().to_pylist() == (tokens + 1).tolist()
    assert not any(row[0] for row in found.to_pylist())
    kept = np.concatenate([row[1:] for row in found.to_pylist()])
    assert kept.sum() >= share * kept.size
    wanted = np.sort(values)[::-1][int(np.ceil(share * kept.size)) - 1]
    assert values[kept].min() > wanted - 1e-3  # a bin
    assert values[~kept].max(initial=-99) <= wanted
    halves = [masks(values[tokens[: s.start].sum() :][: tokens[s].sum()], tokens[s], lowest) for s in parts]
    assert pa.concat_arrays(halves).to_pylist() == found.to_pylist()


def test_models_that_agree_leave_every_token_in() -> None:
    same = logs(LOSS)
    assert masks(excess(same, same), np.array([5]), line(same, same, 0.6)).to_pylist() == [[False] + [True] * 5]


def test_curated_rows_carry_their_masks(tmp_path: Path) -> None:
    """Rows of trees end in birds; a conditional that was tuned on birds marks the birds."""
    mixed = [f"{a} {b}" for a, b in zip(sentences(200, 1, TREES), sentences(200, 2, BIRDS), strict=True)]
    trained(tmp_path / "prior", mixed, steps=30)
    model, tokenizer = load_causal(tmp_path / "prior")
    backend = tokenizer.backend_tokenizer
    blocks = pack([e.ids for e in backend.encode_batch(sentences(200, 3, BIRDS))], 64, 0)
    train_lm(model, blocks, 30, 8, 3e-3, 0)
    save_lm(model, backend, tmp_path / "conditional")
    texts = [f"{a} {b}" for a, b in zip(sentences(40, 5, TREES), sentences(40, 6, BIRDS), strict=True)]
    table = pa.table({"id": [str(i) for i in range(42)], "text": [*texts, "x", None]})
    pq.write_table(table, tmp_path / "corpus.parquet", row_group_size=15)
    models = {"prior": str(tmp_path / "prior"), "conditional": str(tmp_path / "conditional")}
    config = {
        "corpus": {"path": str(tmp_path / "corpus.parquet"), "id": "id", "shard_mb": 1e-6},
        "scores": [{"kind": "loss_reduction", "mask": 0.4, **models}],
        "select": {"budget": {"rows": 30}},
        "engine": {"address": "inline", "max_bad_fraction": 1},
        "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
        "run": str(tmp_path / "run"),
    }
    written = pq.read_table(curate(config, quiet=True).path).to_pylist()
    assert len(written) == 30
    inside, outside = [], []
    for row in written:
        encoding, mask = backend.encode(row["text"]), row["tamis"]["loss_reduction_mask"]
        assert len(mask) == min(64, len(encoding.ids))
        birds = min(row["text"].find(bird) for bird in BIRDS if bird in row["text"])
        for at, marked in enumerate(mask[1:], 1):
            (inside if encoding.offsets[at][0] >= birds else outside).append(marked)
    assert np.mean(inside) > np.mean(outside) + 0.2

    with pytest.raises(ConfigError, match=r"loss_reduction\.mask marks the tokens of whole texts"):
        curate(config | {"output": {"rewrite": {"kind": "functions"}}}, quiet=True)

    stored = ds.dataset(tmp_path / "run/columns/loss_reduction").to_table()
    assert stored["mask"].null_count == 2  # one token, and no text
    marks = np.concatenate([row[1:] for row in stored["mask"].drop_null().to_pylist()])
    assert 0.4 <= marks.mean() < 0.41
