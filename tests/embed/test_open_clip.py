"""Both towers beside open_clip itself, on small random models loaded from local files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from vision_toys import CAPTIONS, encoded, pairs, write_open_clip

from pipeline.config import parse
from pipeline.corpus.rows import row_column
from pipeline.embed.open_clip import OpenClip
from pipeline.engine.pool import InlinePool
from pipeline.errors import ConfigError, TamisError
from pipeline.models._open_clip import CONFIG
from pipeline.models.image_text import encode_images
from pipeline.models.images import Preprocess
from pipeline.run import Run

if TYPE_CHECKING:
    from .conftest import Hub

open_clip = pytest.importorskip("open_clip")
torch = pytest.importorskip("torch")

SMALL = "ViT-S-32-alt"
TEXTS = ["a photo of a cat", "a photo of a dog", "zeppelin", "long " * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_open_clip(tmp_path_factory.mktemp("tiny"))


def filled(directory: Path, table: pa.Table, embed: dict[str, Any], **corpus: Any) -> pa.Table:
    """The column `embed` of a corpus."""
    pq.write_table(table, directory / "corpus.parquet")
    config = {
        "corpus": {"path": str(directory / "corpus.parquet"), **corpus},
        "embed": {"kind": "open_clip", **embed},
        "scores": ["density"],
        "select": {"budget": {"rows": 1}},
        "engine": {"max_bad_fraction": 1},
        "run": str(directory / "run"),
    }
    with Run(parse(config), InlinePool, quiet=True) as run:
        corpus_config = run.config.corpus
        run.materialize([row_column(False, None, corpus_config.has_text, corpus_config.image is not None)])
        assert run.config.embed is not None
        run.config.embed.fit(run)
        run.materialize([run.config.embed.column(run)])
    return pq.read_table(directory / "run/columns/embed/part-00000.parquet")


def array(vectors: pa.ChunkedArray) -> np.ndarray:
    return np.array(vectors.to_pylist(), np.float32)


def embedded(directory: Path, texts: list[str], **fields: Any) -> np.ndarray:
    return array(filled(directory, pa.table({"text": texts}), fields)["vector"])


def reference(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.eval().encode_text(tokenizer(texts), normalize=True))


def test_a_folder_gives_open_clips_own_vectors(tmp_path: Path, folder: Path) -> None:
    found = embedded(tmp_path, TEXTS, model=str(folder))
    assert [f.name for f in pq.read_schema(tmp_path / "run/columns/embed/part-00000.parquet")] == ["vector"]
    name = f"local-dir:{folder}"
    expected = reference(open_clip.create_model(name), open_clip.get_tokenizer(name), TEXTS)
    assert found.shape == (4, 24)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    assert found[0] @ found[1] > found[0] @ found[2]


def test_a_row_does_not_depend_on_the_batch(tmp_path: Path, folder: Path) -> None:
    together = embedded(tmp_path, TEXTS, model=str(folder))
    np.testing.assert_allclose(embedded(tmp_path, TEXTS[::-1], model=str(folder))[::-1], together, atol=5e-4)


def test_an_architecture_loads_a_checkpoint_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(SMALL)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "small.pt")
    found = embedded(tmp_path, TEXTS, model=SMALL, pretrained=str(tmp_path / "small.pt"))
    np.testing.assert_allclose(found, reference(model, open_clip.get_tokenizer(SMALL), TEXTS), atol=5e-4)


class Code:
    """Runs when a pickle of it is read."""

    def __reduce__(self) -> Any:
        return print, ("the checkpoint's code ran",)


def test_a_checkpoint_with_code_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Code()}, tmp_path / "code.pt")
    with pytest.raises(TamisError, match="Weights only load failed"):
        embedded(tmp_path, TEXTS, model=SMALL, pretrained=str(tmp_path / "code.pt"))
    assert "code ran" not in capsys.readouterr().out


def test_a_tag_is_fetched_by_open_clip_itself(tmp_path: Path, hub: Hub) -> None:
    place = open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")["hf_hub"].strip("/")
    hub.put(place, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    (tmp_path / "encoder").mkdir()
    code = """
