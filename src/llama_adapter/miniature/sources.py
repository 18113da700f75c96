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
from llama_adapter.miniature.captions import NEXT_TEXT, passage
from llama_adapter.miniature.instructions import sample_instruction, sample_talk, sample_task
from llama_adapter.miniature.rendering import SceneImage
from llama_adapter.miniature.scenes import Scene, Split, sample_scene


class MiniatureOptions(SourceOptions):
    """What both miniature sources share."""

    count: int = Field(default=4000, ge=1)
    """How many samples there are."""
    seed: int = 0
    split: Literal["train", "test"] = "train"
    """`test`: every scene holds a shape in a color that training never shows it in."""


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
    """Images of scenes, each with one of the ways to describe it."""

    images: int | None = Field(default=None, ge=1)
    """How many different images there are: sample n shows image n modulo `images`. None: every
    sample shows its own."""
    caption_weight: float = Field(default=4.0, gt=0)
    """How often the full caption is asked for, against 1 for every other way to describe."""
    unnamed_color_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the images in colors without a name, described by all but their colors. In named
    colors nothing green is ever a circle in training, so color would tell shapes apart."""
    text_share: float = Field(default=0.15, ge=0, le=1)
    """Share of the samples with a text about another scene, which is described instead: the image
    must not drown what is read next to it."""
    size: int = Field(default=64, ge=16)
    """Pixels along a side of an image."""

    def open(self, kind: Kind) -> MiniatureCaptions:
        return MiniatureCaptions(self, kind, name="miniature_captions")


class MiniatureCaptions(MiniatureSource):
    """No sample holds a question about an image: descriptions alone."""

    options: MiniatureCaptionsOptions

    def draw(self, index: int, rng: random.Random) -> Conversation:
        scene, image = self._image(index % self._num_images)
        if rng.random() < self.options.text_share:
            return self._text_next_to(image, rng)
        task = sample_task(
            rng,
            caption_weight=self.options.caption_weight,
            names_colors=not image.source.unnamed_colors,
        )
        return Conversation.ask(
            rng.choice(task.instructions), images=[image], answer=task.write(scene, rng)
        )

    @property
    def _num_images(self) -> int:
        return min(self.options.images or len(self), len(self))

    def _image(self, number: int) -> tuple[Scene, ImageRef]:
        """An image with its scene; drawn when its pixels are wanted."""
        options = self.options
        name = f"{self.name}/{options.seed}/{options.split}/image/{number}"
        rng = random.Random(name)
        image = SceneImage(
            scene=sample_scene(rng, split=self.split),
            seed=options.seed,
            index=number,
            size=options.size,
            unnamed_colors=rng.random() < options.unnamed_color_share,
        )
        return image.scene, ImageRef(source=image, name=name, key=repr(image))

    def _text_next_to(self, image: ImageRef, rng: random.Random) -> Conversation:
        """A text to describe, asked for in words that do not mean the image."""
        scene, task = sample_scene(rng, split=self.split), sample_task(rng)
        wordings = [w for w in task.instructions if "picture" not in w and "see" not in w]
        return Conversation.ask(
            rng.choice(wordings),
            images=[image],
            context=passage(scene, rng),
            answer=task.write(scene, rng),
        )

    def groups(self) -> np.ndarray | None:
        return np.arange(len(self)) % self._num_images


class MiniatureInstructionsOptions(MiniatureOptions):
    """Questions about passages of text, and talks of several turns."""

    talk_share: float = Field(default=0.1, ge=0, le=1)
    """Share of multi-turn talks."""
    distractor_share: float = Field(default=0.45, ge=0, le=1)
    """Share of the passages that follow another scene's passage: the last one counts."""

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
        context = drawn.context
        if context is not None and rng.random() < self.options.distractor_share:
            context = f"{passage(sample_scene(rng, split=self.split), rng)} {NEXT_TEXT} {context}"
        return Conversation.ask(drawn.instruction, context=context, answer=drawn.answer)


SOURCES_WITH_MINIATURES: Mapping[str, type[SourceOptions]] = {
    **SOURCES,
    "miniature_captions": MiniatureCaptionsOptions,
    "miniature_instructions": MiniatureInstructionsOptions,
}
"""Every source type that the command line knows."""
