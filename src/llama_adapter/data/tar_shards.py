"""WebDataset shards: tar files of images and texts that share a name, local or remote.

Shards are listed once, at their headers; members are then read where they lie. Remote shards
are read through fsspec, a header or a member at a time. No link in a shard is followed.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_adapter.conversation import ImageRef
from llama_adapter.data.captions import CaptionOptions, caption_sample
from llama_adapter.data.samples import Kind, Sample, placed
from llama_adapter.errors import DataError, MissingDependencyError, PromptError
from llama_adapter.files import open_regular, parse_json

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "img")
TEXT_ENDINGS = ("txt", "caption", "text", "json")
MAX_MEMBER_BYTES = 1 << 28
"""Bytes of an image or a text in a shard; larger ones are not read."""
MAX_SHARDS = 1_000_000
"""Shards that a pattern may mean."""
_MAX_HEADER_BYTES = 1 << 26
_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
# In place of a text or an image: nothing, or something that cannot be read.
_ABSENT, _TWICE, _LINK, _SPARSE = 0, -1, -2, -3
_FAULTS = {
    _ABSENT: "has no {what}",
    _TWICE: "has several {what}s of one name",
    _LINK: "its {what} is a link, and links in shards are not followed",
    _SPARSE: "its {what} is stored with holes (a sparse member)",
}


class WebDatasetOptions(CaptionOptions):
    """Tar shards: `shards-{0000..0012}.tar`, `shards-*.tar`, or a list; paths or fsspec URLs."""

    path: str | tuple[str, ...]
    caption_key: str = "caption"
    """Which key holds the caption, where texts are JSON."""

    def open(self, kind: Kind) -> ShardSource:
        return ShardSource(self, kind)


class ShardSource:
    """One sample for each name; only the places of its image and its text stay in memory."""

    def __init__(self, options: WebDatasetOptions, kind: Kind) -> None:
        self.options = options
        self.kind = kind
        patterns = (options.path,) if isinstance(options.path, str) else options.path
        self.shards = [shard for pattern in patterns for shard in _expand(pattern)]
        if not self.shards:
            raise DataError(f"webdataset: path {options.path!r} means no shard")
        self.name = f"webdataset {Path(self.shards[0]).name}"
        if len(self.shards) > 1:
            self.name += f" and {len(self.shards) - 1} more"
        rows = [(i, *row) for i, shard in enumerate(self.shards) for row in _samples(shard)]
        if not any(size > 0 and text > 0 for _, _, size, _, text, _ in rows):
            raise DataError(
                f"{self.shards[0]} holds no image with a text of the same name "
                f"(.{', .'.join(IMAGE_ENDINGS)} next to .{', .'.join(TEXT_ENDINGS)})"
            )
        self._shard = np.array([row[0] for row in rows], dtype=np.int64)
        # first byte and length of the image, first byte and length of the text
        self._places = np.array([row[1:5] for row in rows], dtype=np.int64)
        self._is_json = np.array([row[5] for row in rows], dtype=bool)

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        image_at, image_size, text_at, text_size = map(int, self._places[index])
        try:
            shard = self.shards[int(self._shard[index])]
            text = _member(shard, text_at, text_size, what="text").decode("utf-8-sig")
            caption: Any = text
            if self._is_json[index]:
                record = parse_json(text, name="its JSON", error=DataError)
                caption = record.get(self.options.caption_key) if isinstance(record, dict) else None
                if caption is None:
                    raise DataError(f"its JSON lacks {self.options.caption_key!r}")
            pixels = _member(shard, image_at, image_size, what="image")
            image = ImageRef(source=pixels, name=where)
            return caption_sample(
                image,
                caption,
                number=index,
                where=where,
                kind=self.kind,
                questions=self.options.questions,
            )
        except (DataError, PromptError, UnicodeDecodeError) as error:
            raise placed(error, where) from error

    def where(self, index: int) -> str:
        shard = self.shards[int(self._shard[index])]
        places = [int(place) for place in self._places[index, [0, 2]] if place > 0]
        place = min(places, default=0)
        return f"{shard}:byte {place}"

    def groups(self) -> np.ndarray | None:
        return None

    def fingerprint(self) -> str:
        local = [Path(shard).stat() for shard in self.shards if "://" not in shard]
        versions = [(status.st_size, status.st_mtime_ns) for status in local]
        return f"{self.options!r}{self.shards}{versions}{self._places[-1].tolist()}{len(self)}"


def _expand(pattern: str) -> list[str]:
    """Shards that a pattern means; DataError if there are none."""
    found = _BRACES.search(pattern)
    if found:
        low, high = found.groups()
        numbers = range(int(low), int(high) + 1)
        before, after = pattern[: found.start()], pattern[found.end() :]
        shards: list[str] = []
        for number in numbers:
            shards += _expand(f"{before}{number:0{len(low)}d}{after}")
            if len(shards) > MAX_SHARDS:
                raise DataError(f"{pattern[:200]!r} means more than {MAX_SHARDS} shards")
        return shards
    if "://" in pattern:
        return [pattern]
    path = Path(pattern)
    shards = sorted(map(str, path.parent.glob(path.name))) if "*" in path.name else [pattern]
    missing = next((shard for shard in shards if not Path(shard).exists()), None)
    if not shards or missing:
        raise DataError(f"no shard {missing or pattern}")
    for shard in shards:
        open_regular(Path(shard), error=DataError).close()
    return shards


def _member(shard: str, start: int, length: int, *, what: str) -> bytes:
    """The content of a member; DataError for one that is absent, a link or too large."""
    if length in _FAULTS:
        raise DataError(_FAULTS[length].format(what=what))
    if length > MAX_MEMBER_BYTES:
        raise DataError(f"its {what} has {length} bytes, at most {MAX_MEMBER_BYTES} are read")
    return _read(shard, start, length)


def _read(shard: str, start: int, length: int) -> bytes:
    """Bytes of a shard; nothing stays open."""
    try:
        if "://" in shard:
            filesystem, path = _filesystem(shard)
            data: bytes = filesystem.cat_file(path, start=start, end=start + length)
        else:
            with open_regular(Path(shard), error=DataError) as file:
                file.seek(start)
                data = file.read(length)
    except OSError as error:
        raise DataError(f"cannot read {shard}: {error}") from error
    if len(data) != length:
        raise DataError(f"{shard} ends at byte {start + len(data)}")
    return data


def _open(shard: str) -> BinaryIO:
    if "://" not in shard:
        return open_regular(Path(shard), error=DataError)
    filesystem, path = _filesystem(shard)
    try:
        opened: BinaryIO = filesystem.open(path, "rb")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {shard}: {error}") from error
    return opened


def _filesystem(shard: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingDependencyError("fsspec", extra="train", purpose=f"reading {shard}") from error
    try:
        filesystem, path = url_to_fs(shard)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot open {shard}: {error}") from error
    return filesystem, path


Row = tuple[int, int, int, int, bool]
"""First byte and length of a sample's image and of its text, and whether the text is JSON."""


