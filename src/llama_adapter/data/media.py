"""Finding the images and videos that records name, inside the folder that a recipe names."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_adapter.conversation import ImageRef
from llama_adapter.errors import DataError
from llama_adapter.processing.video import VIDEO_SUFFIXES, is_video

_WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]|[\\/]{2}")
_ABSENT = frozenset((errno.ENOENT, errno.ENOTDIR))


class MediaFolder:
    """Files below a folder; without `outside` no name and no link leads out of it."""

    def __init__(self, path: Path | None, *, outside: bool = False) -> None:
        """`path` None: the source has no images. DataError where the folder does not exist."""
        if path is not None and not path.is_dir():
            raise DataError(f"image folder {path} does not exist")
        self.path = path
        self.outside = outside
        folder = path or Path()
        # the folder's own name too: an absolute path may hold either
        self._roots = (folder.absolute(), folder.resolve())
        self._reached = () if path is None else reached_from(path)

    def image(self, name: Any) -> ImageRef:
        """An image by its name in the folder; DataError if it is not there."""
        return self._find(name, what="image")

    def video(self, name: Any) -> ImageRef:
        """A video by its name in the folder; DataError if it is not there."""
        found = self._find(name, what="video")
        if not is_video(found.source):
            raise DataError(
                f"video {name!r} does not end as a video's name does "
                f"({', '.join(sorted(VIDEO_SUFFIXES - {'.gif'}))})"
            )
        return found

    def _find(self, name: Any, *, what: str) -> ImageRef:
        if isinstance(name, dict) and not name.get("bytes"):
            # as Hugging Face's `datasets` writes an image that is in a file
            name = name.get("path")
        if not isinstance(name, str) or not name:
            raise DataError(f"{what} must be a file name, found {_brief(name)}")
        if self.path is None:
            raise DataError(
                f"shows {what} {_brief(name)}, but the source names no folder of `images`"
            )
        try:
            found = next(self._files(name, what), None)
        except (OSError, ValueError) as error:  # a name that is too long, or has a null byte
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{what} {_brief(name)}: {reason}") from error
        if found is None:
            raise DataError(f"{what} {_brief(name)} is not in {self.path}")
        return ImageRef(source=found, name=str(found))

    def _files(self, name: str, what: str) -> Iterator[Path]:
        """Files that a name may mean: names with folders are also found directly in the folder."""
        assert self.path is not None
        spellings = list(_spellings(name))
        if not self.outside and any(self._leaves(spelling) for spelling in spellings):
            raise self._outside(name, what)
        for spelling in spellings:
            for path in (self.path / spelling, self.path / Path(spelling).name):
                try:
                    mode = path.stat().st_mode
                except OSError as error:
                    if error.errno in _ABSENT:
                        continue
                    raise
                if not stat.S_ISREG(mode):
                    continue
                if not self.outside and not leads_into(path, self._reached):
                    raise self._outside(name, what)
                yield path

    def _leaves(self, spelling: str) -> bool:
        if _WINDOWS_ROOT.match(spelling):
            return True
        wanted = (Path(os.path.normpath(root / spelling)) for root in self._roots)
        return not any(root in path.parents for root, path in zip(self._roots, wanted, strict=True))

    def _outside(self, name: str, what: str) -> DataError:
        return DataError(
            f"{what} {_brief(name)} is outside the folder {self.path}; "
            "it is read only where the source says `images_outside: true`"
        )


def reached_from(folder: Path) -> tuple[Path, ...]:
    """Where links in a folder may lead: into it.

    A snapshot of the Hugging Face hub is made of links to the `blobs` next to `snapshots`.
    """
    root = folder.resolve()
    for inner in (root, *root.parents):
        if inner.parent.name == "snapshots" and (inner.parents[1] / "blobs").is_dir():
            return root, inner.parents[1] / "blobs"
    return (root,)


def leads_into(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a file is below one of the folders, all links followed."""
    parents = path.resolve().parents
    return any(root in parents for root in roots)


def _spellings(name: str) -> Iterator[str]:
    """A name as it stands, with Windows' separators turned, and in Unicode's other forms."""
    seen = {name: None, name.replace("\\", "/"): None}
    for form in ("NFC", "NFD"):
        seen |= dict.fromkeys(unicodedata.normalize(form, known) for known in list(seen))
    yield from seen


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
