"""WebDataset shards: tar files of pictures and texts that share a name, local or remote.

Shards are listed once, at their headers; members are then read where they lie. Remote shards
are read through fsspec, a header or a member at a time.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_adapter.conversation import ImageRef
from llama_adapter.data.captions import CaptionOptions, caption_sample
from llama_adapter.data.samples import Kind, Sample
from llama_adapter.errors import DataError, MissingDependencyError, PromptError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "img")
TEXT_ENDINGS = ("txt", "caption", "text", "json")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class WebDatasetOptions(CaptionOptions):
    """Tar shards: `shards-{0000..0012}.tar`, `shards-*.tar`, or a list; paths or fsspec URLs."""

    path: str | tuple[str, ...]
    caption_key: str = "caption"
    """Which key holds the caption, where texts are JSON."""

    def open(self, kind: Kind) -> ShardSource:
        return ShardSource(self, kind)


class ShardSource:
    """One sample a pair of picture and text; only places and names' hashes stay in memory."""

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
        rows = [(i, *pair) for i, shard in enumerate(self.shards) for pair in _pairs(shard)]
        if not rows:
            raise DataError(
                f"{self.shards[0]} holds no picture with a text of the same name "
                f"(.{', .'.join(IMAGE_ENDINGS)} beside .{', .'.join(TEXT_ENDINGS)})"
            )
        self._shard = np.array([row[0] for row in rows], dtype=np.int32)
        # first byte and length of the picture, first byte and length of the text
        self._places = np.array([row[1:5] for row in rows], dtype=np.int64)
        self._is_json = np.array([row[5] for row in rows], dtype=bool)

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        image_at, image_size, text_at, text_size = map(int, self._places[index])
        try:
            if image_size == 0 or text_size == 0:
                raise DataError("has no picture" if image_size == 0 else "has no text")
            shard = self.shards[int(self._shard[index])]
            text = _read(shard, text_at, text_size).decode()
            caption: Any = text
            if self._is_json[index]:
                record = json.loads(text)
                caption = record.get(self.options.caption_key) if isinstance(record, dict) else None
                if caption is None:
                    raise DataError(f"its JSON lacks {self.options.caption_key!r}")
            image = ImageRef(source=_read(shard, image_at, image_size), name=where)
            return caption_sample(
                image,
                caption,
                number=index,
                where=where,
                kind=self.kind,
                questions=self.options.questions,
            )
        except (DataError, PromptError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: {error}") from error

    def where(self, index: int) -> str:
        shard = self.shards[int(self._shard[index])]
        place = max(0, int(self._places[index, 0]) or int(self._places[index, 2]))
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
        return [s for n in numbers for s in _expand(f"{before}{n:0{len(low)}d}{after}")]
    if "://" in pattern:
        return [pattern]
    path = Path(pattern)
    shards = sorted(map(str, path.parent.glob(path.name))) if "*" in path.name else [pattern]
    missing = next((shard for shard in shards if not Path(shard).is_file()), None)
    if not shards or missing:
        raise DataError(f"no shard {missing or pattern}")
    return shards


def _read(shard: str, start: int, length: int) -> bytes:
    """Bytes of a shard; nothing stays open."""
    try:
        if "://" in shard:
            filesystem, path = _filesystem(shard)
            data: bytes = filesystem.cat_file(path, start=start, end=start + length)
        else:
            with open(shard, "rb") as file:  # noqa: PTH123 (a name, as URLs are)
                file.seek(start)
                data = file.read(length)
    except OSError as error:
        raise DataError(f"cannot read {shard}: {error}") from error
    if len(data) != length:
        raise DataError(f"{shard} ends at byte {start + len(data)}")
    return data


def _open(shard: str) -> BinaryIO:
    if "://" not in shard:
        return open(shard, "rb")  # noqa: PTH123
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


def _pairs(shard: str) -> Iterator[tuple[int, int, int, int, bool]]:
    """Places of picture and text of each sample; a missing half has length 0."""
    current: str | None = None
    half: dict[str, tuple[int, int, bool]] = {}

    def pair() -> Iterator[tuple[int, int, int, int, bool]]:
        if half:
            image, text = half.get("image", (0, 0, False)), half.get("text", (0, 0, False))
            yield *image[:2], *text[:2], text[2]

    with _open(shard) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    ending = ending.lower()
                    what = _what(ending)
                    if not member.isfile() or what is None:
                        continue
                    key = f"{folder}/{stem}"
                    if key != current:
                        yield from pair()
                        current, half = key, {}
                    # plain text goes before JSON, where a sample has both
                    if what not in half or half[what][2]:
                        is_json = ending.endswith("json")
                        half[what] = (member.offset_data, member.size, is_json)
                    archive.members = []  # type: ignore[attr-defined]  # or it remembers them all
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{shard} is no readable tar file: {error}") from error
    yield from pair()


def _what(ending: str) -> str | None:
    last = ending.rpartition(".")[2]
    return "image" if last in IMAGE_ENDINGS else "text" if last in TEXT_ENDINGS else None
