"""What the frozen vision encoder makes of images, kept on disk: it then looks at each image once.

A folder of safetensors files, each written whole or not at all and read through the memory map.
An image is known by its content, so that copies and renamed files find their features.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llama_adapter.conversation import ImageRef
from llama_adapter.errors import CheckpointError, DataError, TrainingError
from llama_adapter.files import read_json_object, write_atomically
from llama_adapter.model.tensor_files import read_header
from llama_adapter.processing.prompts import frames_of

FEATURES = "features"
_FILES = "files.json"
_FILES_BYTES = 1 << 30  # some 120 for each image


class Entry(NamedTuple):
    """Where the features of an image are."""

    path: Path
    first: int
    frames: int
    """Of a video; 0 for a still image, which takes one row."""


class Computed(NamedTuple):
    """New features of one image."""

    key: str
    frames: int
    features: Tensor
    """[P, C], or [F, P, C] of a video."""


class FeatureCache:
    """Features of images in one folder, in one dtype; for one encoder and image processor.

    Shape suffixes: F frames, P patches, C channels.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self._entries: dict[str, Entry] = {}
        self._known: set[Path] = set()
        self._files: dict[str, list[Any]] = {}
        self._open: dict[Path, Tensor] = {}
        self.reload()

    def reload(self) -> None:
        """Look for what other processes wrote."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._known:
                self._known.add(path)
                try:
                    self._list(path)
                except (CheckpointError, ValueError, KeyError, TypeError) as error:
                    warnings.warn(f"features of images are computed again: {error}", stacklevel=2)
        if (self.folder / _FILES).exists():
            try:
                self._files |= read_json_object(
                    self.folder / _FILES, error=CheckpointError, limit=_FILES_BYTES
                )
            except CheckpointError as error:
                warnings.warn(f"images are read again for their keys: {error}", stacklevel=2)

    def _list(self, path: Path) -> None:
        header = read_header(path)
        rows = header.tensors[FEATURES].shape[0]
        first = 0
        entries = {}
        for key, frames in json.loads(header.metadata["images"]):
            entries[str(key)] = Entry(path, first, int(frames))
            first += max(1, int(frames))
        if first != rows:
            raise ValueError(f"{path} is damaged: it lists {first} rows and holds {rows}")
        self._entries |= entries

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def key(self, ref: ImageRef) -> str:
        """What an image is known by; nothing is decoded where that can be avoided."""
        if ref.key:
            return _digest(b"key", ref.key.encode())
        source = ref.source
        if isinstance(source, Path):
            return self._key_of_file(source)
        if isinstance(source, bytes):
            return _digest(b"bytes", source)
        if isinstance(source, tuple):
            keys = (self.key(ImageRef.of(frame)) for frame in source)
            return _digest(b"frames", "".join(keys).encode())
        [image] = frames_of(ref)
        return _digest(f"{image.mode} {image.size}".encode(), image.tobytes())

    def _key_of_file(self, path: Path) -> str:
        """By its bytes, which are read again where size or time of the file have changed."""
        try:
            stat = path.stat()
            known = self._files.get(str(path))
            if known is not None and known[:2] == [stat.st_size, stat.st_mtime_ns]:
                return str(known[2])
            key = _digest(b"bytes", path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        self._files[str(path)] = [stat.st_size, stat.st_mtime_ns, key]
        return key

    def remember_files(self) -> None:
        """Keep which file has which content, so that the next run reads none of them."""
        self._write(self.folder / _FILES, json.dumps(self._files).encode())

    def read(self, images: Iterable[ImageRef]) -> Tensor:
        """Features [I, P, C] of images in float32, or [I, F, P, C] where one is a video.

        Raises ImageError or DataError where there are none: the image cannot be read, or has
        changed since.
        """
        found = [self._read_one(ref) for ref in images]
        frames = max((len(features) for features in found if features.ndim == 3), default=0)
        if frames:
            found = [f if f.ndim == 3 else f.expand(frames, *f.shape) for f in found]
        if len({f.shape for f in found}) > 1:
            raise DataError("a sample must hold equally many frames an image")
        # one by one: under autocast a CPU stacks no float16
        return torch.stack([features.float() for features in found])

    def _read_one(self, ref: ImageRef) -> Tensor:
        entry = self._entries.get(self.key(ref))
        if entry is None:
            frames_of(ref)  # says why, where it cannot be read
            raise DataError(f"{ref.name} has changed since its features were computed")
        if entry.path not in self._open:
            try:
                with safe_open(entry.path, framework="pt") as file:
                    self._open[entry.path] = file.get_tensor(FEATURES)
            except (OSError, SafetensorError) as error:
                raise DataError(f"cannot read {entry.path}: {error}") from error
        rows = self._open[entry.path]
        if not entry.frames:
            return rows[entry.first]
        return rows[entry.first : entry.first + entry.frames]

    def add(self, computed: Sequence[Computed]) -> None:
        """Write new features as one more file.

        Raises TrainingError where they cannot be written or do not fit the cache's dtype.
        """
        rows = torch.cat([c.features if c.frames else c.features[None] for c in computed])
        rows = rows.to("cpu", self.dtype).contiguous()
        if not rows.isfinite().all():
            raise TrainingError(
                f"features of images are not finite in {str(self.dtype).removeprefix('torch.')}; "
                "set vision.cache_dtype to float32"
            )
        listed = json.dumps([[c.key, c.frames] for c in computed])
        content = save({FEATURES: rows}, metadata={"images": listed})
        self._write(self.folder / f"{uuid.uuid4().hex[:12]}.safetensors", content)

    def _write(self, path: Path, content: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise TrainingError(f"cannot write {path}: {error.strerror}") from error


def _digest(kind: bytes, content: bytes) -> str:
    return hashlib.sha256(kind + b"\0" + content).hexdigest()[:32]
