"""Decoding what the web holds, and preparing it as the models' own libraries do."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import images
from pipeline.models.image_text import encode_images
from pipeline.models.images import Preprocess, decode, quiet, stream
from tests.waiting import wait_for

Image = pytest.importorskip("PIL.Image")
torch = pytest.importorskip("torch")

RED, BLUE = (255, 0, 0), (0, 0, 255)
CLIP = Preprocess(32, 32, "shortest", 32)


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Any:
    """Smooth colours with some noise, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8))


def rgb(data: bytes) -> np.ndarray:
    found = decode(data)
    assert not isinstance(found, str), found
    assert found.mode == "RGB"
    return np.asarray(found)


def test_transparency_lies_on_white() -> None:
    half = Image.new("RGBA", (4, 2), (*RED, 0))
    half.putpixel((0, 0), (*RED, 255))
    half.putpixel((1, 0), (*RED, 128))
    pixels = rgb(encoded(half))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 1].tolist() == [255, 127, 127]
    assert pixels[1, 3].tolist() == [255, 255, 255]
    palette = half.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert rgb(encoded(palette, transparency=palette.getpixel((0, 0))))[0, 0].tolist() == [255, 255, 255]
    assert rgb(encoded(Image.new("LA", (2, 2), (0, 0))))[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.array([[0, 0x0100], [0x8000, 0xFFFF]], np.uint16)
    assert rgb(encoded(Image.fromarray(grey)))[..., 0].tolist() == [[0, 1], [128, 255]]
    pgm = b"P5 2 2 65535\n" + grey.astype(">u2").tobytes()
    assert rgb(pgm)[..., 0].tolist() == [[0, 1], [128, 255]]
    assert "floats" in str(decode(encoded(Image.new("F", (2, 2), 0.5), "TIFF")))


def test_cmyk_and_grey_become_rgb() -> None:
    assert np.abs(rgb(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).astype(int) - RED).max() < 8
    assert rgb(encoded(Image.new("L", (3, 2), 9))).tolist() == [[[9, 9, 9]] * 3] * 2


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert rgb(data)[0, 0].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    from PIL import ImageOps

    corners = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    data = encoded(corners, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(rgb(data)[..., 0], np.asarray(expected))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_what_cannot_be_decoded_has_a_reason_that_is_the_same_every_time() -> None:
    whole = encoded(picture(), "JPEG")
    cases = {
        b"": "not an image of a known format",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>": "not an image of a known format",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n": "not an image of a known format",
        header(20_000, 20_000): "image of more than 178,956,970 pixels",
        encoded(Image.new("RGB", (1, 1))): "image of one pixel",
        whole[: len(whole) // 2]: "undecodable image: OSError: Truncated File Read",
    }
    with quiet():
        for data, reason in cases.items():
            assert decode(data) == decode(data) == reason
        assert str(decode(header(9_000, 9_000))).startswith("undecodable image: OSError")
        assert CLIP(encoded(Image.new("RGB", (50, 40), RED))) == "blank image: one colour all over"


def test_the_limit_is_checked_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert decode(encoded(picture(40, 30))) == "image of 1,200 pixels, more than 1,000"


@settings(max_examples=60)
@given(st.binary(max_size=40), st.integers(0, 200), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
def test_damage_gives_a_picture_or_a_reason(noise: bytes, at: int, kind: str) -> None:
    data = bytearray(encoded(picture(), kind))
    data[at : at + len(noise)] = noise
    with quiet():
        found = CLIP(bytes(data))
    assert isinstance(found, str) or found.shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_image_is_reduced_on_the_way_and_hardly_differs(kind: str) -> None:
    large = picture(800, 600)
    data = encoded(large, kind)
    ours = CLIP(data)
    plain = Image.open(io.BytesIO(data)).resize((42, 32), Image.Resampling.BICUBIC).crop((5, 0, 37, 32))
    assert isinstance(ours, np.ndarray)
    assert np.abs(ours.astype(int) - np.asarray(plain)).mean() < 1.0


SIZES = [(60, 40), (40, 60), (33, 33), (31, 90), (64, 33), (32, 32), (20, 45)]


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", SIZES)
def test_open_clips_own_transform_gives_the_same(mode: str, size: tuple[int, int]) -> None:
    transform = pytest.importorskip("open_clip.transform")
    config = {"size": 32, "resize_mode": mode, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "fill_color": 7}
    ours = Preprocess.of_open_clip(config)
    theirs = transform.image_transform_v2(transform.PreprocessCfg(**config), is_train=False)
    pixels = ours(encoded(picture(*size)))
    assert isinstance(pixels, np.ndarray)
    found = ours.normalise(pixels[None].copy(), torch.device("cpu"), torch.float32)[0]
    difference = (found - theirs(picture(*size))).abs()
    step = 1 / 255 / 0.2  # of a pixel: Pillow rounds between its two passes, whose order depends on what is cut out
    assert difference.max() <= step + 1e-5
    assert difference.mean() < step / 4


PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
    "BitImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    "MobileNetV2ImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processors_of_transformers_give_the_same(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, name)(**PROCESSORS[name])
    processor.save_pretrained(tmp_path)
    ours = Preprocess.of_folder(tmp_path)
    for size in SIZES[:5]:
        pixels = ours(encoded(picture(*size)))
        assert isinstance(pixels, np.ndarray)
        found = ours.normalise(pixels[None].copy(), torch.device("cpu"), torch.float32)[0]
        theirs = processor(picture(*size), return_tensors="pt")["pixel_values"][0]
        assert found.shape == theirs.shape
        assert (found - theirs).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"do_pad": True}, "not supported"),
        ({"do_center_crop": False, "size": {"shortest_edge": 9}}, "would differ in size"),
        ({"do_center_crop": True, "size": {"shortest_edge": 9}, "crop_size": 12}, "cannot be cut out of 9"),
        ({"size": {"longest_edge": 9}}, "neither a shortest_edge nor"),
    ],
)
def test_preprocessing_that_is_not_covered_is_said_to_be(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Preprocess._of_processor(config, "here")


def test_a_stream_keeps_order_and_names_the_refused() -> None:
    good = [encoded(picture(seed=i)) for i in range(10)]
    data = pa.array([*good[:3], b"broken", *good[3:], b""], pa.large_binary())
    for workers, group in ((1, 4), (3, 4), (2, 100), (2, 1)):
        parts = list(stream(data, CLIP, group, workers))
        assert np.concatenate([p.rows for p in parts]).tolist() == [0, 1, 2, *range(4, 11)]
        assert {k: v for p in parts for k, v in p.refused.items()} == {
            3: "not an image of a known format",
            11: "not an image of a known format",
        }
        expected = np.stack([np.asarray(CLIP(d)) for d in good])
        np.testing.assert_array_equal(np.concatenate([p.pixels for p in parts]), expected)


def test_a_stream_reads_ahead_but_not_far(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 0
    lock, decoding = threading.Lock(), Preprocess.__call__

    def counted(self: Preprocess, data: bytes) -> Any:
        nonlocal begun
        with lock:
            begun += 1
        return decoding(self, data)

    monkeypatch.setattr(Preprocess, "__call__", counted)
    parts = stream(pa.array([encoded(picture())] * 40), CLIP, 4, 2)
    next(parts)
    wait_for(lambda: begun >= 4 * (1 + images.AHEAD + 1))
    time.sleep(0.1)
    assert begun == 4 * (1 + images.AHEAD + 1)
    parts.close()  # and lets go of its threads
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_memory_that_runs_out_is_not_taken_for_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(image: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_rgb", exhausted)
    with pytest.raises(MemoryError):
        list(stream(pa.array([encoded(picture())]), CLIP, 4, 2))


def test_pixels_that_are_scaled_otherwise_have_their_moments_scaled_back(tmp_path: Path) -> None:
    config = {"size": {"height": 8, "width": 8}, "rescale_factor": 2 / 255, "image_mean": 0.5, "image_std": 0.25}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = Preprocess.of_folder(tmp_path)  # (2 x - 0.5) / 0.25 of x in [0, 1]
    assert found.mean == pytest.approx((0.25,) * 3)
    assert found.std == pytest.approx((0.125,) * 3)


def test_a_model_that_sees_groups_of_one_size_gives_the_same_rows() -> None:
    column = pa.array([encoded(picture(seed=i)) for i in range(5)], pa.binary())
    seen = list[int]()

    class Mean:
        preprocess = Preprocess(8, 8, "squash")

        def images(self, pixels: np.ndarray) -> np.ndarray:
            seen.append(len(pixels))
            return pixels.mean((1, 2), dtype=np.float32)

    plain, fixed = (encode_images(Mean(), column, 3, fixed)[0] for fixed in (False, True))
    assert seen == [3, 2, 3, 3]
    np.testing.assert_array_equal(plain, fixed)
