"""Heads: what they learn, what they are, and the folder that they lie in with their encoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from vision_toys import CAPTIONS, pairs, write_text, write_vision

from pipeline.models import dual_encoder as dual
from pipeline.models.dual_encoder import Heads, HeadTraining, train_heads
from pipeline.models.image_text import encode_images, open_folder
from pipeline.scores import dfn

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("PIL")


def planted(rows: int, seed: int, topics: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Features (rows, 40) and (rows, 30) of pairs that share a latent of `topics` numbers, each seen through noise."""
    maps, rng = np.random.default_rng(99), np.random.default_rng(seed)
    latent = rng.normal(size=(rows, topics))
    sides = [latent @ maps.normal(size=(topics, d)) for d in (40, 30)]
    image, text = (side + 2 * rng.normal(size=side.shape) for side in sides)
    return (3 * image + 7).astype(np.float32), (0.1 * text - 2).astype(np.float32)


def cosines(heads: Heads, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    x, y = heads.images(images), heads.texts(texts)
    return np.asarray((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))


FAST = HeadTraining(dims=16, epochs=8, batch=128, image_dropout=0, text_dropout=0, lr=3e-3)


def test_heads_tell_matched_from_shuffled_pairs_that_they_never_saw() -> None:
    heads = train_heads(*planted(1000, 0), FAST)
    images, texts = planted(500, 1)
    matched, shuffled = cosines(heads, images, texts), cosines(heads, images, texts[::-1])
    assert matched.mean() > shuffled.mean() + 0.3  # permuting captions lowers the mean score
    assert (matched > shuffled).mean() > 0.9
    assert 1 < heads.logit_scale <= dual.LARGEST_SCALE


def test_training_is_a_function_of_pairs_and_seed() -> None:
    images, texts = planted(300, 0)
    first, again, other = (train_heads(images, texts, FAST, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.image_weight, again.image_weight)
    assert not np.array_equal(first.image_weight, other.image_weight)


def test_the_scale_of_features_does_not_matter() -> None:
    """Standardisation is folded in: the heads of scaled features give the same vectors."""
    images, texts = planted(300, 0)
    plain = train_heads(images, texts, FAST)
    scaled = train_heads(100 * images - 5, texts / 50 + 1, FAST)
    np.testing.assert_allclose(
        cosines(plain, images, texts), cosines(scaled, 100 * images - 5, texts / 50 + 1), atol=2e-3
    )


def test_rows_with_one_caption_are_no_negatives_of_each_other() -> None:
    """Captions a, a, b with cosines 1 of equals and 0 of others, times 2: -ln(e^2 / (e^2 + 1)) for the first two, which
    have one negative each, -ln(e^2 / (e^2 + 2)) for the last."""
    import torch

    same = torch.tensor([0, 0, 1])
    twins = same[:, None] == same
    loss = dual.contrastive_loss(2.0 * twins, twins)
    assert float(loss) == pytest.approx((2 * np.log1p(np.exp(-2)) + np.log1p(2 * np.exp(-2))) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("share", "precision", "recall"), [(0, 0.943, 0.663), (0.1, 0.940, 0.595), (0.3, 0.917, 0.373), (0.9, 0.56, 0.008)]
)
def test_what_a_filter_learned_from_decides_what_it_keeps(share: float, precision: float, recall: float) -> None:
    """Of a pool with 30 % matched pairs the best 30 % are kept; a share of what the heads learned from was shuffled."""
    images, texts = planted(1500, 0)
    wrong = np.flatnonzero(np.random.default_rng(0).random(1500) < share)
    texts[wrong] = texts[np.roll(wrong, 1)]
    heads = train_heads(images, texts, FAST)
    images, texts = planted(1000, 5)
    found = dfn.measure(heads.images(images), heads.texts(texts), 0)["recall"]["image@1"]
    assert found == pytest.approx(recall, abs=0.03)
    texts[300:] = np.roll(texts[300:], 1, axis=0)
    best = np.argsort(-cosines(heads, images, texts))[:300]
    assert (best < 300).mean() == pytest.approx(precision, abs=0.03)


@pytest.mark.parametrize(
    ("images", "texts", "says"),
    [
        (np.ones((5, 3)), np.arange(15.0).reshape(5, 3), "must differ"),
        (np.arange(6.0).reshape(2, 3), np.ones((2, 3)), "must differ"),
        (np.ones((5, 3)), np.ones((4, 3)), "are no pairs"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(images: np.ndarray, texts: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train_heads(images, texts, FAST)


def test_heads_are_read_as_they_were_saved_or_not_at_all(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    heads = train_heads(*planted(100, 0), FAST)
    heads.save(tmp_path / dual.HEADS)
    again = Heads.load(tmp_path / dual.HEADS)
    np.testing.assert_array_equal(again.text_bias, heads.text_bias)
    assert again.logit_scale == pytest.approx(heads.logit_scale)
    assert dual.dims_of(tmp_path) == 16
    values = {name: np.zeros((2, 2), np.float32) for name in dual.TENSORS[:-1]}
    save_file(values, tmp_path / "no_scale")
    save_file(values | {"logit_scale": np.float32([1])}, tmp_path / "odd_shapes")
    with pytest.raises(ValueError, match="has no logit_scale"):
        Heads.load(tmp_path / "no_scale")
    with pytest.raises(ValueError, match="do not fit together"):
        Heads.load(tmp_path / "odd_shapes")


def test_a_folder_brings_its_encoders_and_gives_what_they_and_the_heads_give(tmp_path: Path) -> None:
    image, text = write_vision(tmp_path / "vit"), write_text(tmp_path / "bert")
    (image / "code.py").write_text("raise SystemExit")
    heads = train_heads(*(np.random.default_rng(i).normal(size=(50, 16)) for i in (1, 2)), FAST)
    dual.write_dual_encoder(image, text, heads, dual.describe(image, text, 32), tmp_path / "dual")
    assert not list((tmp_path / "dual").rglob("*.py"))
    assert json.loads((tmp_path / "dual" / dual.CONFIG).read_text())["image"] == {"pooling": "cls"}

    model = open_folder(tmp_path / "dual")
    assert isinstance(model, dual.DualEncoder)
    data = pairs(3)["image"].combine_chunks()
    x, reasons = encode_images(model, data, 2)
    assert x.shape == (3, 16)
    assert reasons.tolist() == [""] * 3
    features, _ = encode_images(model._image, data, 3)
    np.testing.assert_allclose(x, features @ heads.image_weight.T + heads.image_bias, atol=1e-4)
    assert model.texts(CAPTIONS[:2]).shape == (2, 16)
    (tmp_path / "dual" / dual.CONFIG).write_text('{"format": 2}')
    with pytest.raises(ValueError, match="not of format 1"):
        open_folder(tmp_path / "dual")
