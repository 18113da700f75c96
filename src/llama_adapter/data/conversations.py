"""Instruction data: Alpaca records, ShareGPT conversations, and LLaVA's with images."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.conversation import Conversation, Message
from llama_adapter.data.captions import CocoOptions
from llama_adapter.data.media import MediaFolder
from llama_adapter.data.records import JsonRecords
from llama_adapter.data.samples import Kind, Sample, SourceOptions, placed
from llama_adapter.data.turns import (
    IMAGE_MARK,
    Fields,
    Media,
    Turn,
    conversation_of,
    read_turns,
)
from llama_adapter.errors import DataError, PromptError

QUESTION = ("instruction", "prompt", "question", "query")
CONTEXT = ("input", "context")
ANSWER = ("output", "response", "completion", "answer")
SYSTEM = ("system", "system_prompt")
TURNS = ("conversations", "items", "messages")


class RecordOptions(SourceOptions):
    """What all sources of JSON records share."""

    path: Path
    images: Path | None = None
    """The folder that the records' names of images and videos are relative to."""
    images_outside: bool = False
    """Read images outside that folder too: absolute paths, `..`, links that lead out of it."""
    ignore: tuple[str, ...] = ()
    """Keys of records that are not needed; other unknown ones make a record invalid."""


class JsonSource(ABC):
    """Conversations from JSON records, one sample a record."""

    def __init__(
        self, options: RecordOptions, kind: Kind, *, type_: str, record_keys: tuple[str, ...]
    ) -> None:
        """`record_keys` are those that only a record has: an object without may be a wrapper."""
        self.folder = MediaFolder(options.images, outside=options.images_outside)
        self.records = JsonRecords(options.path, record_keys=record_keys)
        self.options = options
        self.kind = kind
        self.name = f"{type_} {options.path.name}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        where = self.where(index)
        try:
            fields = Fields(record, ignore=self.options.ignore)
            media = Media.of(fields, self.folder)
            conversation = self.read(fields, media)
            said = [message.text for message in conversation.messages]
            fields.check(shows_media=bool(conversation.images), said=said)
            shown = self.shown(conversation, index)
            return Sample(id=where, kind=self.kind, conversation=shown)
        except (DataError, PromptError) as error:
            raise placed(error, where) from error

    @abstractmethod
    def read(self, fields: Fields, media: Media) -> Conversation:
        """What one record says; DataError or PromptError if it cannot be learned from."""

    def shown(self, conversation: Conversation, index: int) -> Conversation:  # noqa: ARG002
        """The conversation of a record, with what is shown along with it."""
        return conversation

    def where(self, index: int) -> str:
        return self.records.where(index)

    def groups(self) -> np.ndarray | None:
        return None

    def fingerprint(self) -> str:
        return f"{self.options!r}{self.records.file.version}"


class AlpacaOptions(RecordOptions):
    """JSON or JSON lines of {instruction, input, output}: Alpaca, GPT-4-LLM, Dolly, OpenOrca."""

    unrelated_images: CocoOptions | None = None
    """A file of captions, one of whose images is shown with each record that shows none itself.
    As `captions`, whose loss updates VISION: an image must not change answers that are not about
    it."""

    def open(self, kind: Kind) -> AlpacaSource:
        keys = (*QUESTION, *ANSWER, "instances")
        return AlpacaSource(self, kind, type_="alpaca", record_keys=keys)


class AlpacaSource(JsonSource):
    """Single questions, with a context where the record has an input, after earlier turns."""

    def __init__(self, options: AlpacaOptions, kind: Kind, **kwargs: Any) -> None:
        super().__init__(options, kind, **kwargs)
        unrelated = options.unrelated_images
        if unrelated and kind == "instruction":
            raise DataError(
                f"{self.name}: unrelated_images belongs to a source of `captions`, whose loss "
                "updates VISION; this one is of `instructions`"
            )
        self.unrelated = unrelated.open(kind) if unrelated else None

    def read(self, fields: Fields, media: Media) -> Conversation:
        return single_question(fields, media)

    def shown(self, conversation: Conversation, index: int) -> Conversation:
        if self.unrelated is None or conversation.images:
            return conversation
        # by the record's own number: the same image in every epoch and on every process
        number = zlib.crc32(str(index).encode()) % len(self.unrelated)
        return conversation.with_images(self.unrelated[number].conversation.images)

    def fingerprint(self) -> str:
        # without the option, as runs begun earlier know it
        known = super().fingerprint().replace(", unrelated_images=None", "")
        return known + (self.unrelated.fingerprint() if self.unrelated else "")


