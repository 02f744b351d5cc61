"""Images as models see them: encoded bytes to RGB, and to the size and scale that a model was trained with.

Decoding takes what web crawls hold: EXIF rotation is applied, 16-bit greys are scaled (a plain conversion would clip
them to white), CMYK and palettes become RGB, transparency lies on white, and of an animation the first frame counts.
Only formats whose decoders are part of Pillow are opened (`FORMATS`; EPS and the like would start other programs), a
header that promises more than `MAX_PIXELS` is believed and refused before a pixel is decoded, and images above `LARGE`
are decoded one at a time, for each takes 8 bytes a pixel or more. What cannot be decoded, a single pixel and a picture
of one colour all over come back as a reason for the quarantine, never as an error.

Resizing filters with antialiasing, as torchvision and the models' own processors do on PIL images, and computes the
crop alone: for a model that cuts out the centre what lies outside is never resized. Where an image is more than twice
`GAP` times as large as it has to be, it is first reduced by a whole factor, for a JPEG inside the decoder (`draft`):
5 times as fast on clip art blown up to JPEGs of 12 megapixels, and 0.16 of 255 off on average, 3 at the most.

`stream` decodes in threads, at most `AHEAD` groups before the one that the model is busy with: Pillow lets go of the
interpreter while it decodes and resizes. bench/clip.py measures it beside a bare Pillow and torchvision loop.
"""

from __future__ import annotations

import json
import math
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import torch
    from PIL import Image

Mode = Literal["shortest", "squash", "longest"]
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970
"""Twice Pillow's MAX_IMAGE_PIXELS: where its own guard against decompression bombs raises, too."""
LARGE = 1 << 24
GAP = 3.0
"""An image is resized from at least so many times the wanted size; Pillow's `reducing_gap`, nearly without loss."""
AHEAD = 2
ORIENTATION = 0x0112
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By the numbers that Pillow, and with it the processors of transformers, give them."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What open_clip takes where a configuration says nothing."""

_large = threading.Lock()


