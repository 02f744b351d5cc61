"""Vocabulary: every text stays writable, most as before; the model follows its tokenizer; the drafter's head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from pipeline.compare.measures.language import bits_per_byte  # noqa: E402
from pipeline.compress.calibration import Calibration  # noqa: E402
from pipeline.compress.steps._draft import drafter_head, expected_accepted, most_frequent, speed_up  # noqa: E402
from pipeline.compress.steps._tokenizer import closed, rewritten, trimmed, trimmed_fast  # noqa: E402
from pipeline.compress.steps.vocab import Vocab, covering, rewrite  # noqa: E402
from pipeline.errors import ConfigError  # noqa: E402
from pipeline.models.training import END, Shape, lm_loss, new_lm, pack, save_lm, train_lm, train_tokenizer  # noqa: E402
from tests.tiny_lm import BIRDS, TREES, sentences  # noqa: E402

TEXTS = sentences(200) + sentences(200, 1, BIRDS)
TREE_TEXTS = sentences(100, 2, TREES)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 420)


@pytest.fixture(scope="module")
def trees(tokenizer: Any) -> np.ndarray:
    """What texts on trees alone are written with."""
    used = {i for e in tokenizer.encode_batch(TREE_TEXTS) for i in e.ids}
    return closed(tokenizer, used)


def test_covering_takes_the_fewest() -> None:
    counts = np.array([10, 1, 7, 0, 3])
    assert covering(counts, 10 / 21).tolist() == [0]
    assert covering(counts, 0.5).tolist() == [0, 2]
    assert covering(counts, 20 / 21).tolist() == [0, 2, 4]
    assert covering(counts, 1.0).tolist() == [0, 1, 2, 4]
    assert covering(np.array([2, 5, 5, 5]), 0.5).tolist() == [1, 2]  # of equal ones the lower ids


def test_vocabtrim_of_the_spec() -> None:
    counts = np.array([10, 1, 7, 0, 3])
    keep = most_frequent(counts, 3)
    assert keep.tolist() == [0, 2, 4]
    assert counts[keep].sum() / counts.sum() == pytest.approx(0.952381, abs=1e-6)
    assert most_frequent(counts, 3, always=np.array([3])).tolist() == [0, 2, 3]
    assert most_frequent(counts, 1, always=np.array([1, 3])).tolist() == [1, 3]
    assert speed_up(3, 0.05, 4) == pytest.approx(2.5)
    assert speed_up(3, 0.02, 4) == pytest.approx(2.7778, abs=5e-5)
    assert expected_accepted(0.7, 4) == pytest.approx(2.7731, abs=5e-5)


def test_a_drafter_head_gives_the_kept_logits_and_greedy_maps_back() -> None:
    head = torch.nn.Linear(8, 50)
    keep = most_frequent(np.random.default_rng(0).integers(0, 99, 50), 20)
    small, x = drafter_head(head, keep), torch.randn(30, 8)
    torch.testing.assert_close(small(x), head(x)[:, keep])
    proposed = keep[small(x).argmax(-1).numpy()]
    best = head(x).argmax(-1).numpy()
    assert (proposed[np.isin(best, keep)] == best[np.isin(best, keep)]).all()
    assert head.weight.shape == (50, 8)


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60))
def test_any_text_is_written_and_read_back(tokenizer: Any, trees: np.ndarray, text: str) -> None:
    small = trimmed(tokenizer, trees)
    small.encode_special_tokens = True
    assert small.decode(small.encode(text, add_special_tokens=False).ids) == text


def test_held_out_texts_are_cut_as_before_where_all_their_tokens_stay(tokenizer: Any, trees: np.ndarray) -> None:
    small = trimmed(tokenizer, trees)
    assert 257 < len(trees) < tokenizer.get_vocab_size()
    assert small.get_vocab_size() == len(trees)
    same = 0
    for text in sentences(50, 3) + sentences(50, 4, BIRDS):
        before, after = tokenizer.encode(text).ids, small.encode(text).ids
        assert small.decode(after) == text
        if set(before) <= set(trees.tolist()):
            same += 1
            assert trees[after].tolist() == before
        else:
            assert len(after) > len(before)
    assert 50 <= same < 100


def test_special_tokens_and_templates_follow(tokenizer: Any, trees: np.ndarray) -> None:
    from tokenizers import Tokenizer, processors

    own = Tokenizer.from_str(tokenizer.to_str())
    own.add_special_tokens(["<a>", "<b>"])
    own.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<a> $A <b>", special_tokens=[(n, own.token_to_id(n)) for n in ("<a>", "<b>")]
            ),
        ]
    )
    keep = closed(own, trees)
    small = trimmed(own, keep)
    assert small.encode("oak pine").tokens == own.encode("oak pine").tokens
    assert small.encode("oak <b> pine").tokens == own.encode("oak <b> pine").tokens
    assert small.token_to_id(END) == 0
    roberta = Tokenizer.from_str(tokenizer.to_str())
    roberta.add_special_tokens(["<s>", "</s>"])
    pair = [(n, roberta.token_to_id(n)) for n in ("</s>", "<s>")]
    roberta.post_processor = processors.RobertaProcessing(*pair)
    assert trimmed(roberta, closed(roberta, trees)).encode("oak").tokens == roberta.encode("oak").tokens


def test_what_is_not_byte_level_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models

    for model in (models.WordLevel({"a": 0}, unk_token="a"), models.BPE({"a": 0}, [])):
        other = Tokenizer(model)
        other.decoder = decoders.ByteLevel()
        with pytest.raises(ConfigError, match="byte-level BPE with single bytes"):
            closed(other, [0])


def test_rewriting_keeps_the_text_and_the_padding(tokenizer: Any, trees: np.ndarray) -> None:
    small = trimmed(tokenizer, trees)
    pieces = rewritten(tokenizer, small, trees)
    text = " ".join(BIRDS)
    old = tokenizer.encode(text).ids
    assert small.decode(np.concatenate([pieces[i] for i in old]).tolist()) == text
    ids = torch.tensor([[0, 0, *old[:6]], old[:8]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    batch = rewrite({"input_ids": ids, "attention_mask": mask}, pieces)
    assert batch["attention_mask"] is mask
    assert batch["input_ids"][0, :2].tolist() == [0, 0]
    for row, first in ((batch["input_ids"][0, 2:], 6), (batch["input_ids"][1], 8)):
        whole = np.concatenate([pieces[i] for i in old[:first]])
        assert row.tolist() == whole[:first].tolist()


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = new_lm(
        Shape(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocab=tokenizer.get_vocab_size(), context=64), 0
    )
    blocks = pack([e.ids for e in tokenizer.encode_batch(TEXTS)], 64, 0)
    train_lm(model, blocks, 40, 8, 5e-3, 0)
    path = tmp_path_factory.mktemp("model")
    save_lm(model, tokenizer, path)
    return path


def load(folder: Path) -> tuple[Any, Any, Any]:
    from pipeline.models.causal import load_causal

    model, fast = load_causal(folder)
    blocks = pack([e.ids for e in fast.backend_tokenizer.encode_batch(TREE_TEXTS)], 64, 0)
    return model, fast, Calibration.of_blocks(model, blocks)


def test_a_trimmed_model_says_the_same_of_its_own_domain(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, fast, calibration = load(folder)
    held_out = sentences(30, 5)
    before = bits_per_byte(model, fast, held_out, "trees")[0].values
    rows = calibration.rows
    outcome = Vocab(coverage=0.999).apply(model, calibration)
    keep = outcome.vocabulary
    assert keep is not None
    small = trimmed_fast(fast, keep)
    report = outcome.report
    assert report["tokens"] == f"{len(keep)} of {len(fast)}"
    assert report["coverage"] > 0.999
    assert report["removed_parameters"] == 32 * (len(fast) - len(keep))  # tied: one matrix
    assert 1 <= report["tokens_per_byte_after"] / report["tokens_per_byte"] < 1.01
    assert calibration.rows == rows
    assert lm_loss(model, calibration.batches[0]["input_ids"].numpy()) < 4  # the steps after read new ids

    model.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    loaded, again = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token == END
    after = bits_per_byte(loaded, again, held_out, "trees")[0].values
    assert (after < before).all()  # the same tokens out of fewer
    assert np.mean(after) > 0.8 * np.mean(before)
    birds = sentences(30, 5, BIRDS)
    assert np.mean(bits_per_byte(loaded, again, birds, "birds")[0].values) > np.mean(before)
    prompt = again("oak pine", return_tensors="pt")
    text = again.decode(loaded.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("oak pine")


def test_counts_come_from_a_corpus_where_one_is_named(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": sentences(40, 6, BIRDS)}), tmp_path / "birds.parquet")
    model, fast, calibration = load(folder)  # calibrated on trees
    step = Vocab(coverage=0.99, corpus=str(tmp_path / "birds.parquet"), text="body", texts=30)
    keep = step.apply(model, calibration).vocabulary
    small = trimmed_fast(fast, keep)
    birds, trees = " ".join(BIRDS[:6]), " ".join(TREES[:6])
    assert len(small.tokenize(birds)) == len(fast.tokenize(birds))
    assert len(small.tokenize(trees)) > len(fast.tokenize(trees))


def test_all_tokens_kept_change_nothing(folder: Path) -> None:
    model, fast, _ = load(folder)
    blocks = np.arange(len(fast), dtype=np.int64).reshape(1, -1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    outcome = Vocab(coverage=1.0).apply(model, Calibration.of_blocks(model, blocks))
    assert outcome.report["removed_parameters"] == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert json.loads(trimmed(fast.backend_tokenizer, outcome.vocabulary).to_str())["model"]["merges"]


def test_errors(folder: Path, tiny_models: Any) -> None:
    model, _, calibration = load(folder)
    with pytest.raises(ConfigError, match="no tokenizer in '/nowhere': set tokenizer to its folder"):
        Vocab(tokenizer="/nowhere").apply(model, calibration)
    small = tiny_models["llama"]
    with pytest.raises(ConfigError, match="it is not the model's tokenizer"):
        Vocab(tokenizer=str(folder)).apply(small.model, Calibration(small.model, [small.batch]))
    with pytest.raises(ConfigError, match="there is no token to count: name a corpus"):
        Vocab().apply(model, Calibration(model, []))
    with pytest.raises(ConfigError, match="has no vocabulary"):
        Vocab().apply(tiny_models["vit"].model, Calibration(tiny_models["vit"].model, []))
