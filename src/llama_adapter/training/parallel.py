"""What runs the passes of a step: one process, or several that share every step.

An engine knows how gradients are synchronized, how values are summed over processes, and how a
sharded parameter is gathered. The trainer knows nothing else about processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama_adapter.errors import LlamaAdapterError
from llama_adapter.families.vision import pixel_size
from llama_adapter.model import LlamaAdapterForConditionalGeneration


class Communicator(Protocol):
    """A process group; every process calls the same methods in the same order."""

    rank: int
    world_size: int

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of every process's values."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        ...


class Engine(Communicator, Protocol):
    """Where the passes of a step run."""

    module: nn.Module
    """What is called for a forward pass."""

    def sync_gradients(self, is_last: bool) -> AbstractContextManager[Any]:
        """Surrounds a forward and its backward; only the last must synchronize gradients."""
        ...

    def unshard_root(self) -> None:
        """Gather the parameters outside the layers, for work outside of a forward pass."""
        ...

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """The full tensor of one that may be sharded."""
        ...

    def local_shard(self, full: Tensor, like: Tensor) -> Tensor:
        """This process's shard of a full tensor, laid out as `like` is."""
        ...


class SingleProcess:
    """A single process."""

    rank = 0
    world_size = 1

    def __init__(self, model: LlamaAdapterForConditionalGeneration) -> None:
        self.module: nn.Module = model

    def sync_gradients(self, is_last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        return nullcontext()

    def unshard_root(self) -> None:
        pass

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def full_tensor(self, tensor: Tensor) -> Tensor:
        return tensor

    def local_shard(self, full: Tensor, like: Tensor) -> Tensor:
        return full.to(like.device)

    def gather(self, value: Any) -> list[Any]:
        return [value]


def on_rank_0(communicator: Communicator, work: Callable[[], Any]) -> None:
    """Let one process do it; all of them fail if it does."""
    failure: LlamaAdapterError | None = None
    if communicator.rank == 0:
        try:
            work()
        except LlamaAdapterError as error:
            failure = error
    failure = communicator.gather(failure)[0]
    if failure is not None:
        raise failure


def dummy_image(model: LlamaAdapterForConditionalGeneration, input_ids: Tensor) -> dict[str, Any]:
    """An image that no token attends to: the same pass as with an image, and adds zero."""
    assert model.vision is not None
    device = input_ids.device
    return {
        "pixel_values": torch.zeros(1, 3, *pixel_size(model.vision), device=device),
        "image_index": torch.full_like(input_ids, -1),
        "visual_mask": torch.zeros_like(input_ids, dtype=torch.bool),
    }
