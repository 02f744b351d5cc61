"""Where bytes live: one way to open, list and atomically write, local or on an object store.

A location is a URI (`s3://bucket/key`, `gs://`, `hf://datasets/...`) or a local path. File systems are Arrow's own
(credentials, region and endpoint come from the environment, as with every other client); schemes that Arrow does not
know go through fsspec. A file appears in one step: a temporary name and a rename where there are renames, one PUT on
an object store (a multipart upload above 5 MB, which shows nothing until it is complete), so a half-written file never
counts. The price on an object store is that a file waits in memory until it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")
S3_ATTEMPTS = 10
"""A cluster that starts at once is told to slow down; three attempts, Arrow's default, are soon used up."""
READ_ATTEMPTS = 10
"""How often a file is read again that was written anew meanwhile. Those that are, are written every few seconds."""


def is_remote(uri: str) -> bool:
    """Whether a location names an object store (anything with a scheme but `file://`)."""
    return "://" in uri and not uri.startswith("file://")


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a location; errors name the location and what is missing.

    Raises ValueError for a scheme that neither Arrow nor an installed fsspec implementation knows.
    """
    if not is_remote(uri):
        return _local(), os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    scheme, path = uri.split("://", 1)
    if scheme == "s3":
        return _s3(path.partition("/")[0]), path
    if scheme == "hf":
        return _by_uri("hf://")[0], path
    if scheme in ("gs", "gcs"):
        bucket, slash, key = path.partition("/")
        filesystem, name = _by_uri(f"{scheme}://{bucket}")  # `anonymous@bucket` is a bucket too
        return filesystem, name + slash + key
    return _by_uri(uri)


@lru_cache(maxsize=1)
def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


@lru_cache(maxsize=64)
def _by_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError) as arrow_error:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ValueError(f"cannot open {uri!r}: {error} (Arrow says: {arrow_error})") from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


@lru_cache(maxsize=64)
def _s3(bucket: str) -> pafs.FileSystem:
    """S3 as the environment describes it; where it names neither region nor endpoint, the bucket is asked."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        with contextlib.suppress(OSError):  # no such bucket, or no network: opening something says so better
            region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else None),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        allow_delayed_open=True,  # a small object is one PUT, not an upload of three requests
    )


@contextlib.contextmanager
def atomic_write(filesystem: pafs.FileSystem, path: str) -> Iterator[Any]:
    """A binary sink whose content appears at `path` when the block ends, whole, or not at all when it raises."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with filesystem.open_output_stream(temporary, compression=None) as sink:
                yield sink
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            raise
        return
    # Closing an upload that failed half-way would publish the half, so the bytes wait here for their one PUT.
    buffer = pa.BufferOutputStream()
    yield buffer
    with filesystem.open_output_stream(path, compression=None) as sink:
        sink.write(buffer.getvalue())


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that no space (or no quota) is left to write to."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, OSError) and (error.errno in full or "No space left on device" in str(error))


@dataclass(frozen=True)
class Store:
    """A directory, local or remote, addressed by relative names. Pickles as its URI; opens where it is used."""

    uri: str

    def at(self, *names: str) -> str:
        """Path of a name below this directory, on `self.filesystem`."""
        return "/".join((self.path.rstrip("/"), *names)) if names else self.path

    def locate(self, *names: str) -> str:
        """URI of a name below this directory, for people and other programs."""
        return "/".join((self.uri.rstrip("/"), *names))

    @property
    def filesystem(self) -> pafs.FileSystem:
        return resolve(self.uri)[0]

    @property
    def path(self) -> str:
        return resolve(self.uri)[1]

    @property
    def local(self) -> bool:
        return not is_remote(self.uri)

    def child(self, *names: str) -> Store:
        return Store(self.locate(*names))

    def exists(self, *names: str) -> bool:
        return bool(self.filesystem.get_file_info(self.at(*names)).type != pafs.FileType.NotFound)

    def read(self, *names: str) -> bytes:
        """Content of a file, whole and of one version, whoever writes it meanwhile.

        Arrow asks an object store for the size and then for as many bytes: of an object that another took the place
        of in between it returns the beginning, or the whole and bytes of nowhere. The ETag tells.

        Raises FileNotFoundError, and OSError for a file that is never the same for as long as reading it takes.
        """
        for _ in range(READ_ATTEMPTS):
            with self._open(*names) as source:
                version = source.metadata()
                content = bytes(source.read())
            if self.local:  # an open file stays the one that was opened
                return content
            with self._open(*names) as source:
                if source.metadata() == version:
                    return content
        raise OSError(f"{self.locate(*names)} is written anew faster than it can be read: stop what writes it")

    def _open(self, *names: str) -> Any:
        return self.filesystem.open_input_stream(self.at(*names), compression=None)

    def write(self, content: bytes, *names: str) -> None:
        with self.sink(*names) as sink:
            sink.write(content)

    def sink(self, *names: str) -> contextlib.AbstractContextManager[Any]:
        return atomic_write(self.filesystem, self.at(*names))

    def files(self, *names: str, recursive: bool = False) -> dict[str, int]:
        """Names (relative to the directory listed) and sizes of the files below; temporaries are left out."""
        root = self.at(*names).rstrip("/")
        selector = pafs.FileSelector(root, recursive=recursive, allow_not_found=True)
        infos = [i for i in self.filesystem.get_file_info(selector) if i.type == pafs.FileType.File]
        return {i.path[len(root) + 1 :]: int(i.size) for i in infos if not TEMPORARY.search(i.path)}

    def remove(self, *names: str) -> None:
        """Delete a file or a whole directory; nothing happens where there is none."""
        info = self.filesystem.get_file_info(self.at(*names))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(info.path)
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(info.path)

    def remove_temporaries(self) -> None:
        """Remove what writers that were killed left half-written; an object store shows no such thing."""
        if self.local:
            for file in Path(self.path).rglob("*.tmp"):
                if TEMPORARY.search(file.name):
                    file.unlink(missing_ok=True)
