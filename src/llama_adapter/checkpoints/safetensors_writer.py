"""Writing safetensors files as a stream: one tensor in memory at a time.

`safetensors.torch.save_file` wants all tensors of a file at once, and copies them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

CHUNK_BYTES = 2**20
"""Bytes per call: one call for a whole tensor took eight times the processor time on Linux 6."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor that is still to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be written."""
    return dtype in _NAMES


def split_into_files(specs: Iterable[TensorSpec], *, max_bytes: int) -> list[list[TensorSpec]]:
    """Specs in order, in groups of at most `max_bytes` (or one tensor)."""
    files: list[list[TensorSpec]] = []
    size = max_bytes + 1
    for spec in specs:
        if size + spec.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.num_bytes
    return files


def file_names(number: int) -> list[str]:
    """The names that transformers gives a model in one or more files."""
    if number == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]


def write_index(directory: Path, files: list[list[TensorSpec]]) -> None:
    """The index that tells which file holds which tensor; none for a single file."""
    if len(files) == 1:
        return
    names = file_names(len(files))
    index = {
        "metadata": {"total_size": sum(s.num_bytes for specs in files for s in specs)},
        "weight_map": {s.name: names[i] for i, specs in enumerate(files) for s in specs},
    }
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n")


class SafetensorsWriter:
    """Writes the tensors of `specs`, in that order, as they are handed over."""

    def __init__(self, path: Path, specs: list[TensorSpec]) -> None:
        self.specs = list(specs)
        self._next = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.num_bytes],
            }
            offset += spec.num_bytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file = path.open("wb", buffering=0)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, *pieces: Tensor) -> None:
        """Append the next tensor, whole or as its rows in several pieces."""
        spec = self.specs[self._next]
        assert sum(piece.numel() for piece in pieces) == prod(spec.shape), spec.name
        assert all(piece.dtype == spec.dtype for piece in pieces), spec.name
        self._next += 1
        for piece in pieces:
            self._append(memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _append(self, content: memoryview) -> None:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            while chunk:
                chunk = chunk[self._file.write(chunk) :]

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        assert kind is not None or self._next == len(self.specs)
