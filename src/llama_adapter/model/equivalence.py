"""A base that is declared to stand for another: the same weights before they were quantized.

The directory of an adapter trained on dequantized weights may declare how far those are from the
original ones at most, with a sample of every tensor. A base with another fingerprint is then
compared value by value: what quantization never touches must be equal, all else within the bound.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from llama_adapter.errors import CheckpointError
from llama_adapter.files import write_atomically
from llama_adapter.model.fingerprints import base_values, is_quantized, sampled
from llama_adapter.model.tensor_files import read_header, read_tensors

EQUIVALENCE_NAME = "base_equivalence.safetensors"
_DECLARED, _BOUND = "declared", "bound"


def declare_equivalence(directory: Path, model: Any, *, declared: str, bound: float) -> Path:
    """Write what a base must be close to: `model`, the base that the adapter was trained on, bare.

    `declared` says in words which other weights are meant; `bound` is the largest relative root
    mean square deviation of a tensor's sample. Returns the file's path.
    """
    samples = {
        name: sampled(values).to(torch.float32).contiguous()
        for name, values in base_values(model, unquantized_only=is_quantized(model))
    }
    metadata = {_DECLARED: declared, _BOUND: json.dumps(bound)}
    path = directory / EQUIVALENCE_NAME
    write_atomically(path, save(samples, metadata=metadata))
    return path


@torch.no_grad()
def is_equivalent(model: Any, directory: Path) -> bool:
    """Whether the directory declares an equivalence and `model` keeps it; that it does is said.

    Raises CheckpointError for a declaration that cannot be read, and for a base that is farther
    away than declared.
    """
    path = directory / EQUIVALENCE_NAME
    if not path.is_file():
        return False
    metadata = read_header(path).metadata
    try:
        bound = float(json.loads(metadata[_BOUND]))
        declared = metadata[_DECLARED]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: lacks {_DECLARED} or {_BOUND}") from error
    expected = read_tensors(path)
    found = dict(base_values(model, unquantized_only=is_quantized(model)))
    if not is_quantized(model) and found.keys() != expected.keys():
        raise CheckpointError(f"{path}: declares other tensors than the base has")
    farthest = 0.0
    for name, values in found.items():
        if name not in expected:
            raise CheckpointError(f"{path}: declares nothing about {name}")
        deviation = _deviation(sampled(values), expected[name], is_vector=values.ndim < 2)
        farthest = max(farthest, deviation)
        if not deviation <= bound:
            raise CheckpointError(
                f"{directory} was saved for another base of the same shape, or one that is "
                f"equivalent ({declared}): {name} is {deviation:.2f} of its size away, at most "
                f"{bound:g} is declared"
            )
    warnings.warn(
        f"the base is not the one that {directory.name} was trained on but equivalent to it as "
        f"declared ({declared}): no sampled tensor is more than {farthest:.2f} of its size away",
        stacklevel=2,
    )
    return True


def _deviation(values: Tensor, expected: Tensor, *, is_vector: bool) -> float:
    """Relative root mean square deviation; of a vector, which no quantization touches, 0 or inf."""
    if values.shape != expected.shape:
        return float("inf")
    if is_vector:
        halves = (torch.bfloat16, torch.float16)
        is_same = any(torch.equal(values.to(half), expected.to(half)) for half in halves)
        return 0.0 if is_same else float("inf")
    away = (values.float() - expected).norm()
    return float(away / expected.norm().clamp_min(1e-12))
