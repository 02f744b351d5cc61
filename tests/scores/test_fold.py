"""Folding a classifier: the same decisions from a small fraction of the numbers, or nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pyarrow.dataset as ds
import pytest

from pipeline.scores._fold import fold

SAMPLE = Path(__file__).parents[2] / "examples" / "sample"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Lines as fastText reads them, and the label of a line in its source: the language is learnt in no time."""
    table = ds.dataset(SAMPLE).to_table(columns=["text", "lang"])
    return [
        f"__label__{lang} {' '.join(text.split())}\n"
        for text, lang in zip(table["text"].to_pylist(), table["lang"].to_pylist(), strict=True)
        if lang in ("en", "de", "es")
    ]


def trained(directory: Path, texts: list[str], **options: Any) -> Path:
    (directory / "lines.txt").write_text("".join(texts))
    given = {"dim": 20, "wordNgrams": 2, "bucket": 5000, "epoch": 10, "lr": 0.5, "thread": 1, "verbose": 0} | options
    fasttext.train_supervised(str(directory / "lines.txt"), **given).save_model(str(directory / "model.bin"))
    return directory / "model.bin"


def probabilities(model: Path, texts: list[str]) -> np.ndarray:
    """Of every label in the order of their names; float32 (texts, labels)."""
    classifier = fasttext.load_model(str(model))
    found, given = classifier.f.multilinePredict([t.partition(" ")[2] for t in texts], -1, 0.0, "strict")
    return np.array([[p for _, p in sorted(zip(*pair, strict=True))] for pair in zip(found, given, strict=True)])


@pytest.mark.parametrize("loss", ["softmax", "ova"])
def test_a_folded_model_gives_the_same_probabilities_from_a_number_a_label(
    tmp_path: Path, texts: list[str], loss: str
) -> None:
    model = trained(tmp_path, texts, loss=loss)
    assert fold(model, tmp_path / "folded.bin")
    whole, folded = probabilities(model, texts), probabilities(tmp_path / "folded.bin", texts)
    np.testing.assert_allclose(folded, whole, atol=1e-5)
    assert (folded.argmax(axis=1) == whole.argmax(axis=1)).all()
    assert len(set(whole.argmax(axis=1).tolist())) == whole.shape[1] == 3
    matrix = fasttext.load_model(str(tmp_path / "folded.bin")).get_input_matrix()
    assert matrix.shape[1] == 3
    saved = model.stat().st_size - (tmp_path / "folded.bin").stat().st_size
    assert saved == 4 * (20 - 3) * matrix.shape[0] + 4 * 3 * (20 - 3)


def test_a_row_is_the_product_of_the_matrices(tmp_path: Path, texts: list[str]) -> None:
    model = trained(tmp_path, texts)
    fold(model, tmp_path / "folded.bin")
    whole, folded = fasttext.load_model(str(model)), fasttext.load_model(str(tmp_path / "folded.bin"))
    expected = whole.get_input_matrix().astype(np.float64) @ whole.get_output_matrix().T.astype(np.float64)
    assert (folded.get_input_matrix() == expected.astype(np.float32)).all()
    assert (folded.get_output_matrix() == np.eye(3)).all()
    assert folded.words == whole.words
    assert folded.labels == whole.labels


@pytest.mark.parametrize("options", [{"dim": 3}, {"loss": "hs"}])
def test_what_cannot_be_folded_is_left_alone(tmp_path: Path, texts: list[str], options: dict[str, Any]) -> None:
    assert not fold(trained(tmp_path, texts, **options), tmp_path / "folded.bin")
    assert not (tmp_path / "folded.bin").exists()


def test_neither_a_quantized_model_nor_word_vectors_nor_a_broken_file_is_folded(
    tmp_path: Path, texts: list[str]
) -> None:
    model = trained(tmp_path, texts)
    content = model.read_bytes()
    classifier = fasttext.load_model(str(model))
    classifier.quantize(str(tmp_path / "lines.txt"), retrain=False, cutoff=0)
    classifier.save_model(str(tmp_path / "quantized.bin"))
    (tmp_path / "few.txt").write_text("".join(texts[:20]))
    vectors = fasttext.train_unsupervised(str(tmp_path / "few.txt"), dim=20, bucket=1000, epoch=1, thread=1, verbose=0)
    vectors.save_model(str(tmp_path / "vectors.bin"))
    broken = {"empty": b"", "short": content[:80], "truncated": content[:-100], "other": b"x" * len(content)}
    for name, data in broken.items():
        (tmp_path / f"{name}.bin").write_bytes(data)
    for name in ("quantized", "vectors", *broken):
        assert not fold(tmp_path / f"{name}.bin", tmp_path / "folded.bin"), name
        assert not (tmp_path / "folded.bin").exists()
