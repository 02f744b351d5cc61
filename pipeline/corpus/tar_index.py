"""The index of a tar of samples: which bytes are whose image, caption and JSON. Headers are read, no member.

As WebDataset names them: members whose names are alike up to the first dot of the last part are one sample
(`a/0001.jpg` and `a/0001.txt` are `a/0001`), and what follows the dot says what a member is (`EXTENSIONS`). A sample is
a row, in the order of its first member; it makes no difference how far apart its members lie. Members of other
extensions are left alone, as are directories, hidden files and names without a dot.

An archive is not trusted. A name that is absolute or climbs (`..`), links, devices, sparse members and two members for
one column spoil their sample: its `fault` says why, and it goes to quarantine. Where the file ends before its end
marker, a header is damaged or a size reaches beyond the end, what came before is used and `cut` says where it stopped.
Names may be long (GNU, PAX); of what a PAX header says beside the name only the size is used.

Row groups are ranges of samples of about 8 MiB, which shards are cut from. Measured on a local tar of 278 MB with
30,000 members: indexed in 0.84 s of one core (the standard library walks it in 0.68 s, which is its parsing of headers
here and there); the index has 18 bytes a sample, and everything is then read at 370 MB/s of one core.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.errors import CorpusError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
EXTENSIONS = dict.fromkeys(IMAGES, "image") | {"txt": "text", "caption": "text", "json": "json"}
ROLES = ("image", "text", "json")
SCHEMA = pa.schema([("key", pa.string()), ("image", pa.binary()), ("text", pa.string()), ("json", pa.string())])
"""A tar as a table."""
INDEX = pa.schema(
    [
        ("key", pa.string()),
        *((f"{role}_{what}", pa.int64()) for role in ROLES for what in ("at", "size")),
        ("fault", pa.string()),
    ]
)
"""A row a sample: where its members lie in the file, null where it has none, and why it cannot be used."""

GROUP_BYTES = 8 << 20
BLOCK = tarfile.BLOCKSIZE
HEADER_BYTES = 1 << 20
"""What a GNU or PAX header may say of one member."""
NAME_CHARACTERS = 4096
TRAILER_BYTES = 1 << 20
"""How far behind the end marker is looked for an archive that was appended; tar itself fills up to 10 KiB."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_NAMES = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|Z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "sparse",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive: where its bytes lie, or why it is not to be used."""

    name: str
    at: int
    size: int
    fault: str | None


@dataclass
class Walk:
    """Members of an archive in its order. `ahead`: bytes to read at a time; after the last, `cut` and `digest` hold."""

    source: Any
    size: int
    ahead: int
    cut: str | None = None
    """Why the archive's end is missing; None where it is whole."""
    digest: Any = field(default_factory=hashlib.sha256)
    """Of all headers: names, sizes, times."""
    _window: tuple[int, bytes] = (0, b"")

    def __iter__(self) -> Iterator[Member]:
        at, said, everywhere = 0, dict[str, bytes](), None
        while True:
            block = self._read(at, BLOCK)
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
                return self._end(at)
            except tarfile.HeaderError as error:
                return self._stop(at, "the end marker is missing" if not block else f"{error}")
            self.digest.update(block)
            data = at + BLOCK
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *PAX):
                content = self._read(data, header.size) if 0 <= header.size <= HEADER_BYTES else b""
                if len(content) < header.size <= HEADER_BYTES or header.size < 0:
                    return self._stop(at, "a header is not whole")
                self.digest.update(content)
                more = _said(header.type, content) if content else {FAULT: b"a header is too large"}
                if header.type == tarfile.XGLTYPE:
                    everywhere = everywhere or _meddles(more)
                else:
                    said |= more
                at = data + _padded(header.size)
                continue
            try:
                size = int(said.get("size", header.size))
            except ValueError:
                size = -1
            if header.type == tarfile.GNUTYPE_SPARSE and block[482]:
                while len(more_blocks := self._read(data, BLOCK)) == BLOCK:
                    data += BLOCK
                    if not more_blocks[504]:
                        break
            has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
            if size < 0:
                return self._stop(at, "a size is no number")
            name = said["path"].decode("utf-8", "surrogateescape") if "path" in said else header.name
            if not header.isdir():
                whole = not has_data or data + size <= self.size
                fault = said[FAULT].decode() if FAULT in said else everywhere or _kind_fault(header.type, said)
                yield Member(name, data, size, fault or _name_fault(name) or (None if whole else "cut off"))
                if not whole:
                    return self._stop(self.size, "the last member is not whole, or its size is not true")
            at, said = data + (_padded(size) if has_data else 0), {}

    def _read(self, at: int, length: int) -> bytes:
        """`length` bytes, fewer at the file's end."""
        start, window = self._window
        if not start <= at <= at + length <= start + len(window):
            start, window = at, b""
            if at < self.size:
                window = self.source.read_at(min(max(self.ahead, length), self.size - at), at)
            self._window = (start, window)
        return window[at - start : at - start + length]

    def _end(self, at: int) -> None:
        """Look behind the end marker: somebody may have joined archives."""
        behind = self._read(at, TRAILER_BYTES).lstrip(b"\0")
        if behind:
            self._stop(at, "the archive ends, but data follow (joined archives? use tar --concatenate)")

    def _stop(self, at: int, why: str) -> None:
        self.cut = f"cut at byte {at:,}: {why}; what comes before is used"


PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
FAULT = "tamis.fault"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _said(kind: bytes, content: bytes) -> dict[str, bytes]:
    """What an extended header says of the next member: PAX keywords and their values."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0]}
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {}
    records: dict[str, bytes] = {}
    at = 0
    try:
        while at < len(content) and content[at]:
            blank = content.index(b" ", at)
            end = at + int(content[at:blank])
            keyword, equals, value = content[blank + 1 : end - 1].partition(b"=")
            if not equals or content[end - 1 : end] != b"\n":
                raise ValueError(at)
            records[keyword.decode("utf-8", "replace")] = value
            at = end
    except ValueError:
        return {FAULT: b"a PAX header is damaged"}
    return records


def _meddles(records: dict[str, bytes]) -> str | None:
    """Why a global header, which holds for all members behind it, is not believed."""
    bad = next((k for k in records if k in ("path", "size", "linkpath", FAULT) or k.startswith("GNU.sparse")), None)
    return bad and f"a global PAX header sets {bad} for every member"


def _kind_fault(kind: bytes, said: dict[str, bytes]) -> str | None:
    if kind in tarfile.REGULAR_TYPES and kind != tarfile.GNUTYPE_SPARSE:
        return "member is sparse" if any(k.startswith("GNU.sparse") for k in said) else None
    return f"member is {KINDS.get(kind, 'of an unknown type')}"


def _name_fault(name: str) -> str | None:
    if ABSOLUTE.match(name):
        return "name is absolute"
    if ".." in re.split(r"[/\\]", name):
        return "name climbs out of the archive"
    if len(name) > NAME_CHARACTERS:
        return "name is too long"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    return "name holds a NUL" if "\0" in name else None


def sample_of(name: str) -> tuple[str, str] | None:
    """Key and extension of a member; None for one that belongs to no sample.

    >>> sample_of("a.b/0001.seg.PNG")
    ('a.b/0001', 'seg.png')
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


@dataclass(frozen=True)
class Indexed:
    """What one tar holds: the table of its samples, rows and bytes of every row group, what is missing, who it is."""

    table: pa.Table
    rows: list[int]
    bytes: list[int]
    cut: str | None
    identity: str


def index_tar(source: Any, size: int, ahead: int) -> Indexed:
    """Index an open file (with `read_at`) of `size` bytes. Raises CorpusError where it is not a tar."""
    if compression := next((c for magic, c in COMPRESSED.items() if source.read_at(6, 0).startswith(magic)), None):
        raise CorpusError(compressed(compression))
    walk = Walk(source, size, ahead)
    places: dict[str, int] = {}
    cells: list[list[int | None]] = []
    faults: list[str | None] = []
    for member in walk:
        sample = sample_of(member.name)
        if sample is None and member.fault is None:
            continue
        key, extension = sample or (member.name, "")
        row = places.setdefault(key, len(cells))
        if row == len(cells):
            cells.append([None] * (2 * len(ROLES)))
            faults.append(None)
        role = EXTENSIONS.get(extension)
        cell = 2 * ROLES.index(role) if role else 0
        if member.fault:
            faults[row] = faults[row] or member.fault
        elif role and cells[row][cell] is not None:
            faults[row] = faults[row] or f"two members hold its {role}"
        elif role:
            cells[row][cell : cell + 2] = member.at, member.size
    if walk.cut and not places and walk.cut.startswith("cut at byte 0:"):
        raise CorpusError(f"not a tar: {walk.cut}" if size else "an empty file")
    keys = [key[:NAME_CHARACTERS].encode("utf-8", "surrogateescape").decode("utf-8", "replace") for key in places]
    columns = zip(*cells, strict=True) if cells else [()] * (2 * len(ROLES))
    table = pa.table([pa.array(v, f.type) for v, f in zip([keys, *columns, faults], INDEX, strict=True)], schema=INDEX)
    rows, held = _groups([BLOCK + sum(c[i] or 0 for i in (1, 3, 5)) for c in cells])
    walk.digest.update(size.to_bytes(8, "little"))
    return Indexed(table, rows, held, walk.cut, walk.digest.hexdigest()[:32])


def _groups(sizes: list[int]) -> tuple[list[int], list[int]]:
    """Rows and bytes of row groups; a sample that is larger than a group stands alone."""
    rows, held = list[int](), list[int]()
    for size in sizes:
        if not rows or held[-1] + size > GROUP_BYTES:
            rows.append(0)
            held.append(0)
        rows[-1] += 1
        held[-1] += size
    return rows, held


def compressed(how: str) -> str:
    """Why a compressed archive is refused."""
    return f"compressed ({how}): samples are read in place, so unpack it to a plain .tar; images hardly compress anyway"
