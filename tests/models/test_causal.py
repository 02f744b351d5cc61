"""Token log-probabilities beside the model itself; padding, batches, and rows of which nothing can be said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_lm import sentences

from pipeline.corpus.rows import row_column
from pipeline.errors import TamisError
from pipeline.models.causal import (
    NOT_FINITE,
    ONE_TOKEN,
    Scorer,
    check_model,
    groups,
    load_causal,
    padded,
    token_batch,
    token_column,
)
from pipeline.run import Run


@pytest.fixture(scope="module")
def scorer(tiny_lm: Path) -> Scorer:
    return Scorer(tiny_lm, 64)


def column_of(scorer: Scorer, texts: list[str]) -> pa.RecordBatch:
    ids, offsets = scorer.tokenize(pa.array(texts))
    return token_batch(ids, offsets, scorer(ids, offsets))


def test_log_probabilities_are_those_of_the_model(tiny_lm: Path, scorer: Scorer) -> None:
    import torch

    model, tokenizer = load_causal(tiny_lm)
    texts = sentences(20, seed=1)
    found = column_of(scorer, texts)
    for text, ids, logp in zip(texts, found["ids"].to_pylist(), found["logp"].to_pylist(), strict=True):
        assert ids == tokenizer(text)["input_ids"][:64]
        with torch.no_grad():
            expected = (
                model(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
            )
        np.testing.assert_allclose(logp, expected[:, 0].numpy(), atol=1e-5)


def test_a_row_does_not_depend_on_the_batch(scorer: Scorer) -> None:
    texts = sentences(60, seed=2)
    together = column_of(scorer, texts)["logp"].to_pylist()
    backwards = column_of(scorer, texts[::-1])["logp"].to_pylist()[::-1]
    alone = [column_of(scorer, [text])["logp"].to_pylist()[0] for text in texts]
    for rows in zip(together, backwards, alone, strict=True):
        np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)
        np.testing.assert_allclose(rows[0], rows[2], atol=1e-5)
        assert np.mean(rows[0]) == pytest.approx(np.mean(rows[2]), abs=1e-5)


def test_chunks_of_the_softmax_change_nothing(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sentences(10, seed=3)
    whole = column_of(scorer, texts)
    monkeypatch.setattr(scorer, "chunk", 7)
    assert column_of(scorer, texts) == whole


def test_special_tokens_in_a_text_are_text(scorer: Scorer) -> None:
    found = column_of(scorer, ["<|endoftext|>alder birch"])
    assert 0 not in found["ids"].to_pylist()[0]


def test_rows_without_a_loss_are_refused(scorer: Scorer) -> None:
    found = column_of(scorer, ["alder birch", "x", "cedar elm"])
    assert found["quarantine"].to_pylist() == [None, ONE_TOKEN, None]
    assert found["ids"].null_count == found["logp"].null_count == 1

    ids, offsets = np.arange(9, dtype=np.int32), np.array([0, 3, 4, 4, 9, 9])
    logp = np.array([np.nan, -1, -2, np.nan, np.nan, -3, -np.inf, -4, -5], np.float32)
    values = token_batch(ids, offsets, logp)
    assert values["quarantine"].to_pylist() == [None, ONE_TOKEN, ONE_TOKEN, NOT_FINITE, ONE_TOKEN]
    assert values["ids"].to_pylist() == [[0, 1, 2], None, None, None, None]
    assert values["logp"].to_pylist() == [[-1, -2], None, None, None, None]


@given(st.lists(st.integers(0, 1024), min_size=1, max_size=300), st.integers(64, 9000))
def test_groups_hold_every_row_once_within_the_tokens(lengths: list[int], tokens: int) -> None:
    rows = np.array(lengths)
    found = list(groups(rows, tokens))
    members = [int(i) for group, _ in found for i in group]
    assert sorted(members) == np.flatnonzero(rows > 1).tolist()
    for group, width in found:
        assert rows[group].max() <= width <= max(8, rows[group].max() * 17 / 16 + 8)
        assert len(group) * width <= tokens or len(group) == 1


def test_widths_are_few_and_padding_is_below_a_twentieth() -> None:
    lengths = np.arange(2, 1025)
    assert len(np.unique(padded(lengths))) == 64
    for mean in (100, 300, 900):  # log-normal, as documents are
        rows = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1, 5000).astype(int).clip(2, 1024)
        assert rows.sum() / padded(rows).sum() > 0.95


def corpus_of(path: Path, texts: list[str | None]) -> Path:
    pq.write_table(pa.table({"text": texts}), path / "corpus.parquet", row_group_size=4)
    return path / "corpus.parquet"


def test_the_column_is_stored_and_found_again(tmp_path: Path, tiny_lm: Path, open_run: Callable[..., Run]) -> None:
    corpus = corpus_of(tmp_path, [*sentences(9), "x", None, "alder " * 200])
    values = []
    for address in ("a", "b"):
        shutil.copytree(tiny_lm, tmp_path / address)
        with open_run(corpus, name=address + "-run", max_bad_fraction=1) as run:
            column = token_column(run, str(tmp_path / address), 32)
            run.materialize([row_column(False, None), column])
            parts = sorted((tmp_path / f"{address}-run/columns" / column.name).glob("*.parquet"))
            values.append((column.name, column.identity, pa.concat_tables([pq.read_table(p) for p in parts])))
    assert values[0][:2] == values[1][:2]  # the same files elsewhere
    assert values[0][2] == values[1][2]
    name, _, table = values[0]
    assert name.startswith("lm-")
    assert len(name) == 15
    assert [i for i, row in enumerate(table["ids"].to_pylist()) if row is None] == [9, 10]
    assert max(len(row) for row in table["ids"].drop_null().to_pylist()) == 32
    for ids, logp in zip(table["ids"].drop_null().to_pylist(), table["logp"].drop_null().to_pylist(), strict=True):
        assert len(logp) == len(ids) - 1


def test_the_name_says_files_and_tokens(tmp_path: Path, tiny_lm: Path, open_run: Callable[..., Run]) -> None:
    with open_run(corpus_of(tmp_path, ["alder birch"])) as run:
        names = [token_column(run, str(tiny_lm), n).name for n in (16, 32, 64, 1024)]
    assert len(set(names)) == 3
    assert names[2] == names[3]  # the context of the model is 64


def broken(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    for name, content in changes.items():
        path = to / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return to


def test_errors_at_the_door(tmp_path: Path, tiny_lm: Path) -> None:
    check_model("perplexity", str(tiny_lm))
    check_model("perplexity", "hf://org/name")
    for model, says in [
        ("no/such/folder", "there is no folder 'no/such/folder'; a model of the hub is written hf://org/name"),
        ("hf://name", "hf://org/name"),
        (str(broken(tiny_lm, tmp_path / "a", model__safetensors=None)), r"holds no \*.safetensors"),
        (str(broken(tiny_lm, tmp_path / "b", tokenizer__json=None)), "holds no tokenizer.json"),
    ]:
        with pytest.raises(ValueError, match=says):
            check_model("perplexity", model)
    with pytest.raises(TamisError, match="cannot be read as a causal language model"):
        load_causal(broken(tiny_lm, tmp_path / "c", config__json=b'{"model_type": "nothing"}'))


def test_a_model_whose_layers_differ_is_read_as_well(tiny_lm: Path, tmp_path: Path) -> None:
    """What `tamis compress` makes scores rows, as any other model does."""
    import torch

    from pipeline.compress import folder
    from pipeline.compress.architecture import anatomy
    from pipeline.compress.surgery import cut

    model, tokenizer = folder.load(tiny_lm)
    cut(model, anatomy(model).units("neuron"), {"0.neuron": np.arange(10)})
    folder.save(model, tokenizer, tmp_path / "cut", {})
    assert (tmp_path / "cut" / folder.SHAPES).exists()
    found = column_of(Scorer(tmp_path / "cut", 64), sentences(5, seed=1))
    for ids, logp in zip(found["ids"].to_pylist(), found["logp"].to_pylist(), strict=True):
        row = torch.tensor([ids])
        with torch.no_grad():
            wanted = model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        np.testing.assert_allclose(logp, wanted.numpy(), atol=1e-4)
