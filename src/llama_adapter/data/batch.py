"""What a training step takes: one micro-batch of one kind, and the position in a stream of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from torch import Tensor

from llama_adapter.data.samples import InvalidRecord, Kind
from llama_adapter.errors import ConfigError

PER_IMAGE = frozenset({"pixel_values", "visual_features"})
"""Inputs that have an entry an image; all others have one a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """This process's rows of one global micro-batch.

    Shape suffixes: B rows, T tokens, I images.
    """

    kind: Kind
    inputs: Mapping[str, Tensor]
    """Keyword arguments of the model's forward. Always `input_ids`, `labels` [B, T]. Packed rows
    hold `position_ids` [B, T], restarted at every sample, and no `attention_mask`: attention is
    then kept within samples by the positions alone, as long as no cache is made (pass
    `use_cache=False`). Padded rows hold `attention_mask`. Where samples have branches, all rows
    hold both, the mask as [B, 1, T, T]. With images: `pixel_values`
    [I, 3, H, W] or `visual_features` [I, P, C], `image_index` [B, T] and, where
    only placeholders read, `visual_mask` [B, T]."""
    sample_ids: tuple[str, ...]
    """Of the samples in these rows, for reports."""
    answer_tokens: int
    """Labels that are scored, in these rows."""
    tokens: int
    """Tokens of samples in these rows; padding is not counted."""
    invalid: tuple[InvalidRecord, ...] = ()
    """Samples of these rows whose image could not be read; nothing of them is scored."""

    def joined(self) -> Self:
        """The rows one after the other as a single row [1, B·T]; for packed rows alone.

        What flash attention needs: it tells samples apart by positions only in a single row.
        """
        if "position_ids" not in self.inputs:
            return self
        if "attention_mask" in self.inputs:
            raise ConfigError(
                "flash attention takes no mask, which samples with several answers need: "
                "set answers: 1, or base.attention: sdpa"
            )
        per_token = {k: v for k, v in self.inputs.items() if k not in PER_IMAGE}
        flat = {name: value.reshape(1, -1) for name, value in per_token.items()}
        return replace(self, inputs={**self.inputs, **flat})

    def to(self, device: Any) -> Self:
        """The same batch on a device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=moved)

    def pin_memory(self) -> Self:
        """The same batch in pinned memory, from where copies to a GPU overlap with its work."""
        pinned = {name: value.pin_memory() for name, value in self.inputs.items()}
        return replace(self, inputs=pinned)


class Batches(Protocol):
    """An endless, exactly resumable stream of batches of one kind; `BatchStream` is one."""

    kind: Kind

    def __iter__(self) -> Self: ...

    def __next__(self) -> TrainBatch: ...

    def share_invalid(self, gather: Callable[[Any], list[Any]]) -> None:
        """Exchange what each process found unreadable; DataError, on all, where it is too much.

        `gather` gives every process's value; all call this together, in steps in which any found
        something.
        """

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out; equal on all ranks."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, whatever the number of ranks or workers was."""

    def close(self) -> None:
        """End worker processes."""
