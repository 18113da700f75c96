"""Sources made from any file of captions by rule, without a question about an image.

`caption_tasks` shows an image and asks for its captions in many forms. `caption_questions` is text
alone: captions take the place of an image, and questions about them, and the same forms, are asked
of the text. What answers questions about a text there can answer them about an image in the same
place, though no question about an image is ever trained on.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import Field

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.data.caption_facts import sentence_of
from llama_adapter.data.caption_forms import SENTENCE, write_form
from llama_adapter.data.caption_questions import Asked, ask_about
from llama_adapter.data.captions import CaptionSource, CocoOptions
from llama_adapter.data.samples import Kind, Sample, SourceOptions, placed
from llama_adapter.errors import DataError, PromptError

TEXT_MARK = "Text:"
"""Precedes a text next to an image, or next to a description in the image's place."""
_DRAWS = 3
"""Counts up whenever the same seed draws other samples: lengths kept by a run are theirs."""


class CaptionTextOptions(SourceOptions):
    """What both share: any file that `coco_captions` reads."""

    path: Path
    split: str | tuple[str, ...] | None = None
    """Only records with this `split`, where the file has one."""
    ignore: tuple[str, ...] = ()
    """Keys that are not needed; other unknown ones are refused."""
    per_image: int = Field(default=5, ge=1, le=1000)
    """Samples made of the captions of one image."""
    answers: int = Field(default=1, ge=1, le=100)
    """Answers in one sample, each to a prompt of its own, drawn in the same way. What their
    prompts begin with, the image above all, is computed once for all of them: many more are
    learned in the same time (`docs/speed.md`)."""
    seed: int = 0
    caption_weight: float = Field(default=3.0, gt=0)
    """How often a whole caption is asked for, against 1 for every other form."""


