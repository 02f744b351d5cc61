"""Sizes of images from their headers: odd files described or refused, DataComp's limits to the pixel."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.recipe import QUARANTINE
from pipeline.scores._image_info import MAX_PIXELS, image_info
from pipeline.scores.image_size import ImageSize
from tests.corpus.samples import encoded, saved

Image = pytest.importorskip("PIL.Image")


def described(*contents: bytes, max_pixels: int = MAX_PIXELS) -> list[dict[str, Any]]:
    column = image_info(max_pixels)
    out = column.open()(pa.record_batch([pa.array(contents, pa.binary())], ["image"]))
    assert out.schema == column.fields
    return list(out.to_pylist())


def fields(content: bytes) -> tuple[Any, ...]:
    return tuple(described(content)[0].values())


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that is nothing but a header and what is given, whatever size it says."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def gif(frames: int) -> bytes:
    pages = [Image.new("L", (8, 8), 40 * i) for i in range(frames)]
    return saved(pages[0], "GIF", save_all=True, append_images=pages[1:])


def test_odd_images_are_described() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert fields(encoded("JPEG")) == (32, 24, "JPEG", "RGB", 1, 1, None)
    assert fields(encoded("JPEG", mode="CMYK")) == (32, 24, "JPEG", "CMYK", 1, 1, None)
    assert fields(encoded("JPEG", exif=exif)) == (32, 24, "JPEG", "RGB", 1, 6, None)  # as stored: shown it is 24 x 32
    assert fields(encoded("WEBP", exif=exif)) == (32, 24, "WEBP", "RGB", 1, 6, None)
    assert fields(encoded("PNG", exif=exif)) == (32, 24, "PNG", "RGB", 1, 6, None)
    assert fields(encoded("TIFF", exif=exif)) == (32, 24, "TIFF", "RGB", 1, 6, None)
    assert fields(encoded("BMP", mode="L")) == (32, 24, "BMP", "L", 1, 1, None)
    sixteen = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 85)
    assert fields(saved(sixteen, "PNG"))[:5] == (32, 24, "PNG", "I;16", 1)
    palette = Image.new("P", (32, 24), 3)
    assert fields(saved(palette, "PNG", transparency=3)) == (32, 24, "PNG", "P", 1, 1, None)
    assert fields(gif(5)) == (8, 8, "GIF", "P", 5, 1, None)


def test_no_pixel_is_decoded() -> None:
    whole = encoded("JPEG", (640, 480))
    assert fields(whole[: len(whole) // 3]) == (640, 480, "JPEG", "RGB", 1, 1, None)
    assert fields(png(5000, 4000)) == (5000, 4000, "PNG", "RGB", 1, 1, None)  # has no pixels at all
    late = (b"eXIf", saved(Image.new("RGB", (1, 1)), "TIFF"))
    assert fields(png(5000, 4000, (b"IDAT", b"broken"), late))[5] == 1


def test_what_has_no_readable_header_is_refused_with_a_reason() -> None:
    bomb, larger = png(20_000, 20_000), png(10_000, 9_000)
    reasons = [
        d[QUARANTINE]
        for d in described(
            b"\0", b"no image", encoded("JPEG")[:20], bomb, larger, png(0, 5), b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n"
        )
    ]
    unknown, many = "not an image of a known format", "too many pixels"
    assert reasons == [unknown, unknown, unknown, many, many, unknown, unknown, unknown]  # no Ghostscript for the last
    text = (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(4 << 20)))
    assert described(png(300, 300, text))[0][QUARANTINE] == "undecodable image: ValueError"
    limited = image_info(90_000).open()(pa.record_batch([pa.array([png(300, 300), png(300, 301)])], ["image"]))
    assert limited.column(QUARANTINE).to_pylist() == [None, many]
    values = described(bomb)[0]
    assert {v for k, v in values.items() if k != QUARANTINE} == {None}


@given(st.binary(max_size=300), st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]), st.integers(0, 200))
def test_nothing_that_is_no_image_raises(noise: bytes, kind: str, at: int) -> None:
    broken = bytearray(encoded(kind, (16, 16)))
    broken[at : at + len(noise)] = noise
    for row in described(bytes(broken), noise):
        assert (row["width"] is None) == (row[QUARANTINE] is not None)


def judged(recipe: ImageSize, *sizes: tuple[int, int], frames: int = 1) -> list[tuple[float, str]]:
    column = recipe.column(None)  # type: ignore[arg-type]  # it asks nothing of the run
    width, height = (pa.array(v, pa.int32()) for v in zip(*sizes, strict=True))
    inputs = [width, height, pa.array([frames] * len(sizes), pa.int32())]
    out = column.open()(pa.record_batch(inputs, list(column.inputs)))
    assert out.schema == column.fields
    return list(zip(out["score"].to_pylist(), out["rule"].to_pylist(), strict=True))


def test_limits_are_datacomps_to_the_pixel() -> None:
    sizes = [(200, 200), (199, 900), (900, 199), (200, 600), (601, 200), (200, 601), (1, 1)]
    passed, side, aspect = (1.0, ""), (0.0, "short_side"), (0.0, "aspect")
    assert judged(ImageSize(), *sizes) == [passed, side, side, passed, aspect, aspect, side]


def test_every_limit_can_be_off_or_on() -> None:
    assert judged(ImageSize(min_side=None, max_aspect=None), (1, 1000)) == [(1.0, "")]
    assert judged(ImageSize(min_pixels=50_000), (220, 220), (250, 200)) == [(0.0, "few_pixels"), (1.0, "")]
    assert judged(ImageSize(), (300, 300), frames=2) == [(1.0, "")]
    assert judged(ImageSize(animations=False), (300, 300), frames=2) == [(0.0, "animated")]
    assert judged(ImageSize(animations=False), (300, 300)) == [(1.0, "")]


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_turning_an_image_changes_nothing(width: int, height: int) -> None:
    assert judged(ImageSize(), (width, height)) == judged(ImageSize(), (height, width))


def test_limits_that_no_image_passes() -> None:
    with pytest.raises(ValidationError, match="no image passes: it needs 40,000 pixels, and max_pixels allows 10,000"):
        ImageSize(max_pixels=10_000)
    with pytest.raises(ValidationError, match="less than or equal to 178956970"):
        ImageSize(max_pixels=1 << 40)
    assert {c.name for limit in (50_000, MAX_PIXELS) for c in ImageSize(max_pixels=limit).support(None)} == {  # type: ignore[arg-type]  # it asks nothing of the run
        "image_info",
        "image_info_50000",
    }
