"""The text tower beside open_clip itself, on small random models loaded from local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.embed.open_clip import CONFIG, OpenClip
from pipeline.engine.pool import InlinePool
from pipeline.errors import TamisError
from pipeline.run import Run

if TYPE_CHECKING:
    from .conftest import Hub

open_clip = pytest.importorskip("open_clip")
torch = pytest.importorskip("torch")

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SMALL = "ViT-S-32-alt"
TEXTS = ["a photo of a cat", "a photo of a dog", "zeppelin", "long " * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    directory: Path = tmp_path_factory.mktemp("tiny")
    (directory / CONFIG).write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    state = open_clip.CLIP(**TINY).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "open_clip_model.safetensors")
    return directory


def embedded(directory: Path, texts: list[str], **fields: Any) -> np.ndarray:
    pq.write_table(pa.table({"text": texts}), directory / "corpus.parquet")
    config = {
        "corpus": {"path": str(directory / "corpus.parquet")},
        "scores": ["density"],
        "run": str(directory / "run"),
    }
    config |= {"embed": {"kind": "open_clip", **fields}, "select": {"budget": {"rows": 1}}}
    with Run(parse(config), InlinePool, quiet=True) as run:
        run.materialize([row_column(False, None)])
        assert run.config.embed is not None
        run.config.embed.fit(run)
        run.materialize([run.config.embed.column(run)])
    vectors = pq.read_table(directory / "run/columns/embed/part-00000.parquet")["vector"]
    return np.array(vectors.to_pylist(), np.float32)


def reference(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.eval().encode_text(tokenizer(texts), normalize=True))


def test_a_folder_gives_open_clips_own_vectors(tmp_path: Path, folder: Path) -> None:
    found = embedded(tmp_path, TEXTS, model=str(folder))
    name = f"local-dir:{folder}"
    expected = reference(open_clip.create_model(name), open_clip.get_tokenizer(name), TEXTS)
    assert found.shape == (4, 24)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    assert found[0] @ found[1] > found[0] @ found[2]


def test_a_row_does_not_depend_on_the_batch(tmp_path: Path, folder: Path) -> None:
    together = embedded(tmp_path, TEXTS, model=str(folder))
    np.testing.assert_allclose(embedded(tmp_path, TEXTS, model=str(folder), batch_texts=1), together, atol=5e-4)
    np.testing.assert_allclose(embedded(tmp_path, TEXTS[::-1], model=str(folder))[::-1], together, atol=5e-4)


def test_an_architecture_loads_a_checkpoint_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(SMALL)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "small.pt")
    found = embedded(tmp_path, TEXTS, model=SMALL, pretrained=str(tmp_path / "small.pt"))
    np.testing.assert_allclose(found, reference(model, open_clip.get_tokenizer(SMALL), TEXTS), atol=5e-4)


def test_a_checkpoint_with_code_is_not_read(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("/")}, tmp_path / "code.pt")  # a pickled object beyond tensors
    with pytest.raises(TamisError, match="Weights only load failed"):
        embedded(tmp_path, TEXTS, model=SMALL, pretrained=str(tmp_path / "code.pt"))


def test_a_tag_is_fetched_by_open_clip_itself(tmp_path: Path, hub: Hub) -> None:
    place = open_clip.get_pretrained_cfg("ViT-B-32", "openai")["hf_hub"].strip("/")
    hub.put(place, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    (tmp_path / "encoder").mkdir()
    code = """
from pipeline.embed.open_clip import _fetch_tag
_fetch_tag("ViT-B-32", "openai", Path(sys.argv[1]))
_fetch_tag("ViT-B-32", "laion2b_s34b_b79k", Path(sys.argv[1]))"""
    done = hub.run(code, tmp_path / "encoder")
    assert "cannot fetch ViT-B-32 laion2b_s34b_b79k" in done.stderr
    assert "fetch it yourself and give the file as `pretrained`" in done.stderr
    assert (tmp_path / "encoder/weights.safetensors").read_text() == "open_clip_model.safetensors"


def test_an_unknown_tag_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TamisError, match="ViT-B-32 has no tag 'nope', only openai, "):
        embedded(tmp_path, TEXTS, model="ViT-B-32", pretrained="nope")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": "ViT-B-23"}, "knows no architecture 'ViT-B-23', and there is no such folder; near it are ViT-B-32"),
        ({"model": "ViT-B-32"}, "ViT-B-32 needs weights: set `pretrained`"),
        ({"model": "ViT-B-32", "pretrained": "gone.pt"}, "there is no checkpoint 'gone.pt'"),
        ({"model": "no/folder"}, "there is no folder 'no/folder'"),
        ({"model": "hf://org/name", "pretrained": "x"}, "`pretrained` belongs to an architecture"),
        ({"model": "roberta-ViT-B-32", "pretrained": "x"}, "its text tower is another model of the hub"),
        ({"model": "ViT-B-16-SigLIP", "pretrained": "webli"}, "its tokenizer is not part of open_clip"),
    ],
)
def test_errors_at_the_door(fields: dict[str, str], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        OpenClip.model_validate(fields)


def test_a_folder_without_a_text_tower_of_its_own_is_an_error(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(ValidationError, match="has no model_cfg with an embed_dim"):
        OpenClip(model=str(tmp_path))
