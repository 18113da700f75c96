"""The miniature world as sources of training data: nothing is stored, every sample is drawn.

Sample number n is always the same one for the same seed.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.data import SOURCES, Kind, Sample, SourceOptions
from llama_adapter.miniature.instructions import sample_instruction, sample_talk, sample_task
from llama_adapter.miniature.pictures import picture
from llama_adapter.miniature.scenes import Split, sample_scene


class MiniatureOptions(SourceOptions):
    """What both miniature sources share."""

    count: int = Field(default=4000, ge=1)
    """How many samples there are."""
    seed: int = 0
    split: Literal["train", "test"] = "train"
    """`test`: every scene holds a shape in a colour that training never shows it in."""


class MiniatureSource(ABC):
    """Samples drawn by number."""

    def __init__(self, options: MiniatureOptions, kind: Kind, *, name: str) -> None:
        self.options = options
        self.kind = kind
        self.name = name
        self.split = Split(options.split)

    def __len__(self) -> int:
        return self.options.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = random.Random(f"{self.name}/{self.options.seed}/{self.options.split}/{index}")
        conversation = self.draw(index, rng)
        return Sample(id=self.where(index), kind=self.kind, conversation=conversation)

    @abstractmethod
    def draw(self, index: int, rng: random.Random) -> Conversation:
        """The conversation of one sample."""

    def where(self, index: int) -> str:
        return f"{self.name}:{index + 1}"

    def groups(self) -> np.ndarray | None:
        return None

    def fingerprint(self) -> str:
        return f"{self.name}{self.options!r}"


class MiniatureCaptionsOptions(MiniatureOptions):
    """Pictures of scenes, each with one of the ways to describe it."""

    caption_weight: float = Field(default=4.0, gt=0)
    """How often the full caption is asked for, against 1 for every other way to describe."""
    size: int = Field(default=64, ge=16)
    """Pixels along a side of a picture."""

    def open(self, kind: Kind) -> MiniatureCaptions:
        return MiniatureCaptions(self, kind, name="miniature_captions")


class MiniatureCaptions(MiniatureSource):
    """No sample holds a question about a picture: descriptions alone."""

    options: MiniatureCaptionsOptions

    def draw(self, index: int, rng: random.Random) -> Conversation:
        scene = sample_scene(rng, split=self.split)
        task = sample_task(rng, caption_weight=self.options.caption_weight)
        drawn = picture(scene, seed=self.options.seed, index=index, size=self.options.size)
        return Conversation.ask(
            rng.choice(task.instructions),
            images=[ImageRef(source=drawn, name=self.where(index))],
            answer=task.write(scene, rng),
        )


class MiniatureInstructionsOptions(MiniatureOptions):
    """Questions about passages of text, and talks of several turns."""

    talk_share: float = Field(default=0.1, ge=0, le=1)
    """Share of multi-turn talks."""

    def open(self, kind: Kind) -> MiniatureInstructions:
        return MiniatureInstructions(self, kind, name="miniature_instructions")


class MiniatureInstructions(MiniatureSource):
    """Text alone."""

    options: MiniatureInstructionsOptions

    def draw(self, index: int, rng: random.Random) -> Conversation:  # noqa: ARG002
        if rng.random() < self.options.talk_share:
            talk = sample_talk(rng, split=self.split)
            (question, answer), *later = talk.turns
            conversation = Conversation.ask(question, context=talk.context, answer=answer)
            for question, answer in later:
                conversation = conversation.user(question).assistant(answer)
            return conversation
        drawn = sample_instruction(rng, split=self.split)
        return Conversation.ask(drawn.instruction, context=drawn.context, answer=drawn.answer)


SOURCES_WITH_MINIATURES: Mapping[str, type[SourceOptions]] = {
    **SOURCES,
    "miniature_captions": MiniatureCaptionsOptions,
    "miniature_instructions": MiniatureInstructionsOptions,
}
"""Every source type that the command line knows."""
