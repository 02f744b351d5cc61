"""Images and tars of samples for tests, made on the spot."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def encoded(
    kind: str = "PNG", size: tuple[int, int] = (32, 24), mode: str = "RGB", seed: int = 0, **save: Any
) -> bytes:
    """An encoded image of noise."""
    from PIL import Image

    channels = {"RGB": 3, "L": 1, "CMYK": 4, "RGBA": 4}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return saved(Image.fromarray(noise.squeeze(-1) if channels == 1 else noise, mode), kind, **save)


def saved(image: Any, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(members: Iterable[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def pairs(samples: Mapping[str, Mapping[str, bytes]]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members of samples: `{"0001": {"jpg": ..., "txt": ...}}`."""
    return [member(f"{key}.{end}", content) for key, parts in samples.items() for end, content in parts.items()]


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(tar_of(pairs(samples)))
    return path
