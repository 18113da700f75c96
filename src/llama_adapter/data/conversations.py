"""Instruction data: Alpaca records, ShareGPT conversations, and LLaVA's with pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.conversation import Conversation, ImageRef, Message, Role
from llama_adapter.data.records import JsonRecords
from llama_adapter.data.samples import Kind, Sample, SourceOptions
from llama_adapter.errors import DataError, PromptError

IMAGE_MARK = "<image>"
"""Where LLaVA's texts show the picture; ours stands beside the message, so the mark goes."""

SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Whom ShareGPT's and OpenAI's files name as speaker, and who that is."""


class JsonSource(ABC):
    """Conversations from JSON records, one sample a record."""

    def __init__(self, options: SourceOptions, path: Path, kind: Kind, *, type_: str) -> None:
        self.records = JsonRecords(path)
        self.options = options
        self.kind = kind
        self.name = f"{type_} {path.name}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        where = self.where(index)
        try:
            conversation = self.read(record)
            return Sample(id=where, kind=self.kind, conversation=conversation)
        except (DataError, PromptError) as error:
            message = str(error)
            raise DataError(
                message if message.startswith(where) else f"{where}: {error}"
            ) from error

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> Conversation:
        """What one record says; DataError or PromptError if it cannot be learned from."""

    def where(self, index: int) -> str:
        return self.records.where(index)

    def groups(self) -> np.ndarray | None:
        return None

    def fingerprint(self) -> str:
        return f"{self.options!r}{self.records.file.version}"


class AlpacaOptions(SourceOptions):
    """JSON or JSON lines of {instruction, input, output}: Alpaca, GPT-4-LLM."""

    path: Path

    def open(self, kind: Kind) -> AlpacaSource:
        return AlpacaSource(self, self.path, kind, type_="alpaca")


class AlpacaSource(JsonSource):
    """Single questions, with a context where the record has an input."""

    def read(self, record: Mapping[str, Any]) -> Conversation:
        question = _text(record, "instruction")
        context = _text(record, "input", optional=True)
        answer = _text(record, "output")
        return Conversation.ask(question, context=context or None, answer=answer)


class ShareGptOptions(SourceOptions):
    """JSON or JSON lines of conversations: {from, value} or {role, content} turns."""

    path: Path
    key: str | None = None
    """Where the turns are; None: `conversations`, `items` or `messages`."""

    def open(self, kind: Kind) -> ShareGptSource:
        return ShareGptSource(self, self.path, kind, type_="sharegpt")


class ShareGptSource(JsonSource):
    """Conversations of many turns.

    Turns of the assistant before the first question, and a last question without an answer, are
    left out: ShareGPT has both wherever it cut a long talk in two.
    """

    options: ShareGptOptions

    def read(self, record: Mapping[str, Any]) -> Conversation:
        return _conversation(_turns(record, self.options.key), images=())


class LlavaOptions(SourceOptions):
    """Conversations with a picture each.

    Also reads records of {image, QA: [{q, a}]} and of {image, instruction, output}.
    """

    path: Path
    images: Path
    """The folder that the records' image names are relative to."""

    def open(self, kind: Kind) -> LlavaSource:
        check_folder(self.images)
        return LlavaSource(self, self.path, kind, type_="llava")


class LlavaSource(JsonSource):
    """Conversations whose first message shows the picture; a record without one is text alone."""

    options: LlavaOptions

    def read(self, record: Mapping[str, Any]) -> Conversation:
        names = record.get("image")
        listed = names if isinstance(names, list) else [] if names is None else [names]
        images = tuple(image_in(self.options.images, name) for name in listed)
        if "QA" in record:
            turns = [t for pair in _pairs(record) for t in pair]
        elif "instruction" in record:
            turns = [
                Message("user", _text(record, "instruction")),
                Message("assistant", _text(record, "output")),
            ]
        else:
            turns = _turns(record, None)
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        if marks and marks != len(images):
            raise DataError(f"has {marks} {IMAGE_MARK} marks, but {len(images)} images")
        return _conversation(turns, images=images)


def image_in(folder: Path, name: Any) -> ImageRef:
    """A picture by its name in a folder; DataError if it is not there.

    Names with folders of their own (`train2014/x.jpg`) are also found directly in the folder.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"image must be a file name, found {name!r}")
    for path in (folder / name, folder / Path(name).name):
        try:
            if path.is_file():
                return ImageRef(source=path, name=str(path))
        except OSError as error:  # such as a text, too long to be a name
            raise DataError(f"image {name[:80]!r}: {error.strerror}") from error
    raise DataError(f"image {name!r} is not in {folder}")


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist")


def _text(record: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    value = record.get(key)
    if value is None and optional:
        return ""
    if value is None:
        found = ", ".join(map(repr, list(record)[:6])) or "none"
        raise DataError(f"lacks {key!r}; its keys: {found}")
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be text, found {type(value).__name__}")
    if not value.strip() and not optional:
        raise DataError(f"{key!r} is empty")
    return value


def _pairs(record: Mapping[str, Any]) -> list[tuple[Message, Message]]:
    pairs = record["QA"]
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise DataError(f"'QA' must be a list of objects, found {type(pairs).__name__}")
    return [(Message("user", _text(p, "q")), Message("assistant", _text(p, "a"))) for p in pairs]


def _turns(record: Mapping[str, Any], key: str | None) -> list[Message]:
    keys = (key,) if key else ("conversations", "items", "messages")
    found = next((k for k in keys if k in record), None)
    if found is None:
        names = ", ".join(map(repr, list(record)[:6])) or "none"
        raise DataError(f"lacks {' or '.join(map(repr, keys))}; its keys: {names}")
    listed = record[found]
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        raise DataError(f"{found!r} must be a list of objects, found {type(listed).__name__}")
    turns = []
    for number, turn in enumerate(listed, start=1):
        speaker = turn.get("from", turn.get("role"))
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(
                f"turn {number} is from {speaker!r}, expected one of {', '.join(SPEAKERS)}"
            )
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise DataError(f"turn {number} must hold text, found {type(text).__name__}")
        turns.append(Message(role, text))
    return turns


def _conversation(turns: list[Message], *, images: tuple[ImageRef, ...]) -> Conversation:
    """Whole exchanges alone, image marks taken out, pictures beside the first question."""
    system = turns[:1] if turns and turns[0].role == "system" else []
    talk = turns[len(system) :]
    first = next((i for i, turn in enumerate(talk) if turn.role == "user"), len(talk))
    talk = talk[first:]
    if talk and talk[-1].role == "user":
        talk = talk[:-1]
    for index, turn in enumerate(talk):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            raise DataError(
                f"turns must alternate: turn {len(system) + first + index + 1} is from "
                f"{turn.role!r}, expected {expected!r}"
            )
    if not talk:
        raise DataError("holds no question with an answer")
    if images:
        talk = [Message(turn.role, _unmarked(turn.text)) for turn in talk]
    if any(t.role == "assistant" and not t.text.strip() for t in talk):
        raise DataError("an answer is empty")
    talk[0] = Message("user", talk[0].text, images=images)
    return Conversation(messages=(*system, *talk))


def _unmarked(text: str) -> str:
    r"""The text without image marks and the line breaks that set them apart.

    >>> _unmarked("<image>\nWhat is this?")
    'What is this?'
    """
    if IMAGE_MARK not in text:
        return text
    return (
        text.replace(f"{IMAGE_MARK}\n", "").replace(f"\n{IMAGE_MARK}", "").replace(IMAGE_MARK, "")
    )
