"""Where a neural model comes from: a folder or file that is there, or `hf://org/name[@revision]`, fetched once.

A model of the hub goes to an artifact of the run, so workers and later runs need no network, and the vectors say which
files made them. Only configuration, tokenizer and safetensors are fetched; code and pickles are not.
"""

from __future__ import annotations

import shutil
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import MissingExtra, TamisError
from pipeline.recipe import fingerprint

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.run import Run

HUB = "hf://"
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


def check_installed(feature: str, extra: str, *modules: str) -> None:
    """Raises ValueError, for a validator, that names the extra to install; imports nothing."""
    for module in modules:
        if find_spec(module) is None:
            raise ValueError(str(MissingExtra(feature, extra, module)))


def is_hub(model: str) -> bool:
    """Whether a model is named on the hub. Raises ValueError for an `hf://` name without organisation or name."""
    if not model.startswith(HUB):
        return False
    parts = model.removeprefix(HUB).partition("@")[0].split("/")
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"a model of the hub is written hf://org/name or hf://org/name@revision, not {model!r}")
    return True


def existing(path: str, *needed: str) -> Path:
    """The folder at a path. Raises ValueError, for a validator, where it or a file that matches `needed` is missing."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {path!r}; a model of the hub is written hf://org/name")
    for pattern in needed:
        if not any(folder.glob(pattern)):
            raise ValueError(f"the folder {path!r} holds no {pattern}")
    return folder


def fetched(run: Run, model: str, name: str = "encoder") -> Artifact:
    """Artifact of a name: the files of a model of the hub."""
    return run.artifact(name, fingerprint("hub", model), partial(fetch, model))


def source_of(run: Run, model: str, name: str) -> Artifact | Path:
    """A model's folder, or for `hf://org/name` the artifact `name` with its files."""
    return fetched(run, model, name) if is_hub(model) else Path(model).expanduser().absolute()


def fetch(model: str, directory: Path) -> None:
    """The files of a model of the hub (`hf://org/name`) into a directory. Raises TamisError where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = model.removeprefix(HUB).partition("@")
    files = directory / "files"  # must not be there yet: a folder that is would do for the client where the hub fails
    try:
        snapshot_download(name, revision=revision or None, allow_patterns=list(FILES), local_dir=files)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).rstrip(".")
        raise TamisError(f"cannot fetch {model}: {why}; fetch it yourself and give its folder as `model`") from error
    shutil.rmtree(files / ".cache", ignore_errors=True)  # the client's notes on the download
    for file in files.iterdir():
        file.rename(directory / file.name)
    files.rmdir()


def folder_of(source: Artifact | Path) -> Path:
    """Where the model (a folder or a checkpoint) is on this machine. Raises TamisError where it is not there."""
    place = source if isinstance(source, Path) else source.local()
    if not place.exists():
        raise TamisError(f"the model {place} is not on this machine: put it where every worker can read it")
    return place


@lru_cache(maxsize=16)
def content_digest(*files: Path) -> str:
    """Fingerprint of the names and bytes of some files; about 1 s a GB."""
    import xxhash

    digests = []
    for path in files:
        state = xxhash.xxh3_128()
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                state.update(chunk)
        digests.append((path.name, state.hexdigest()))
    return fingerprint(sorted(digests))


def folder_digest(folder: Path) -> str:
    """Fingerprint of a model's folder, whatever its path."""
    return content_digest(*sorted(p for pattern in FILES for p in folder.rglob(pattern)))
