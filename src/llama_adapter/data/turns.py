"""Reading a record: which of its keys hold what, its turns, and which turn shows which image."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_adapter.conversation import Conversation, ImageRef, Message, Role
from llama_adapter.data.keys import check_keys, is_empty
from llama_adapter.data.media import MediaFolder
from llama_adapter.errors import DataError

IMAGE_MARK = "<image>"
"""Where LLaVA's texts show the image; ours belongs to the message, so the mark is removed."""
_MARKS = re.compile(r"<image>|<video>")

SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
"""Whom ShareGPT's and OpenAI's files name as speaker, and who that is."""
_WEIGHTS = ("weight", "loss_weight", "train", "loss")
"""Whether an answer is scored, in OpenAI's, Axolotl's and ms-swift's files."""


class Fields:
    """The keys of one record, and which of them have been read."""

    def __init__(
        self, record: Mapping[str, Any], *, ignore: Collection[str] = (), what: str = "key"
    ) -> None:
        self.record = {key: value for key, value in record.items() if key not in ignore}
        self._read: set[str] = set()
        self._what = what

    def value(self, *names: str) -> Any:
        """The value under the one of the names that has one; None without any."""
        self._read.update(names)
        found = [name for name in names if not is_empty(self.record.get(name))]
        if len(found) > 1:
            raise DataError(
                f"{found[0]!r} and {found[1]!r} both hold something, expected one of them; "
                "list the other in the source's `ignore`"
            )
        return self.record[found[0]] if found else None

    def text(self, *names: str, optional: bool = False) -> str:
        """As `value`, for text; DataError where it is missing, empty or something else."""
        value = self.value(*names)
        if value is None:
            if optional:
                return ""
            if given := [name for name in names if self.record.get(name) is not None]:
                value = self.record[given[0]]
                if isinstance(value, str):
                    raise DataError(f"{given[0]!r} is empty")
            else:
                raise DataError(f"lacks {names[0]!r}; its keys: {_listed(self.record)}")
        if not isinstance(value, str):
            name = next(name for name in names if self.record.get(name) is value)
            raise DataError(f"{name!r} must be text, found {type(value).__name__}")
        return value

    def check(self, *, shows_media: bool = False, said: Collection[str] = ()) -> None:
        """DataError for a key that nobody read and that may hold something.

        What repeats one of the texts `said` holds nothing, as UltraChat's `prompt`.
        """
        texts = {text.strip() for text in said}
        repeated = {k for k, v in self.record.items() if isinstance(v, str) and v.strip() in texts}
        read = self._read | repeated
        check_keys(self.record, read, ignore=(), shows_media=shows_media, what=self._what)


@dataclass(slots=True)
class Turn:
    """A turn as it is read; `media` holds None where an image of the record is to stand."""

    role: Role
    text: str
    media: list[ImageRef | None] = field(default_factory=list)
    scored: bool = True


@dataclass(frozen=True, slots=True)
class Media:
    """Images and videos that a record names outside its turns."""

    images: tuple[ImageRef, ...] = ()
    videos: tuple[ImageRef, ...] = ()

    @classmethod
    def of(cls, fields: Fields, folder: MediaFolder) -> Media:
        """From `image` or `images`, and `video` or `videos`: a name or a list of names."""
        images, videos = fields.value("image", "images"), fields.value("video", "videos")
        return cls(
            images=tuple(folder.image(name) for name in _as_list(images)),
            videos=tuple(folder.video(name) for name in _as_list(videos)),
        )

    def __len__(self) -> int:
        return len(self.images) + len(self.videos)


def read_turns(listed: Any, key: str, folder: MediaFolder) -> list[Turn]:
    """Turns of {from, value} or {role, content}; contents may be lists of parts, as OpenAI's.

    A list of texts is of the user and the assistant in turn, as in LIMA and UltraChat.
    """
    if isinstance(listed, list) and listed and all(isinstance(turn, str) for turn in listed):
        return [Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(listed)]
    if not isinstance(listed, list):
        raise DataError(f"{key!r} must be a list of objects, found {type(listed).__name__}")
    odd = [type(turn).__name__ for turn in listed if not isinstance(turn, dict)]
    if odd:
        raise DataError(f"{key!r} must be a list of objects, found {odd[0]} in it")
    return [_turn(turn, number, folder) for number, turn in enumerate(listed, start=1)]


def _turn(turn: Mapping[str, Any], number: int, folder: MediaFolder) -> Turn:
    fields = Fields(turn, what=f"turn {number}: key")
    speaker = fields.value("from", "role")
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"turn {number} is from {speaker!r}, expected one of {', '.join(SPEAKERS)}")
    scored = all(_is_scored(turn[name], number) for name in _WEIGHTS if name in turn)
    for name in _WEIGHTS:
        fields.value(name)
    content = fields.value("value", "content")
    if content is None:
        content = turn.get("value", turn.get("content"))
    fields.check(shows_media=False)
    if isinstance(content, list) and content:
        text, media = _parts(content, number, folder)
    elif isinstance(content, str):
        text, media = content, []
    else:
        raise DataError(f"turn {number} must hold text, found {type(content).__name__}")
    if media and role != "user":
        raise DataError(f"turn {number} is from {speaker!r} and shows an image")
    return Turn(role, text, media, scored)


