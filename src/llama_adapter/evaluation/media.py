"""Finding the images and videos that a benchmark's records name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from llama_adapter.data.media import leads_into, reached_from
from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import read_text
from llama_adapter.evaluation.records import Record
from llama_adapter.processing.video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_MAPPING = "youtube_mapping.txt"
_MOST_FILES = 2_000_000


class MediaFolders:
    """Files below some folders, found by the names that records give them.

    Benchmarks name files with and without folders and suffixes; MSVD's own names are translated
    where its `youtube_mapping.txt` lies among the files.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(dict.fromkeys(root.resolve() for root in roots if root.is_dir()))

    @classmethod
    def around(cls, data: Path, media: Path | None = None) -> MediaFolders:
        """The folder named, or the data's own and the one around it."""
        if media is not None:
            if not media.is_dir():
                raise EvaluationError(f"{media}: no such folder of images or videos")
            return cls([media])
        folder = data if data.is_dir() else data.parent
        return cls([folder, folder.resolve().parent])

    def find(self, name: str, *, suffixes: Iterable[str]) -> Path | None:
        """The file of that name, with any of the suffixes where the name has none that is."""
        for root in self.roots:
            path = root / name
            if is_there(path) and path.is_file() and leads_into(path, reached_from(root)):
                return path
        wanted = PurePosixPath(name.replace("\\", "/"))
        stem = wanted.stem if wanted.suffix.lower() in suffixes else wanted.name
        stem = self._aliases.get(stem, stem)
        folders = set(wanted.parts[:-1])
        found = [
            path
            for path in self._by_stem.get(stem, ())
            if path.suffix.lower() in suffixes and folders.issubset(path.parts) and path.is_file()
        ]
        reached = [folder for root in self.roots for folder in reached_from(root)]
        return next((path for path in found if leads_into(path, reached)), None)

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        index: dict[str, list[Path]] = defaultdict(list)
        known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        count = 0
        for root in self.roots:
            for folder, folders, files in os.walk(root):
                folders.sort()
                for name in sorted(files):
                    count += 1
                    path = Path(folder, name)
                    if path.suffix.lower() in known and path not in index[path.stem]:
                        index[path.stem].append(path)
                if count > _MOST_FILES:
                    raise EvaluationError(f"{root}: holds too many files; name the folder: --media")
        return dict(index)

    @cached_property
    def _aliases(self) -> dict[str, str]:
        for root in self.roots:
            path = root / _MAPPING
            if path.is_file():
                pairs = [line.split() for line in read_text(path).splitlines()]
                return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}
        return {}


def is_there(path: Path) -> bool:
    """Whether a file or folder is there; a name that the system cannot take is not one."""
    try:
        return path.exists()
    except OSError:
        return False


def media_of(record: Record, folders: MediaFolders) -> tuple[list[Path], list[str]]:
    """Files of a record in order, and the names of those that are missing."""
    names = [(name, IMAGE_SUFFIXES) for name in record.images]
    if record.video is not None:
        names.append((record.video, VIDEO_SUFFIXES))
    paths, missing = [], []
    for name, suffixes in names:
        path = folders.find(name, suffixes=suffixes)
        if path is None:
            missing.append(name)
        else:
            paths.append(path)
    return paths, missing