def single_question(fields: Fields, media: Media) -> Conversation:
    """A question with its context and its answer, in the keys of Alpaca and its relatives.

    `history` holds earlier questions and answers; they are learned too. An input with an
    empty instruction is the question. Both as in LLaMA-Factory.
    """
    answered = _only_instance(fields)
    context = answered.text(*CONTEXT, optional=True)
    is_blank = any(isinstance(fields.record.get(name), str) for name in QUESTION)
    question = fields.text(*QUESTION, optional=is_blank and bool(context))
    if not question:
        question, context = context, ""
    answer = answered.text(*ANSWER)
    if answered is not fields:
        answered.check()
    # the whole prompt in one text, which Stanford's own file repeats
    text = fields.record.get("text")
    if isinstance(text, str) and question.strip() in text and answer.strip() in text:
        fields.value("text")
    earlier = _history(fields.value("history"))
    if earlier and context:
        # a conversation's context goes with its first question
        question, context = f"{question}\n{context}", ""
    turns = [*earlier, Turn("user", question), Turn("assistant", answer)]
    conversation = conversation_of(turns, media, system=fields.text(*SYSTEM, optional=True))
    return conversation.with_context(context or None)


def _only_instance(fields: Fields) -> Fields:
    """Where input and output stand: in the record, or in its only instance (Self-Instruct)."""
    instances = fields.value("instances")
    if instances is None:
        return fields
    if not isinstance(instances, list) or not all(isinstance(each, dict) for each in instances):
        raise DataError(f"'instances' must be a list of objects, found {type(instances).__name__}")
    if len(instances) != 1:
        raise DataError(f"'instances' holds {len(instances)} answers, expected one")
    return Fields(instances[0], what="instances: key")


def _history(pairs: Any) -> list[Turn]:
    if pairs is None:
        return []
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise DataError("'history' must be a list of [question, answer]")
    return [t for q, a in pairs for t in (Turn("user", q), Turn("assistant", a))]


class ShareGptOptions(RecordOptions):
    """JSON or JSON lines of conversations: {from, value} or {role, content} turns."""

    key: str | None = None
    """Where the turns are; None: `conversations`, `items` or `messages`."""

    def open(self, kind: Kind) -> ShareGptSource:
        return ShareGptSource(self, kind, type_="sharegpt", record_keys=self.keys)

    @property
    def keys(self) -> tuple[str, ...]:
        """Where the turns may be."""
        return TURNS if self.key is None else (self.key,)


class ShareGptSource(JsonSource):
    """Conversations of many turns.

    Turns of the assistant before the first question, and a last question without an answer, are
    left out: ShareGPT has both wherever it cut a long talk in two.
    """

    options: ShareGptOptions

    def read(self, fields: Fields, media: Media) -> Conversation:
        return many_turns(fields, media, self.options.keys, self.folder)


def many_turns(
    fields: Fields, media: Media, keys: tuple[str, ...], folder: MediaFolder
) -> Conversation:
    """A conversation of turns, with the record's own system message where it has one."""
    found = next((key for key in keys if key in fields.record), None)
    if found is None:
        names = ", ".join(map(repr, list(fields.record)[:6])) or "none"
        raise DataError(f"lacks {' or '.join(map(repr, keys))}; its keys: {names}")
    listed = fields.value(*keys)
    turns = read_turns([] if listed is None else listed, found, folder)
    return conversation_of(turns, media, system=fields.text(*SYSTEM, optional=True))


class LlavaOptions(RecordOptions):
    """Conversations with an image or a video each.

    Also reads records of {image, QA: [{q, a}]} and of {image, instruction, output}.
    """

    images: Path

    def open(self, kind: Kind) -> LlavaSource:
        keys = (*TURNS, "QA", *QUESTION, *ANSWER)
        return LlavaSource(self, kind, type_="llava", record_keys=keys)


class LlavaSource(JsonSource):
    """Conversations that show an image where its mark is; a record without one is text alone."""

    def read(self, fields: Fields, media: Media) -> Conversation:
        if "QA" in fields.record:
            turns = _pairs(fields.value("QA"))
            conversation = conversation_of(turns, media)
        elif any(key in fields.record for key in TURNS):
            conversation = many_turns(fields, media, TURNS, self.folder)
        elif any(key in fields.record for key in QUESTION):
            conversation = single_question(fields, media)
        else:
            conversation = many_turns(fields, media, TURNS, self.folder)
        if not conversation.images:
            _refuse_marks(conversation.messages)
        return conversation


def _refuse_marks(messages: tuple[Message, ...]) -> None:
    marks = sum(message.text.count(IMAGE_MARK) for message in messages)
    if marks:
        raise DataError(f"has {marks} {IMAGE_MARK} marks, but 0 images")


def _pairs(pairs: Any) -> list[Turn]:
    if not isinstance(pairs, list) or not all(isinstance(pair, Mapping) for pair in pairs):
        raise DataError(f"'QA' must be a list of objects, found {type(pairs).__name__}")
    turns = []
    for number, pair in enumerate(pairs, start=1):
        fields = Fields(pair, what=f"pair {number}: key")
        turns += [
            Turn("user", fields.text("q", "question")),
            Turn("assistant", fields.text("a", "answer")),
        ]
        fields.check()
    return turns