def decode(data: bytes, short_side: int = 0) -> Image.Image | str:
    """An RGB image, or why there is none.

    `short_side`: pixels that the shorter side is needed with; a much larger JPEG is then decoded to fewer. Raises
    MemoryError alone.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data), formats=formats()) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                return _too_large(pixels)
            if pixels <= 1:
                return "image of one pixel"
            if short_side and image.format in ("JPEG", "MPO"):
                image.draft(None, (math.ceil(GAP * short_side),) * 2)
            if image.width * image.height <= LARGE:
                return _rgb(image)
            with _large:
                return _rgb(image)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        return f"image of more than {MAX_PIXELS:,} pixels"
    except UnidentifiedImageError:  # its message holds an address in memory
        return "not an image of a known format"
    except Exception as error:  # decoders of broken files raise whatever comes to them
        return f"undecodable image: {type(error).__name__}: {error}"


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow can open."""
    from PIL import Image

    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _too_large(pixels: int) -> str:
    return f"image of {pixels:,} pixels, more than {MAX_PIXELS:,}"


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    image.load()
    image = _upright(image)
    if image.mode in SIXTEEN_BITS:
        grey = np.asarray(image)
        return Image.fromarray((np.clip(grey, 0, 0xFFFF) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floats, of which nothing says what is white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _upright(image: Image.Image) -> Image.Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken metadata does not cost the picture
        return image
    return image if turn is None else image.transpose(turn)


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images: (height, width) pixels, cut and scaled in its own way."""

    height: int
    width: int
    mode: Mode = "shortest"
    """The shorter side becomes `short_side` and the centre is cut out; the shape is squashed; or all of it fits inside
    and the rest is filled."""
    short_side: int = 0
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fill: int = 0

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
        if self.mode == "shortest" and self.short_side < max(self.height, self.width):
            raise ValueError(f"{self.height} x {self.width} pixels cannot be cut out of {self.short_side}")

    @classmethod
    def of_open_clip(cls, config: Mapping[str, Any]) -> Preprocess:
        """From open_clip's `preprocess_cfg`. Raises ValueError for what it does not cover."""
        size = config.get("size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        mode: Mode = config.get("resize_mode") or "shortest"
        if mode == "shortest" and height != width:
            raise ValueError(f"resize_mode shortest for {height} x {width} pixels is not supported")
        return cls(
            height,
            width,
            mode,
            short_side=height if mode == "shortest" else 0,
            interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
            mean=_three(config.get("mean") or CLIP_MEAN),
            std=_three(config.get("std") or CLIP_STD),
            fill=config.get("fill_color") or 0,
        )

    @classmethod
    def of_folder(cls, folder: Path) -> Preprocess:
        """From a transformers folder: preprocessor_config.json, or the `pretrained_cfg` that timm's models bring.

        Raises ValueError where there is neither, and for steps that are not covered.
        """
        file = folder / "preprocessor_config.json"
        if file.is_file():
            return cls._of_processor(json.loads(file.read_text()), str(file))
        timm = json.loads((folder / "config.json").read_text()).get("pretrained_cfg")
        if timm is None:
            raise ValueError(f"the folder {str(folder)!r} holds no preprocessor_config.json")
        _, height, width = timm["input_size"]
        if timm.get("crop_mode", "center") == "squash":
            return cls(height, width, "squash", 0, timm["interpolation"], tuple(timm["mean"]), tuple(timm["std"]))
        short = math.floor(max(height, width) / timm.get("crop_pct", 1))
        return cls(height, width, "shortest", short, timm["interpolation"], tuple(timm["mean"]), tuple(timm["std"]))

    @classmethod
    def _of_processor(cls, config: Mapping[str, Any], name: str) -> Preprocess:
        if config.get("do_pad") or config.get("rescale_offset") or config.get("include_top"):
            raise ValueError(f"{name}: do_pad, rescale_offset and include_top are not supported")
        if not (config.get("do_resize", True) and config.get("do_rescale", True)):
            raise ValueError(f"{name}: do_resize and do_rescale must be true")
        scale = 255 * config.get("rescale_factor", 1 / 255)  # 2: to [0, 2]
        plain = not config.get("do_normalize", True)
        mean = (0.0,) * 3 if plain else _three(config.get("image_mean", 0.5))
        std = (1.0,) * 3 if plain else _three(config.get("image_std", 0.5))
        mean, std = tuple(m / scale for m in mean), tuple(s / scale for s in std)
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        interpolation = INTERPOLATIONS[config.get("resample", 3)]
        if isinstance(size, int):
            size = {"shortest_edge": size} if config.get("do_center_crop") else {"height": size, "width": size}
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        if "shortest_edge" not in size and "height" not in size:
            raise ValueError(f"{name}: size {size} is neither a shortest_edge nor a height and a width")
        if not config.get("do_center_crop"):
            if "height" not in size:
                raise ValueError(f"{name}: without do_center_crop images would differ in size")
            return cls(size["height"], size["width"], "squash", 0, interpolation, mean, std)
        if "height" in size:
            if crop != size:
                raise ValueError(f"{name}: a crop of {crop} out of a size of {size} is not supported")
            return cls(size["height"], size["width"], "squash", 0, interpolation, mean, std)
        short = size["shortest_edge"]
        return cls(crop["height"], crop["width"], "shortest", short, interpolation, mean, std)

    def __call__(self, data: bytes) -> np.ndarray | str:
        """(height, width, 3) uint8 of an encoded image, or why there is none."""
        image = decode(data, self.short_side or max(self.height, self.width))
        if isinstance(image, str):
            return image
        pixels = np.asarray(self.fit(image))
        return "blank image: one colour all over" if (pixels == pixels[0, 0]).all() else pixels

    def fit(self, image: Image.Image) -> Image.Image:
        """An RGB image in the model's size."""
        from PIL import Image

        filtering = Image.Resampling[self.interpolation.upper()]
        if self.mode == "squash":
            return image.resize((self.width, self.height), filtering, reducing_gap=GAP)
        if self.mode == "longest":
            scale = min(self.width / image.width, self.height / image.height)
            width, height = (max(1, round(side * scale)) for side in image.size)
            whole = Image.new("RGB", (self.width, self.height), (self.fill,) * 3)
            inside = image.resize((width, height), filtering, reducing_gap=GAP)
            whole.paste(inside, ((self.width - width) // 2, (self.height - height) // 2))
            return whole
        # As torchvision rounds: the longer side is cut off, the corner of the crop goes to the nearest pixel.
        short = min(image.size)
        width, height = (int(self.short_side * side / short) for side in image.size)
        left, top = round((width - self.width) / 2), round((height - self.height) / 2)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + self.width) * across, (top + self.height) * down)
        within = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        return image.resize((self.width, self.height), filtering, within, reducing_gap=GAP)

    def normalise(self, pixels: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """(n, height, width, 3) uint8 to (n, 3, height, width) of mean 0 and deviation 1, as the model knows them."""
        import torch

        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (self.mean, self.std))
        raw = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous()  # while a pixel is a byte
        return raw.float().sub_(mean).div_(std).to(dtype)


@dataclass(frozen=True)
class Group:
    """Some rows of a batch, decoded: `rows` (m,) their places, `pixels` (m, height, width, 3) uint8."""

    rows: np.ndarray
    pixels: np.ndarray
    refused: dict[int, str]
    """Place and reason of the rows in between that could not be decoded."""


def stream(images: pa.Array, preprocess: Preprocess, group: int, workers: int) -> Iterator[Group]:
    """Decode n encoded images in `workers` threads, `group` rows at a time in their order, ahead of who asks."""
    starts = iter(range(0, len(images), group))
    waiting: deque[tuple[int, np.ndarray, list[Future[str]]]] = deque()

    def load(row: int, into: np.ndarray) -> str:
        found = preprocess(images[row].as_py())
        if isinstance(found, str):
            return found
        into[:] = found
        return ""

    def begin() -> None:
        start = next(starts, None)
        if start is not None:
            count = min(group, len(images) - start)
            pixels = np.empty((count, preprocess.height, preprocess.width, 3), np.uint8)
            waiting.append((start, pixels, [pool.submit(load, start + i, pixels[i]) for i in range(count)]))

    pool = ThreadPoolExecutor(workers, "decode")
    try:
        with quiet():
            for _ in range(AHEAD + 1):
                begin()
            while waiting:
                start, pixels, futures = waiting.popleft()
                reasons = [future.result() for future in futures]
                begin()
                good = np.array([not reason for reason in reasons])
                refused = {start + i: reason for i, reason in enumerate(reasons) if reason}
                yield Group(start + np.flatnonzero(good), pixels if good.all() else pixels[good], refused)
    finally:
        pool.shutdown(cancel_futures=True)


def pictures(
    images: pa.Array, most: int, group: int, workers: int
) -> Iterator[tuple[list[int], list[Image.Image], dict[int, str]]]:
    """n encoded images as RGB of at most `most` pixels, `group` rows decoded at a time in `workers` threads: places,
    pictures, and the reasons of the rows in between that are none."""
    with ThreadPoolExecutor(workers, "decode") as pool, quiet():
        for start in range(0, len(images), group):
            found = list(pool.map(partial(_picture, most=most), images.slice(start, group).to_pylist()))
            shown = {start + i: picture for i, picture in enumerate(found) if not isinstance(picture, str)}
            refused = {start + i: reason for i, reason in enumerate(found) if isinstance(reason, str)}
            yield list(shown), list(shown.values()), refused


def _picture(data: bytes, most: int) -> Image.Image | str:
    image = decode(data)
    if isinstance(image, str) or image.width * image.height <= most:
        return image
    scale = math.sqrt(most / (image.width * image.height))
    width, height = (max(1, math.floor(side * scale)) for side in image.size)
    return image.resize((width, height), reducing_gap=GAP)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what decoders say of odd files (corrupt EXIF, many pixels): a row's reason is the place for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def _three(values: Any) -> tuple[float, ...]:
    """One number for all channels, or one each."""
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(values)