def _is_scored(weight: Any, number: int) -> bool:
    if weight is None:
        return True
    if isinstance(weight, bool | int | float) and weight in (0, 1):
        return bool(weight)
    raise DataError(f"turn {number} has weight {weight!r}, expected 0 or 1")


def _parts(
    content: list[Any], number: int, folder: MediaFolder
) -> tuple[str, list[ImageRef | None]]:
    texts: list[str] = []
    media: list[ImageRef | None] = []
    for part in content:
        if not isinstance(part, str | dict):
            raise DataError(f"turn {number}: a part must be an object, got {type(part).__name__}")
        kind = "text" if isinstance(part, str) else part.get("type")
        given = {"text": part} if isinstance(part, str) else part
        held = [(k, v) for k, v in given.items() if k not in {"type", "detail"} and not is_empty(v)]
        match kind, held:
            case "text", []:
                texts.append("")
            case "text", [("text", str(text))]:
                texts.append(text)
            case "image", []:
                media.append(None)
            case "image", [("base64", str(data))]:
                media.append(ImageRef.of(f"data:image;base64,{data}"))
            case "image", [("image" | "path" | "url", name)]:
                media.append(_linked(name, folder))
            case "image_url", [("image_url", {"url": str(name)} | str(name))]:
                media.append(_linked(name, folder))
            case "video", [("video" | "path" | "url", name)]:
                media.append(folder.video(name))
            case _:
                keys = ", ".join(repr(key) for key, _ in held[:6]) or "nothing"
                raise DataError(
                    f"turn {number}: a part must be of type text, image, image_url or video and "
                    f"hold that alone, got {kind!r} with {keys}"
                )
    return "\n".join(texts), media


def _linked(name: Any, folder: MediaFolder) -> ImageRef:
    """An image by a `data:` URL, or by a name in the folder; others' addresses are refused."""
    if isinstance(name, str) and re.match(r"data:|https?://", name):
        return ImageRef.of(name)
    return folder.image(name.removeprefix("file://") if isinstance(name, str) else name)


def conversation_of(turns: Sequence[Turn], media: Media, *, system: str = "") -> Conversation:
    """Whole exchanges alone, each image with the question that shows it.

    Turns of the assistant before the first question and a last question without an answer are
    left out.
    """
    turns = list(turns)
    if system:
        if turns and turns[0].role == "system" and turns.pop(0).text.strip():
            raise DataError("has a system message of its own and one among its turns")
        turns.insert(0, Turn("system", system))
    _place(turns, media)
    start = 1 if turns and turns[0].role == "system" else 0
    first = next((i for i, t in enumerate(turns) if i >= start and t.role == "user"), len(turns))
    stop = len(turns) - (len(turns) > first and turns[-1].role == "user")
    if any(turn.media for turn in (*turns[:first], *turns[stop:])):
        raise DataError("an image is shown with a question that has no answer")
    talk = turns[first:stop]
    for index, turn in enumerate(talk):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            raise DataError(
                f"turns must alternate: turn {first + index + 1} is from "
                f"{turn.role!r}, expected {expected!r}"
            )
    if not talk:
        raise DataError("holds no question with an answer")
    if any(t.role == "assistant" and not t.text.strip() for t in talk):
        raise DataError("an answer is empty")
    return Conversation(
        messages=tuple(
            Message(t.role, t.text, images=tuple(ref for ref in t.media if ref), scored=t.scored)
            for t in (*turns[:start], *talk)
        )
    )


def _place(turns: list[Turn], media: Media) -> None:
    """Give the images of a record to its turns: by parts, by marks, else to the first question."""
    if not len(media):
        if any(ref is None for turn in turns for ref in turn.media):
            raise DataError("a part shows an image that the record does not name")
        return
    waiting = {IMAGE_MARK: list(media.images), "<video>": list(media.videos)}
    open_parts = sum(ref is None for turn in turns for ref in turn.media)
    marks = [mark for turn in turns for mark in _MARKS.findall(turn.text)]
    for mark, refs in waiting.items():
        count = open_parts if open_parts and mark == IMAGE_MARK else marks.count(mark)
        if count and count != len(refs):
            raise DataError(f"has {count} {mark} marks, but {len(refs)} {mark[1:-1]}s")
    for turn in turns:
        turn.media = [waiting[IMAGE_MARK].pop(0) if ref is None else ref for ref in turn.media]
        for mark in _MARKS.findall(turn.text):
            if waiting[mark]:
                if turn.role != "user":
                    raise DataError(f"a {mark} mark is in a turn from {turn.role!r}")
                turn.media.append(waiting[mark].pop(0))
        turn.text = _unmarked(turn.text)
    left = [ref for refs in waiting.values() for ref in refs]
    first = next((turn for turn in turns if turn.role == "user"), None)
    if first is not None:
        first.media += left


def _unmarked(text: str) -> str:
    r"""The text without marks and the line breaks that set them apart.

    >>> _unmarked("<image>\nWhat is this?")
    'What is this?'
    """
    for mark in (IMAGE_MARK, "<video>"):
        if mark in text:
            text = text.replace(f"{mark}\n", "").replace(f"\n{mark}", "").replace(mark, "")
    return text


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:6])) or "none"