class CaptionTextSource(ABC):
    """`per_image` samples of each image; sample n is always the same for the same seed."""

    def __init__(self, captions: CaptionSource, options: CaptionTextOptions, kind: Kind) -> None:
        self.captions = captions
        self.options = options
        self.kind = kind
        self.name = f"{self._type} {options.path.name}"
        self._apart: frozenset[int] = frozenset()

    _type: str

    def keep_apart(self, held_out: np.ndarray, /) -> None:
        """Take no text of these samples' images for others."""
        self._apart = frozenset((held_out // self.options.per_image).tolist())
        self.__dict__.pop("_lending", None)

    @cached_property
    def _lending(self) -> np.ndarray:
        """The images whose captions others may show."""
        return np.setdiff1d(np.arange(len(self._of_image)), list(self._apart))

    @cached_property
    def _of_image(self) -> list[np.ndarray]:
        """The numbers of the captions of each image, or of each mention of one."""
        groups = self.captions.listed_together()
        order = np.argsort(groups, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)

    def __len__(self) -> int:
        return len(self._of_image) * self.options.per_image

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = random.Random(f"{self._type}/{self.options.seed}/{index}")
        image = index // self.options.per_image
        try:
            first, *others = self.draw_all(image, rng)
        except (DataError, PromptError) as error:
            raise placed(error, self.where(index)) from error
        return Sample(
            id=self.where(index), kind=self.kind, conversation=first, branches=tuple(others)
        )

    def draw_all(self, image: int, rng: random.Random) -> list[Conversation]:
        """The conversations of one sample."""
        return [self.draw(image, rng) for _ in range(self.options.answers)]

    @abstractmethod
    def draw(self, image: int, rng: random.Random) -> Conversation:
        """One conversation."""

    def _captions(self, image: int) -> list[str]:
        return [self.captions.text(int(number)) for number in self._of_image[image]]

    def _other(self, image: int, rng: random.Random) -> list[str]:
        """Captions of another image; of this one where it is the only one."""
        at = rng.randrange(len(self._lending))
        other = int(self._lending[at])
        return self._captions(other if other != image else int(self._lending[at - 1]))

    def where(self, index: int) -> str:
        first = int(self._of_image[index // self.options.per_image][0])
        return f"{self.captions.where(first)} sample {index % self.options.per_image + 1}"

    def groups(self) -> np.ndarray | None:
        # a file may list an image several times
        of_caption = self.captions.groups()
        assert of_caption is not None
        first = [numbers[0] for numbers in self._of_image]
        return np.repeat(of_caption[first], self.options.per_image)

    def fingerprint(self) -> str:
        apart = sorted(self._apart) or ""
        return f"{self._type}{_DRAWS}{self.options!r}{self.captions.records.file.version}{apart}"


class CaptionTaskOptions(CaptionTextOptions):
    """Images, each described in one of many forms: whole captions, things, place, colors, ..."""

    images: Path
    """The folder that image names are relative to."""
    images_outside: bool = False
    """Read images outside that folder too: absolute paths, `..`, links that lead out of it."""
    text_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the samples with a text about another image next to the image; half of them ask
    for the text: an image must not drown what is read next to it."""
    question_share: float = Field(default=0.0, ge=0, le=1)
    """Of those that ask for the text, the share that ask a question about it: an image must not
    turn a short answer into a description either."""
    captions_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples whose answers, at most `answers`, are captions of the image behind one
    prompt: it is computed once too, where other samples have one for each answer."""

    def open(self, kind: Kind) -> CaptionTasks:
        captions = CocoOptions(
            path=self.path,
            images=self.images,
            images_outside=self.images_outside,
            split=self.split,
            ignore=self.ignore,
        ).open(kind)
        return CaptionTasks(captions, self, kind)


class CaptionTasks(CaptionTextSource):
    """No sample holds a question about an image: descriptions alone."""

    options: CaptionTaskOptions
    _type = "caption_tasks"

    def draw_all(self, image: int, rng: random.Random) -> list[Conversation]:
        share = self.options.captions_share
        if not share or rng.random() >= share:
            return super().draw_all(image, rng)
        captions = self._captions(image)
        question = rng.choice(SENTENCE.wordings).format(subject="image")
        some = rng.sample(captions, min(self.options.answers, len(captions)))
        return [
            Conversation.ask(question, images=list(self._shown(image)), answer=sentence_of(each))
            for each in some
        ]

    def draw(self, image: int, rng: random.Random) -> Conversation:
        captions = self._captions(image)
        shown = self._shown(image)
        context, described, subject, asked = None, captions, "image", None
        if rng.random() < self.options.text_share:
            other = self._other(image, rng)
            text = rng.choice(other)
            context = f"{TEXT_MARK} {sentence_of(text)}"
            if rng.random() < 0.5:
                described, subject = [text], "text"
                share = self.options.question_share
                if share and rng.random() < share:
                    asked = _ask_text([text], rng, hint_share=0.4)
        question, answer = asked or write_form(
            described, rng, subject=subject, caption_weight=self.options.caption_weight
        )
        return Conversation.ask(question, images=list(shown), context=context, answer=answer)

    def _shown(self, image: int) -> tuple[ImageRef, ...]:
        return self.captions[int(self._of_image[image][0])].conversation.images

    def fingerprint(self) -> str:
        known = super().fingerprint()
        # without the option, as runs begun earlier know it
        return known if self.options.captions_share else known.replace(", captions_share=0.0", "")


class CaptionQuestionOptions(CaptionTextOptions):
    """Text alone: captions as context, and questions about them, or the forms of `caption_tasks`.

    Short answers that the captions hold: colors, numbers, who, what, where, doing, yes or no.
    """

    form_share: float = Field(default=0.35, ge=0, le=1)
    """Share of the samples that ask for a description in some form."""
    text_share: float = Field(default=0.15, ge=0, le=1)
    """Share with a second text behind the first, about another image; half of them ask for it."""
    most_captions: int = Field(default=5, ge=1, le=100)
    """At most so many captions of an image make up a context."""
    hint_share: float = Field(default=0.4, ge=0, le=1)
    """Share of the questions that say how short to answer."""

    def open(self, kind: Kind) -> CaptionQuestions:
        options = CocoOptions(
            path=self.path, images=self.path.parent, split=self.split, ignore=self.ignore
        )
        return CaptionQuestions(options.open(kind), self, kind)


class CaptionQuestions(CaptionTextSource):
    """What the captions say, asked of the captions as text."""

    options: CaptionQuestionOptions
    _type = "caption_questions"

    def draw(self, image: int, rng: random.Random) -> Conversation:
        options = self.options
        captions = self._some(self._captions(image), rng)
        context, asked, subject = _joined(captions), captions, "image"
        if rng.random() < options.text_share:
            other = self._some(self._other(image, rng), rng)
            context = f"{context}\n{TEXT_MARK} {_joined(other)}"
            if rng.random() < 0.5:
                asked, subject = other, "text"
        drawn = None
        if rng.random() >= options.form_share:
            ask = _ask_text if subject == "text" else ask_about
            drawn = ask(asked, rng, hint_share=options.hint_share)
        question, answer = drawn or write_form(
            asked, rng, subject=subject, caption_weight=options.caption_weight
        )
        return Conversation.ask(question, context=context, answer=answer)

    def _some(self, captions: Sequence[str], rng: random.Random) -> list[str]:
        # one caption as often as all others together: a whole context is seldom that rich
        most = min(self.options.most_captions, len(captions))
        count = 1 if rng.random() < 0.4 else rng.randint(1, most)
        return rng.sample(list(captions), count)


def _ask_text(texts: Sequence[str], rng: random.Random, *, hint_share: float) -> Asked | None:
    """A question about a text next to an image, or next to a description in its place."""
    asked = ask_about(texts, rng, hint_share=hint_share)
    return asked and (f"According to the text: {asked[0]}", asked[1])


def _joined(captions: Sequence[str]) -> str:
    return " ".join(map(sentence_of, captions))
