"""What a block builds: a refusal that comes before anything is built makes no large tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST_BUILT = 100_000
"""Entries of a tensor; the largest of the tiny models' own is smaller."""


@contextmanager
def built_tensors() -> Iterator[list[int]]:
    """The number of entries of every tensor that an operation gives within the block.

    Tensors on meta have no entries and do not count.
    """
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result.is_meta:
                sizes.append(result.numel())
            return result

    with Sizes():
        yield sizes
