"""The learner of images, and the comparison that teaches: with a teacher every arm is trained a second time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.compare.learners import images as learner_module
from pipeline.compare.learners.base import Teacher
from pipeline.compare.learners.images import Images, KeptImages, loss_of, network, scaled, teacher_weight
from pipeline.compare.proxy import Compared, compare_proxy, settings
from pipeline.config import parse
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError, TamisError
from pipeline.recipe import QUARANTINE

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

ROWS = 160


def picture(bright: bool, rng: np.random.Generator) -> bytes:
    """A 12 x 12 PNG, dark or bright in its upper half."""
    pixels = rng.integers(0, 60, (12, 12)).astype(np.uint8)
    pixels[:6] += np.uint8(150 * bright)
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG")
    return into.getvalue()


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Any]:
    """Images of two classes, with vectors that tell them apart."""
    rng = np.random.default_rng(0)
    bright = rng.random(ROWS) < 0.5
    vectors = np.stack([bright, rng.random(ROWS)], axis=1).astype(np.float32) + 0.1
    table = pa.table(
        {
            "image": pa.array([picture(b, rng) for b in bright], pa.binary()),
            "label": np.where(bright, "bright", "dark"),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2),
        }
    )
    pq.write_table(table, tmp_path / "corpus.parquet", row_group_size=60)
    return {
        "corpus": {"path": str(tmp_path / "corpus.parquet"), "text": None, "image": "image"},
        "embed": {"kind": "precomputed", "column": "vector"},
        "scores": [{"kind": "el2n", "label": "label", "keep": "easy", "models": 2}],
        "select": {"budget": {"fraction": 0.5}},
        "engine": {"address": "inline"},
        "run": str(tmp_path / "run"),
    }


def compared(corpus: dict[str, Any], **changes: Any) -> Compared:
    small = {"at": (0.4,), "seeds": 2, "steps": 30, "batch": 16, "size": 8, "width": 4, "held_out": 0.2}
    learner = Images.model_validate(small | {"eval_images": 64} | changes)
    return compare_proxy(parse(corpus), learner, InlinePool, quiet=True)


def test_every_arm_is_taught_too_and_compared_with_a_taught_chance(corpus: dict[str, Any], tmp_path: Path) -> None:
    done = compared(corpus, teacher=True)
    lines = {line.arm: line for line in done.lines}
    assert list(lines) == ["random", "el2n", "random, taught", "el2n, taught"]
    assert lines["random, taught"].verdict == "baseline"
    for taught in ("", ", taught"):
        own, chance = lines[f"el2n{taught}"], lines[f"random{taught}"]
        assert own.mix_difference.mean == pytest.approx(own.mix.mean - chance.mix.mean)
    assert all(0 <= line.mix.mean <= 1 for line in done.lines)
    assert [line.epochs for line in done.lines] == pytest.approx([30 * 16 / line.rows for line in done.lines])
    told = Path(done.markdown).read_text()
    assert "| criterion | budget | mix error | to random | cost | verdict |" in told  # there is no target to speak of
    trained = [(t["arm"], t["steps"]) for t in json.loads(Path(done.json).read_text())["trainings"]]
    assert trained.count(("teacher", 60)) == 1
    assert len(trained) == 2 * 6 + 1  # an arm, chance and chance trained longer, twice each; taught and not; a teacher

    files = sorted((tmp_path / "run" / "artifacts").glob("proxy-*/result.json"))
    before = [f.stat().st_mtime_ns for f in files]
    assert compared(corpus, teacher=True) == done
    plain = compared(corpus)  # of all that was trained, what no teacher had to do with
    assert [line.mix for line in plain.lines] == [line.mix for line in done.lines[:2]]
    assert [f.stat().st_mtime_ns for f in files] == before


def test_a_teacher_answers_as_it_was_trained_and_counts_by_the_share_that_was_kept(
    corpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, asked = list[float](), list[bool]()

    def weight(share: float) -> float:
        shares.append(share)
        return 0.5

    def loss(logits: Any, y: Any, taught: Any, images: Any) -> Any:
        if taught is not None:
            asked.append(taught[0].training)
        return loss_of(logits, y, taught, images)

    monkeypatch.setattr(learner_module, "teacher_weight", weight)
    monkeypatch.setattr(learner_module, "loss_of", loss)
    compared(corpus, teacher=True, steps=2)
    assert shares == [0.4] * 6
    assert asked
    assert not any(asked)


def test_a_class_that_nothing_is_measured_on_is_left_out_of_training(tmp_path: Path) -> None:
    learner = Images(size=8, width=4, steps=2, batch=4)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 192)).astype(np.uint8)
    held = {"mix": {"pixels": pixels[:4], "class": np.array([7, 3, 7, 3], np.uint64)}}
    rare = np.array([3, 9, 7, 1, 3, 7, 5, 7], np.uint64)
    known = np.isin(rare, [3, 7])
    (alone := tmp_path / "alone").mkdir()
    learner.train({"pixels": pixels[4:], "class": rare}, held, 2, 0, tmp_path, None)
    learner.train({"pixels": pixels[4:][known], "class": rare[known]}, held, 2, 0, alone, None)
    assert (tmp_path / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    with pytest.raises(TamisError, match="raise the budget"):
        learner.train({"pixels": pixels[4:5], "class": np.array([1], np.uint64)}, held, 2, 0, tmp_path, None)


def test_right_labels_teach_and_wrong_ones_do_not_unless_a_teacher_answers(tmp_path: Path) -> None:
    learner = Images(size=8, width=4, steps=60, batch=16)
    rng = np.random.default_rng(0)
    bright = rng.random(160) < 0.5
    pixels = rng.integers(0, 90, (160, 8, 8, 3)).astype(np.uint8)
    pixels[bright, :4] += 150
    images, right = pixels.reshape(160, -1), bright.astype(np.uint64)
    held = {"mix": {"pixels": images[80:], "class": right[80:]}}
    swapped = {"pixels": images[:80], "class": 1 - right[:80]}
    known = learner.train({"pixels": images[:80], "class": right[:80]}, held, 60, 0, tmp_path, None)
    (student := tmp_path / "student").mkdir()
    misled = learner.train(swapped, held, 60, 1, student, None)
    taught = learner.train(swapped, held, 60, 1, student, Teacher(tmp_path, 0.1))
    assert known["mix"] < 0.1
    assert taught["mix"] < 0.1 < 0.9 < misled["mix"]


def test_the_teachers_weight_grows_as_less_is_kept_and_none_of_it_is_plain_training() -> None:
    assert [teacher_weight(f) for f in (0.1, 0.5, 1.0)] == pytest.approx([0.95, 0.75, 0.5])
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    y, image = torch.tensor([0]), torch.zeros(1)

    def teacher(_: object) -> torch.Tensor:
        return torch.log(torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64))

    # The specification's toy: CE .407606, KL .005787, at a half .206697, and its gradient.
    mixed = loss_of(logits, y, (teacher, 0.5), image)
    assert mixed.item() == pytest.approx(0.206697, abs=1e-6)
    mixed.backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.184759, 0.144728, 0.040031], abs=1e-6)
    assert loss_of(logits, y, None, image).item() == pytest.approx(0.407606, abs=1e-6)
    assert loss_of(logits, y, (teacher, 1.0), image).item() == pytest.approx(0.005787, abs=1e-6)
    assert loss_of(logits, y, (teacher, 0.0), image).item() == loss_of(logits, y, None, image).item()


def test_kept_images_are_those_with_the_smallest_hashes_whatever_the_batches() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (200, 12)).astype(np.uint8)
    batch = pa.record_batch(
        [
            pa.array(rng.random(200) < 0.7),
            pa.array([rng.bytes(16) for _ in range(200)], pa.binary(16)),
            pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel()), 12),
            pa.array(rng.integers(0, 3, 200).astype(np.uint64)),
        ],
        names=["select.keep", "row.key", "proxy-pixels.pixels", "proxy-pixels.class"],
    )
    kept = KeptImages("select.keep", 1, 50, seed=3)
    whole = kept.update({}, batch)
    parts = kept.merge([kept.update({}, batch.slice(i, 33)) for i in range(0, 200, 33)])
    for name in ("hash", "pixels", "class", "rows"):
        np.testing.assert_array_equal(whole[name], parts[name])
    assert whole["pixels"].shape == (50, 12)
    assert whole["rows"][0] == batch.column(0).true_count


def test_what_cannot_be_decoded_is_refused_and_the_others_keep_their_place() -> None:
    rng = np.random.default_rng(0)
    images = pa.array([picture(True, rng), b"broken", picture(False, rng)], pa.binary())
    batch = pa.record_batch([images, pa.array([4, 5, 4])], names=["image", "corpus.label"])
    fields = pa.schema([("pixels", pa.list_(pa.uint8(), 192)), ("class", pa.uint64()), (QUARANTINE, pa.string())])
    pixels, classes, why = learner_module._open("corpus.label", fields, 8)(batch).columns
    assert why.to_pylist() == [None, "not an image of a known format", None]
    assert pixels.is_valid().to_pylist() == classes.is_valid().to_pylist() == [True, False, True]
    assert np.mean(pixels[0].as_py()[:96]) > np.mean(pixels[2].as_py()[:96]) + 100
    assert classes[0] == classes[2]


def test_pixels_reach_the_network_between_minus_one_and_one_with_the_colours_in_front() -> None:
    pixels = np.zeros((1, 2, 2, 3), np.uint8)
    pixels[0, 0, 1] = (255, 0, 51)
    images = scaled(pixels, torch.device("cpu"))
    assert images.shape == (1, 3, 2, 2)
    assert images[0, :, 0, 1].tolist() == pytest.approx([1, -1, -0.6])
    assert images[0, :, 1, 1].tolist() == [-1, -1, -1]


def test_a_network_is_determined_by_its_seed() -> None:
    one, same, other = (network(4, 3, seed).state_dict()["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_mistakes_are_told_before_anything_is_trained(corpus: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="another `name`"):
        compared(corpus | {"scores": [{"kind": "random", "name": "x"}, corpus["scores"][0] | {"name": "random-x2"}]})
    with pytest.raises(ConfigError, match="less than or equal to 1"):
        settings(parse(corpus), [], at=[1.5])
    with pytest.raises(ConfigError, match="no column 'class'"):
        compared(corpus, label="class")
    with pytest.raises(ConfigError, match="--target: belongs to corpora of texts"):
        settings(parse(corpus), [], target=["a.txt"], at=None, seeds=None)
    found = settings(parse(corpus), ["width=8"], target=None, at=[0.1], seeds=4)
    assert isinstance(found, Images)
    assert (found.width, found.at, found.seeds) == (8, (0.1,), 4)
