"""Image encoders beside the transformers library itself, on small random models loaded from local folders."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from vision_toys import pairs, write_vision

from pipeline.config import parse
from pipeline.embed.image_encoder import ImageEncoderEmbed
from pipeline.engine.pool import InlinePool
from pipeline.errors import TamisError
from pipeline.run import Run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

MODELS: dict[str, dict[str, Any]] = {
    "ViT": {},
    "Dinov2": {},
    "Dinov2WithRegisters": {"num_register_tokens": 2},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


def embedded(directory: Path, table: pa.Table, **fields: Any) -> np.ndarray:
    pq.write_table(table.select(["image"]), directory / "corpus.parquet")
    config = {
        "corpus": {"path": str(directory / "corpus.parquet"), "text": None, "image": "image"},
        "embed": {"kind": "image_encoder", **fields},
        "scores": ["density"],
        "select": {"budget": {"rows": 1}},
        "run": str(directory / "run"),
    }
    with Run(parse(config), InlinePool, quiet=True) as run:
        assert run.config.embed is not None
        run.config.embed.fit(run)
        run.materialize([run.config.embed.column(run)])
    vectors = pq.read_table(directory / "run/columns/embed/part-00000.parquet")["vector"]
    return np.array(vectors.to_pylist(), np.float32)


def reference(folder: Path, table: pa.Table, take: Any) -> np.ndarray:
    """Unit vectors of what `take` makes of the last hidden state, by the library's own processor."""
    images = [Image.open(io.BytesIO(data)) for data in table["image"].to_pylist()]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(folder).eval()(**processor(images, return_tensors="pt"))
    return np.asarray(torch.nn.functional.normalize(take(hidden.last_hidden_state), dim=1))


@pytest.mark.parametrize("kind", MODELS)
def test_a_vector_is_the_class_token_or_the_mean_over_places(tmp_path: Path, kind: str) -> None:
    folder, table = write_vision(tmp_path / "model", kind, **MODELS[kind]), pairs(9)
    found = embedded(tmp_path, table, model=str(folder), batch_images=4)
    expected = reference(folder, table, lambda h: h.mean((2, 3)) if h.ndim == 4 else h[:, 0])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=6e-3)  # the library resizes tensors, which rounds otherwise


def test_the_mean_leaves_class_and_register_tokens_out(tmp_path: Path) -> None:
    folder = write_vision(tmp_path / "model", "Dinov2WithRegisters", num_register_tokens=2)
    found = embedded(tmp_path, pairs(5), model=str(folder), pooling="mean")
    np.testing.assert_allclose(found, reference(folder, pairs(5), lambda h: h[:, 3:].mean(1)), atol=6e-3)


def test_a_timm_model_in_a_transformers_folder(tmp_path: Path) -> None:
    """The way in for EfficientNet-Lite0 and the like; prepared as the `pretrained_cfg` says."""
    pytest.importorskip("timm")
    cfg = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.8, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = transformers.TimmWrapperConfig(architecture="test_efficientnet", pretrained_cfg=cfg, num_labels=2)
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path / "model")
    found = embedded(tmp_path, pairs(5), model=str(tmp_path / "model"))
    assert found.shape == (5, 256)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=2e-3)


def test_errors_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="there is no folder 'nowhere'"):
        ImageEncoderEmbed(model="nowhere")
    folder = write_vision(tmp_path / "model", "ResNet", **MODELS["ResNet"])
    with pytest.raises(TamisError, match="has no class token: set `pooling` to mean"):
        embedded(tmp_path, pairs(2), model=str(folder), pooling="cls")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValidationError, match="holds no preprocessor_config"):
        ImageEncoderEmbed(model=str(folder))
