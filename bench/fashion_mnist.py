"""Fashion-MNIST as a labelled corpus of images for `tamis compare --proxy configs/fashion_mnist.yaml`.

usage: python bench/fashion_mnist.py [DIRECTORY]      (default: runs/fashion_mnist_corpus)

The Debian package dataset-fashion-mnist has the images; the 60,000 of its training set become PNGs in Parquet, with the
name of their class and a `vector`: the first 64 principal components of the pixels, so that concepts need no model.
"""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.decomposition import PCA

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COMPONENTS = 64


def images_and_labels(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and classes (n,) uint8."""
    files = [SOURCE / f"{part}-images-idx3-ubyte.gz", SOURCE / f"{part}-labels-idx1-ubyte.gz"]
    images, labels = (
        np.frombuffer(gzip.decompress(f.read_bytes()), np.uint8, offset=o) for f, o in zip(files, (16, 8), strict=True)
    )
    return images.reshape(-1, 28, 28), labels


def png(pixels: np.ndarray) -> bytes:
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG")
    return into.getvalue()


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fashion_mnist_corpus")
    if not SOURCE.is_dir():
        raise SystemExit(f"no {SOURCE}: apt-get install dataset-fashion-mnist")
    directory.mkdir(parents=True, exist_ok=True)
    images, labels = images_and_labels("train")
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    vectors = PCA(COMPONENTS, random_state=0).fit_transform(flat).astype(np.float32)
    table = pa.table(
        {
            "id": pa.array([f"train-{i:05d}" for i in range(len(images))]),
            "image": pa.array([png(i) for i in images], pa.binary()),
            "label": pa.array(np.array(CLASSES)[labels]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), COMPONENTS),
        }
    )
    pq.write_table(table, directory / "part-0.parquet", row_group_size=2000)
    print(f"{len(images):,} images, {table.nbytes / 1e6:.0f} MB, in {directory}")


if __name__ == "__main__":
    main()