from pipeline.models._open_clip import fetch_tag
fetch_tag("ViT-B-32-quickgelu", "openai", Path(sys.argv[1]))
fetch_tag("ViT-B-32", "laion2b_s34b_b79k", Path(sys.argv[1]))"""
    done = hub.run(code, tmp_path / "encoder")
    assert "cannot fetch ViT-B-32 laion2b_s34b_b79k" in done.stderr
    assert "fetch it yourself and give the file as `pretrained`" in done.stderr
    assert (tmp_path / "encoder/weights.safetensors").read_text() == "open_clip_model.safetensors"
    assert json.loads((tmp_path / "encoder/preprocess.json").read_text())["interpolation"] == "bicubic"


def test_a_tag_of_another_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TamisError, match="'openai' was trained with another activation: set `model` to ViT-B-32-quick"):
        embedded(tmp_path, TEXTS, model="ViT-B-32", pretrained="openai")


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


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the images and of the captions of `pairs(20)`, by open_clip's own transform and model."""
    from PIL import Image

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = [transform(Image.open(io.BytesIO(data))) for data in pairs(20)["image"].to_pylist()]
    with torch.no_grad():
        x = model.eval().encode_image(torch.stack(images), normalize=True)
    texts = reference(model, open_clip.get_tokenizer(f"local-dir:{folder}"), pairs(20)["text"].to_pylist())
    return np.asarray(x), texts


def test_both_towers_in_one_pass_give_open_clips_own_vectors_and_their_cosine(
    tmp_path: Path, folder: Path, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    found = filled(tmp_path, pairs(20), {"model": str(folder), "batch_images": 7}, image="image")
    assert found.column_names == ["vector", "text_vector", "cosine"]
    for name, vectors in zip(("vector", "text_vector"), expected, strict=True):
        np.testing.assert_allclose(array(found[name]), vectors, atol=2e-3)
    np.testing.assert_allclose(found["cosine"], (expected[0] * expected[1]).sum(1), atol=1e-3)


@pytest.mark.parametrize("corpus", [{"text": None}, {}])
def test_one_tower_alone(
    tmp_path: Path, folder: Path, expected: tuple[np.ndarray, np.ndarray], corpus: dict[str, Any]
) -> None:
    """Images alone have one tower; of pairs one may be asked for."""
    asked = {} if corpus else {"tower": "image"}
    found = filled(tmp_path, pairs(20), {"model": str(folder), **asked}, image="image", **corpus)
    assert found.column_names == ["vector"]
    np.testing.assert_allclose(array(found["vector"]), expected[0], atol=2e-3)


def test_an_image_that_cannot_be_decoded_is_in_quarantine_and_its_neighbours_are_not(
    tmp_path: Path, folder: Path, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    from PIL import Image

    images = pairs(20)["image"].to_pylist()
    images[3], images[7] = b"no image", encoded(Image.new("RGB", (9, 9), "red"))
    table = pa.table({"image": pa.array(images, pa.binary()), "text": pairs(20)["text"]})
    found = filled(tmp_path, table, {"model": str(folder)}, image="image")
    assert np.flatnonzero(found["vector"].is_null()).tolist() == [3, 7]
    assert np.flatnonzero(found["cosine"].is_null()).tolist() == [3, 7]
    rest = np.setdiff1d(np.arange(20), [3, 7])
    np.testing.assert_allclose(array(found["vector"].take(pa.array(rest))), expected[0][rest], atol=2e-3)
    refused = pq.read_table(tmp_path / "run/quarantine/embed/part-00000.parquet").sort_by("row")
    assert refused["reason"].to_pylist() == ["not an image of a known format", "blank image: one colour all over"]


def test_a_tower_that_the_corpus_has_nothing_for_is_an_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tower: image needs corpus\.image, which names no column"):
        filled(tmp_path, pa.table({"text": CAPTIONS}), {"model": str(folder), "tower": "image"})


def test_bfloat16_sees_batches_of_one_shape(folder: Path) -> None:
    """The last group is filled up, so that a score does not depend on how many rows are left."""
    shapes: list[tuple[int, ...]] = []

    class Seen:
        preprocess = Preprocess(16, 16, "squash")

        def images(self, pixels: np.ndarray) -> np.ndarray:
            shapes.append(pixels.shape)
            return np.arange(3.0 * len(pixels), dtype=np.float32).reshape(-1, 3)

    data = pairs(5)["image"].combine_chunks()
    found, _ = encode_images(Seen(), data, 4, fixed=True)
    assert shapes == [(4, 16, 16, 3)] * 2
    assert found.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [0, 1, 2]]
