"""What a released file held beyond the adapter, kept for writing it back bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_adapter.checkpoints.released import Kind
from llama_adapter.errors import CheckpointError
from llama_adapter.files import parse_json
from llama_adapter.model.tensor_files import read_header, read_tensors

EXTRAS_NAME = "released_extras.safetensors"
"""Tensors without effect here; the rest is in its metadata."""
_KEY = "released"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The released file that an adapter was imported from."""

    kind: Kind
    is_wrapped: bool
    """Whether it was `{"model": tensors, ...}`."""
    config: dict[str, Any] | None
    """Its `config`."""
    dtypes: dict[str, str]
    """Its tensors in their order, with their dtypes."""
    absent: tuple[str, ...]
    """Tensors that it lacked and the base filled in."""


def write_extras(directory: Path, origin: Origin, tensors: dict[str, Tensor]) -> None:
    """Write the file; safetensors of no tensors would be one that nothing can read."""
    metadata = {"format": "pt", _KEY: json.dumps(asdict(origin))}
    save_file(tensors or {"_": torch.zeros(0)}, directory / EXTRAS_NAME, metadata=metadata)


def read_origin(directory: Path) -> Origin | None:
    """Where an adapter came from; None for one that was not imported.

    Raises CheckpointError if the file is damaged.
    """
    path = directory / EXTRAS_NAME
    if not path.exists():
        return None
    text = read_header(path).metadata.get(_KEY, "{}")
    content = parse_json(text, name=f"the metadata of {path}", error=CheckpointError)
    try:
        origin = Origin(**{**content, "kind": Kind(content["kind"]),
                           "absent": tuple(content["absent"])})  # fmt: skip
        fits = (
            isinstance(origin.is_wrapped, bool)
            and isinstance(origin.config, dict | None)
            and all(isinstance(getattr(torch, d), torch.dtype) for d in origin.dtypes.values())
            and all(isinstance(name, str) for name in origin.absent)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata has {error!r}") from error
    if not fits:
        raise CheckpointError(f"{path} is damaged: its metadata does not describe a released file")
    return origin


def read_extras(directory: Path) -> dict[str, Tensor]:
    """The tensors of the file."""
    return read_tensors(directory / EXTRAS_NAME)
