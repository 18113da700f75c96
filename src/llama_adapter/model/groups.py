"""The two disjoint groups of trainable parameters (V2 §4.2), declared where each is born."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import ClassVar

from torch import nn

BASE = "base_layer"
"""Name under which an adapter module keeps the frozen module that it wraps."""


class Group(StrEnum):
    """Which of the two losses may move a parameter."""

    VISION = "vision"
    """Visual projection, visual queries, gates of visual prompts: moved by captions."""
    LANGUAGE = "language"
    """Static prompts, their gates, norms, biases, scales, LoRA: moved by instructions."""


class AdapterModule(nn.Module):
    """A module whose parameters, but for the frozen module it wraps, belong to one group."""

    group: ClassVar[Group]

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that training may move, with its name relative to this module."""
        for name, parameter in self.named_parameters():
            if not name.startswith(BASE + "."):
                yield name, parameter

    def folded(self) -> nn.Module | None:
        """A plain module of the base's kind that computes the same, for inference; None if none."""
        return None
