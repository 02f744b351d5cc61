"""Fashion-MNIST as a labelled corpus of images for `tamis compare --proxy configs/fashion_mnist.yaml`.

usage: python bench/fashion_mnist.py [--root .debian] [--out runs/fashion_mnist_corpus] [--rows 60000]

The Debian package dataset-fashion-mnist has the images, unpacked by `make debian` or installed (--root /). The 60,000
of its training set, or the first of them, become PNGs in Parquet, with the name of their class and a `vector`: the
first 64 principal components of the pixels, so that concepts need no model.
"""

from __future__ import annotations

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.decomposition import PCA

CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COMPONENTS = 64


def images_and_labels(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and classes (n,) uint8."""
    source = root / "usr/share/datasets/fashion-mnist"
    if not source.is_dir():
        raise SystemExit(f"no {source}: run `make debian`")
    files = [source / "train-images-idx3-ubyte.gz", source / "train-labels-idx1-ubyte.gz"]
    images, labels = (
        np.frombuffer(gzip.decompress(f.read_bytes()), np.uint8, offset=o) for f, o in zip(files, (16, 8), strict=True)
    )
    return images.reshape(-1, 28, 28), labels


def png(pixels: np.ndarray) -> bytes:
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG")
    return into.getvalue()


def write_corpus(root: Path, rows: int, directory: Path) -> pa.Table:
    """Write the first rows as one Parquet file; returns them."""
    directory.mkdir(parents=True, exist_ok=True)
    images, labels = (found[:rows] for found in images_and_labels(root))
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
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(".debian"))
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_mnist_corpus"))
    parser.add_argument("--rows", type=int, default=60_000)
    asked = parser.parse_args()
    table = write_corpus(asked.root, asked.rows, asked.out)
    print(f"{len(table):,} images, {table.nbytes / 1e6:.0f} MB, in {asked.out}")


if __name__ == "__main__":
    main()
