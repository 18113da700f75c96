"""What safetensors files say that they hold, before any of it is read or built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_adapter.config import shown
from llama_adapter.errors import CheckpointError
from llama_adapter.files import open_regular, parse_json, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""Bytes of a header; the limit of the safetensors library."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
                    "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"})  # fmt: skip
"""Names of floating dtypes in a header."""
_LONGEST_NAME = 500
_MOST = 2**48
"""No tensor has more elements."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a file's header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors and its metadata."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file; CheckpointError if it is missing or damaged."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    with open_regular(path, error=CheckpointError) as file:
        rest = path.stat().st_size - 8
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(rest, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is damaged: it is not a safetensors file, or it was cut short"
            )
        text = file.read(length)
    content = parse_json(text, name=f"the header of {path}", error=CheckpointError)
    try:
        metadata = content.pop("__metadata__", None) or {}
        tensors = {name: _stored(entry, rest - length) for name, entry in content.items()}
        too_long = [name for name in tensors if len(name) > _LONGEST_NAME]
        if too_long:
            raise ValueError(f"a name of {len(too_long[0])} characters")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its header has {shown(error)}") from error
    return Header(tensors, metadata)


def _stored(entry: Any, most: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    integers = (begin, end, *shape)
    if any(type(number) is not int or not 0 <= number <= _MOST for number in integers):
        raise ValueError(f"odd integers {shown(integers)}")
    if not begin <= end <= most or math.prod(shape) > _MOST:
        raise ValueError(f"shape {shown(shape)} in {most} bytes")
    if not isinstance(entry["dtype"], str) or len(entry["dtype"]) > 20:
        raise ValueError(f"dtype {shown(entry['dtype'])}")
    return Stored(entry["dtype"], tuple(shape))


def stored_tensors(directory: Path) -> dict[str, Stored] | None:
    """What the safetensors files of a Hugging Face model hold; None where it has none.

    Raises CheckpointError for an index that does not fit its files.
    """
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE).tensors
    if not (directory / INDEX).exists():
        return None
    index = read_json_object(directory / INDEX, error=CheckpointError)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{directory / INDEX} has no weight_map of file names")
    found: dict[str, Stored] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{directory / INDEX} names {name!r}, which is not next to it")
        tensors = read_header(directory / name).tensors
        doubled = sorted(found.keys() & tensors.keys())
        if doubled:
            raise CheckpointError(f"{directory}: tensor {doubled[0]} is in two files")
        found |= tensors
    lacking = sorted(files.keys() - found.keys())
    if lacking:
        raise CheckpointError(
            f"{directory / INDEX} names {lacking[:3]} ({len(lacking)} in all), "
            "which none of its files holds"
        )
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; CheckpointError if it is missing or damaged."""
    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def weight_files(directory: Path) -> dict[str, Path]:
    """In which file of a Hugging Face model each of its `stored_tensors` is."""
    if (directory / SINGLE).exists():
        return dict.fromkeys(read_header(directory / SINGLE).tensors, directory / SINGLE)
    files = read_json_object(directory / INDEX, error=CheckpointError)["weight_map"]
    return {name: directory / file for name, file in files.items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, of which no more is read than is looked at."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def largest_dimension(tensors: Mapping[str, Stored]) -> int:
    """The longest side of any tensor."""
    return max((side for tensor in tensors.values() for side in tensor.shape), default=0)


def not_floating(tensors: Mapping[str, Stored], names: Iterable[str]) -> list[str]:
    """Those of `names` that hold integers or truth values."""
    return sorted(name for name in names if name in tensors and tensors[name].dtype not in FLOATS)
