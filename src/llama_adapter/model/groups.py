"""The two disjoint groups of trainable parameters (V2 §4.2), declared where each is born."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import ClassVar, NamedTuple

from torch import nn


class Group(StrEnum):
    """Which of the two losses may move a parameter."""

    VISION = "vision"
    """Visual projection, visual queries, gates of visual prompts: moved by captions."""
    LANGUAGE = "language"
    """Static prompts, their gates, norms, biases, scales, LoRA: moved by instructions."""


class Role(StrEnum):
    """What a trainable tensor does."""

    PROMPT = "static prompts"
    GATE = "gates"
    BIAS = "biases"
    SCALE = "scales"
    LORA = "LoRA"
    NORM = "norms"
    PROJECTION = "visual projection"


class Trainable(NamedTuple):
    """A parameter that training may move."""

    name: str
    """In adapter files, behind the name of its module."""
    parameter: nn.Parameter
    role: Role
    is_matrix: bool = False
    """Whether it is the weight of a linear that is trained whole."""


class AdapterModule(nn.Module):
    """A module whose parameters, but for the frozen module it wraps, belong to one group."""

    group: ClassVar[Group]
    tensors: ClassVar[Mapping[str, tuple[str, Role]]] = {}
    """Name in adapter files and role of each trainable attribute, which may be None."""

    def trainables(self) -> Iterator[Trainable]:
        """Every parameter that training may move."""
        for attribute, (name, role) in self.tensors.items():
            parameter = getattr(self, attribute)
            if parameter is not None:
                yield Trainable(name, parameter, role)

    def merged(self) -> nn.Module | None:
        """A plain module of the base's kind that computes the same, for inference; None if none."""
        return None
