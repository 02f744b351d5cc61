"""Images into vectors beside the obvious way to do it: the same images, the same threads, one run.

usage: python -m bench.clip decode [--tars 'runs/clipart/pairs/*.tar'] [--rows 300] [--threads 2] [--rounds 3]
       python -m bench.clip embed [--arch ViT-B-32] [--model FOLDER] [--rows 64] [--threads 2] [--rounds 3]

`decode`: decode, resize, crop and normalise to the float32 batches that a model takes, beside Pillow and torchvision's
own transforms in a pool of as many threads. `embed`: from encoded images to vectors, beside the bare forward pass over
batches that are prepared already; an architecture of open_clip has random weights, whose speed is that of any others.
Ratios are the other's seconds over ours, in turns, best of the rounds; `cpu` is the same of CPU seconds, which other
work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engine import threads
from pipeline.models.image_text import encode_images, open_folder
from pipeline.models.images import Preprocess, quiet, stream


def images_of(pattern: str, rows: int) -> list[bytes]:
    """The first encoded images of some tars."""
    found: list[bytes] = []
    for path in sorted(glob.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png") and len(found) < rows:
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append(file.read())
    if not found:
        raise SystemExit(f"no images in {pattern}: python examples/clipart.py makes them")
    return found


def best(rounds: int, works: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Least wall and CPU seconds of each."""
    seconds = {name: (float("inf"), float("inf")) for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            took = time.perf_counter() - wall, time.process_time() - cpu
            seconds[name] = (min(seconds[name][0], took[0]), min(seconds[name][1], took[1]))
    return seconds


def report(seconds: dict[str, tuple[float, float]], rows: int) -> None:
    ours, other = seconds["ours"], seconds["bare"]
    print(
        json.dumps(
            {
                "images_a_second": round(rows / ours[0], 1),
                "bare_images_a_second": round(rows / other[0], 1),
                "ratio": round(other[0] / ours[0], 2),
                "cpu_ratio": round(other[1] / ours[1], 2),
            }
        )
    )


def decode(data: list[bytes], count: int, rounds: int) -> None:
    import torch
    from PIL import Image
    from torchvision import transforms

    ours = Preprocess(224, 224, "shortest", 224)
    theirs = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(ours.mean, ours.std),
        ]
    )
    column, device = pa.array(data, pa.binary()), torch.device("cpu")

    def sieve() -> None:
        for part in stream(column, ours, 64, count):
            ours.normalise(part.pixels, device, torch.float32)

    def one(encoded: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(encoded))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=image.getchannel("A"))
            image = white
        found: torch.Tensor = theirs(image.convert("RGB"))
        return found

    def bare() -> None:
        with ThreadPoolExecutor(count) as pool, quiet():
            for start in range(0, len(data), 64):
                torch.stack(list(pool.map(one, data[start : start + 64])))

    report(best(rounds, {"ours": sieve, "bare": bare}), len(data))


def embed(model: Any, data: list[bytes], rounds: int, group: int = 32) -> None:
    column = pa.array(data, pa.binary())
    parts = [part.pixels for part in stream(column, model.preprocess, group, threads.cpus())]

    def bare() -> None:
        for pixels in parts:
            model.images(pixels)

    report(best(rounds, {"ours": lambda: encode_images(model, column, group), "bare": bare}), len(data))


def random_clip(name: str) -> Any:
    """An architecture with random weights."""
    import open_clip
    import torch

    from pipeline.models._open_clip import OpenClip

    model = object.__new__(OpenClip)
    model.model = open_clip.create_model(name).eval()
    model.preprocess = Preprocess.of_open_clip(model.model.visual.preprocess_cfg)
    model.device, model.dtype = torch.device("cpu"), torch.float32
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "embed"])
    parser.add_argument("--tars", default="runs/clipart/pairs/*.tar")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arch", default="ViT-B-32")
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    data = images_of(asked.tars, asked.rows or (300 if asked.what == "decode" else 64))
    with threads.limited(asked.threads):
        import torch

        torch.set_num_threads(asked.threads)
        if asked.what == "decode":
            decode(data, asked.threads, asked.rounds)
        else:
            model = open_folder(asked.model, ("image",)) if asked.model else random_clip(asked.arch)
            embed(model, data, asked.rounds)
    print(
        f"sizes: {np.percentile([len(d) for d in data], [50, 100]).astype(int).tolist()} bytes at the median and most"
    )


if __name__ == "__main__":
    main()