@dataclass(slots=True)
class _Sample:
    """Members that share a name, as they are found one after the other."""

    key: str = ""
    names: set[str] = field(default_factory=set)
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def row(self) -> Row:
        """Plain text goes before JSON, and `x.png` before `x.mask.png`."""
        is_json = bool(self.texts) and all(ending.endswith("json") for ending in self.texts)
        plain = {e: place for e, place in self.texts.items() if is_json or not e.endswith("json")}
        return (*_one_of(self.images), *_one_of(plain), is_json)


def _one_of(found: dict[str, tuple[int, int]]) -> tuple[int, int]:
    simple = {ending: place for ending, place in found.items() if "." not in ending} or found
    if not simple:
        return 0, _ABSENT
    first = next(iter(simple.values()))
    return first if len(simple) == 1 else (first[0], _TWICE)


def _samples(shard: str) -> Iterator[Row]:
    """Where image and text of each sample are; members of one name are samples of their own."""
    current = _Sample()
    for member in _members(shard):
        folder, _, name = member.name.rpartition("/")
        if member.isdir() or name.startswith((".", "__")):
            continue  # as WebDataset does, and for what macOS adds to each file
        stem, _, ending = name.partition(".")
        key, ending = f"{folder}/{stem}", ending.lower()
        if key != current.key or member.name in current.names:
            if current.names:
                yield current.row()
            current = _Sample(key=key)
        current.names.add(member.name)
        place = (member.offset_data, member.size)
        if not member.isfile():
            place = (member.offset, _LINK)
        elif member.issparse():
            place = (member.offset, _SPARSE)
        what = _what(ending)
        if what is not None:
            (current.images if what == "image" else current.texts)[ending] = place
    if current.names:
        yield current.row()


def _members(shard: str) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar file; DataError where it is damaged or goes on behind its end."""
    with _open(shard) as file:
        try:
            bounded: Any = _Bounded(file)
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                for member in archive:
                    yield member
                    archive.members = []  # type: ignore[attr-defined]  # or it remembers them all
                _check_end(file, archive.offset)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise DataError(f"{shard} is not a readable tar file: {error}") from error


def _check_end(file: BinaryIO, offset: int) -> None:
    """ReadError unless there are only zeros from here on: tarfile stops at damage in silence."""
    file.seek(offset)
    for _ in range(_MAX_HEADER_BYTES >> 20):
        block = file.read(1 << 20)
        if block.count(0) < len(block):
            raise tarfile.ReadError(f"damaged, or more follows its end, at byte {offset}")
        if not block:
            return
        offset += len(block)
    raise tarfile.ReadError(f"more than {_MAX_HEADER_BYTES} zeros behind its end")


class _Bounded:
    """A file of which tarfile reads no more at a time than a header has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """As the file's own."""
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _what(ending: str) -> str | None:
    last = ending.rpartition(".")[2]
    return "image" if last in IMAGE_ENDINGS else "text" if last in TEXT_ENDINGS else None
