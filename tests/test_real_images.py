"""Real pictures from Debian packages: clip art with captions as their authors left them, stamps, Fashion-MNIST."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline import curate
from pipeline.compare.proxy import compare_proxy, settings
from pipeline.config import parse
from pipeline.corpus.storage import Store
from pipeline.engine.pool import InlinePool
from pipeline.models.images import decode
from pipeline.report.stored import quarantined
from tests.scripts import script

LARGE = (
    "signs_and_symbols/stop_sign_miguel_s_nchez_",
    "computer/microchip_v.2_havok_redh_01",
    "food/dairy/cheese_mateya_01",
)
"""Of 623, 231 and 169 million pixels, in files of a few hundred kilobytes."""

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def clipart(debian_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 400 openclipart pairs, and three with pictures too large to be opened."""
    folder = tmp_path_factory.mktemp("clipart")
    assert script("examples/clipart.py").write_pairs(debian_root, 400, folder) == 400
    with tarfile.open(folder / "large.tar", "w") as tar:
        for name in LARGE:
            png = (debian_root / "usr/share/openclipart/png" / f"{name}.png").read_bytes()
            for suffix, content in (("png", png), ("txt", name.encode())):
                member = tarfile.TarInfo(f"{name.replace('/', '-').replace('.', '-')}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def test_clip_art_as_it_lies_in_tars(clipart: Path, tmp_path: Path) -> None:
    done = curate(
        {
            "corpus": {"path": f"{clipart}/*.tar", "image": "image", "text": "text", "id": "key"},
            "scores": [{"kind": "image_size", "min_side": 150}, {"kind": "caption_rules", "min_words": 4}],
            "select": {
                "budget": {"fraction": 1},
                "floors": {"image_size": 1, "caption_rules": 1},
                "weights": {"image_size": 1},
            },
            "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
            "engine": {"address": "inline"},
            "run": str(tmp_path / "run"),
        },
        quiet=True,
    )
    expected = {}
    for file in sorted(clipart.glob("0*.tar")):
        with tarfile.open(file) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]  # all are files
        for name in (n for n in members if n.endswith(".png")):
            key, caption = name.removesuffix(".png"), members[name.replace(".png", ".txt")].decode()
            with Image.open(io.BytesIO(members[name])) as image:
                short, long = sorted(image.size)
            if short >= 150 and long <= 3 * short and len(caption.split()) >= 4 and len(caption) >= 6:
                expected[key] = (members[name], caption)
    rows = [row for file in done.files for row in pq.read_table(Path(done.path, file)).to_pylist()]
    assert {row["key"]: (row["image"], row["text"]) for row in rows} == expected
    assert 50 < len(rows) < 350
    bad = quarantined(Store(str(tmp_path / "run")), ["row", "image_info"]).to_pylist()
    assert sorted(q["reason"] for q in bad) == ["too many pixels"] * len(LARGE)


def test_clip_art_becomes_pixels_whatever_its_mode(clipart: Path) -> None:
    with tarfile.open(clipart / "00000.tar") as tar:
        pictures = [m for m in tar if m.name.endswith(".png")][:120]
        content = [tar.extractfile(m).read() for m in pictures]  # type: ignore[union-attr]  # all are files
    modes = set()
    for data in content:
        with Image.open(io.BytesIO(data)) as image:
            modes.add(image.mode)
            whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        decoded = decode(data)
        assert not isinstance(decoded, str)
        assert decoded.size == whole.size
        assert np.abs(np.asarray(decoded, int) - np.asarray(whole, int)).max() <= 1
    assert modes >= {"RGBA", "P", "LA"}


def test_stamps_are_trusted_pairs(debian_root: Path, tmp_path: Path) -> None:
    count = script("examples/clipart.py").write_trusted(debian_root, tmp_path / "trusted.parquet")
    table = pq.read_table(tmp_path / "trusted.parquet")
    assert count == table.num_rows > 700
    assert pc.count_distinct(table["text"]).as_py() > 600
    assert pc.all(pc.starts_with(table["image"], pattern=b"\x89PNG")).as_py()


def test_fashion_mnist_teaches_a_small_network(debian_root: Path, tmp_path: Path) -> None:
    """A classifier learns from a third of 3,000 images; those that others find easy teach it less than random ones."""
    made = script("bench/fashion_mnist.py").write_corpus(debian_root, 3000, tmp_path / "corpus")
    assert made["label"].value_counts().field("counts").to_pylist() == pytest.approx([300] * 10, abs=40)
    config = parse(
        {
            "corpus": {"path": str(tmp_path / "corpus"), "text": None, "image": "image", "id": "id"},
            "embed": {"kind": "precomputed", "column": "vector"},
            "scores": [{"kind": "el2n", "name": "easy", "label": "label", "keep": "easy", "models": 2}],
            "select": {"budget": {"fraction": 0.3}},
            "engine": {"address": "inline"},
            "run": str(tmp_path / "run"),
        }
    )
    options = ["steps=150", "batch=32", "width=8", "held_out=0.2", "seeds=2"]
    done = compare_proxy(config, settings(config, options, at=[0.3]), InlinePool, quiet=True)
    chance, easy = done.lines
    assert (chance.arm, easy.arm) == ("random", "easy")
    assert chance.mix.mean < 0.35
    assert easy.mix.mean > chance.mix.mean + 0.03
