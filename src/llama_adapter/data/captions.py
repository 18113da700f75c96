"""Picture-caption pairs: COCO's annotations and tables of paths and captions."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from llama_adapter.conversation import Conversation
from llama_adapter.data.conversations import check_folder, image_in
from llama_adapter.data.records import JsonRecords, RecordFile, Spans
from llama_adapter.data.samples import Kind, Sample, SourceOptions
from llama_adapter.errors import DataError, PromptError

QUESTIONS = (
    "Describe the image in one sentence.",
    "Write a short caption for this image.",
    "What does the picture show?",
    "Say briefly what is in the photo.",
)
"""Wordings that ask for a caption, where a recipe names none."""


class CaptionOptions(SourceOptions):
    """What all sources of captions share."""

    questions: tuple[str, ...] = QUESTIONS
    """What asks for the caption; a sample always gets the same one of them."""


def caption_sample(
    image: Any, caption: Any, *, number: int, where: str, kind: Kind, questions: tuple[str, ...]
) -> Sample:
    """A question for a caption of a picture, and the caption."""
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"caption must be text, found {caption!r}")
    # by the sample's own number: the same wording in every epoch and on every process
    question = questions[zlib.crc32(str(number).encode()) % len(questions)]
    conversation = Conversation.ask(question, images=[image], answer=caption.strip())
    return Sample(id=where, kind=kind, conversation=conversation)


class CocoOptions(CaptionOptions):
    """A JSON file of captions and a folder of pictures.

    Reads COCO's own annotations, Karpathy's split file, and a list of {image, captions}.
    """

    path: Path
    images: Path
    split: str | tuple[str, ...] | None = None
    """Only records with this `split`, where the file has one."""

    def open(self, kind: Kind) -> CocoSource:
        return CocoSource(self, kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Which of the three forms a caption file has."""

    key: str | None
    form: Literal["coco", "karpathy", "list"]


class CocoSource:
    """One sample a caption; `groups` tell which captions are of one picture."""

    def __init__(self, options: CocoOptions, kind: Kind) -> None:
        check_folder(options.images)
        self.options = options
        self.kind = kind
        self.name = f"coco_captions {options.path.name}"
        self.layout = _layout_of(options.path)
        self.records = JsonRecords(options.path, key=self.layout.key)
        if self.layout.form == "coco":
            self._pictures = _PictureNames(options.path)
            self._record = np.arange(len(self.records), dtype=np.int32)
            self._caption = np.zeros(len(self.records), dtype=np.int16)
        else:
            pairs = np.array(list(self._captions_of_records()), dtype=np.int32).reshape(-1, 2)
            self._record, self._caption = pairs[:, 0].copy(), pairs[:, 1].astype(np.int16)
        if not len(self._record):
            raise DataError(
                f"{options.path} holds no captions"
                + (f" of split {options.split!r}" if options.split else "")
            )

    def _captions_of_records(self) -> Iterator[tuple[int, int]]:
        splits = self.options.split
        wanted = (splits,) if isinstance(splits, str) else splits
        for number in range(len(self.records)):
            try:
                record = self.records[number]
            except DataError:
                # stays a sample, so that it is counted and listed as broken
                yield number, 0
                continue
            if wanted is not None and record.get("split") not in wanted:
                continue
            captions = record.get("sentences" if self.layout.form == "karpathy" else "captions")
            count = len(captions) if isinstance(captions, list) else 1
            yield from ((number, index) for index in range(max(1, count)))

    def __len__(self) -> int:
        return len(self._record)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[int(self._record[index])]
        where = self.where(index)
        try:
            name, caption = self._read(record, int(self._caption[index]))
            return caption_sample(
                image_in(self.options.images, name),
                caption,
                number=index,
                where=where,
                kind=self.kind,
                questions=self.options.questions,
            )
        except (DataError, PromptError) as error:
            raise DataError(f"{where}: {error}") from error

    def _read(self, record: Mapping[str, Any], number: int) -> tuple[Any, Any]:
        if self.layout.form == "coco":
            return self._pictures.name(record.get("image_id")), record.get("caption")
        if self.layout.form == "karpathy":
            folder, name = record.get("filepath", ""), record.get("filename")
            sentence = _nth(record, "sentences", number)
            caption = sentence.get("raw") if isinstance(sentence, dict) else None
            return f"{folder}/{name}" if folder and name else name, caption
        return record.get("image"), _nth(record, "captions", number)

    def where(self, index: int) -> str:
        place = self.records.where(int(self._record[index]))
        number = int(self._caption[index])
        return f"{place} caption {number + 1}" if self.layout.form != "coco" else place

    def groups(self) -> np.ndarray | None:
        if self.layout.form != "coco":
            return self._record
        return self._groups

    @cached_property
    def _groups(self) -> np.ndarray:
        """Which annotations are of one picture; those that cannot be read make one group."""
        ids = np.fromiter(map(self._image_id, range(len(self))), dtype=np.int64, count=len(self))
        return np.unique(ids, return_inverse=True)[1]

    def _image_id(self, index: int) -> int:
        try:
            found = self.records[index].get("image_id")
        except DataError:
            return -1
        return found if _is_id(found) else -1

    def fingerprint(self) -> str:
        return f"{self.options!r}{self.records.file.version}"


def _nth(record: Mapping[str, Any], key: str, number: int) -> Any:
    listed = record.get(key)
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{key!r} must be a list of captions, found {listed!r}")
    return listed[number]


def _is_id(value: Any) -> TypeGuard[int]:
    """Whether a value can number a picture, in 64 bits."""
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _layout_of(path: Path) -> _Layout:
    """Which form a file has; DataError if it is none of ours."""
    file = RecordFile(path)
    if file.read(0, 64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _Layout(key=None, form="list")
    try:
        first = JsonRecords(path, key="images")[0]
    except DataError:
        first = JsonRecords(path)[0]
        if "captions" in first:
            return _Layout(key=None, form="list")
        raise
    if "sentences" in first:
        return _Layout(key="images", form="karpathy")
    return _Layout(key="annotations", form="coco")


class _PictureNames:
    """File names of COCO's pictures by id, as two arrays."""

    def __init__(self, path: Path) -> None:
        records = JsonRecords(path, key="images")
        found: dict[int, bytes] = {}
        for number in range(len(records)):
            record = records[number]
            if _is_id(record.get("id")) and isinstance(record.get("file_name"), str):
                found[record["id"]] = record["file_name"].encode()
        if not found:
            raise DataError(f"{path}: 'images' name no file: expected id and file_name")
        self.ids = np.array(sorted(found), dtype=np.int64)
        self.names = np.array([found[int(i)] for i in self.ids])

    def name(self, picture: Any) -> str:
        if _is_id(picture):
            at = int(np.searchsorted(self.ids, picture))
            if at < len(self.ids) and self.ids[at] == picture:
                return bytes(self.names[at]).decode()
        raise DataError(f"image_id {picture!r} is none of the file's images")


class PairsOptions(CaptionOptions):
    """A table of picture paths and captions, TSV or CSV, with a header line.

    The header names the two columns: `url` or `image` or `path`, and `caption` or `text`.
    """

    path: Path
    images: Path | None = None
    """The folder that paths are relative to; None: the table's own."""

    def open(self, kind: Kind) -> PairsSource:
        return PairsSource(self, kind)


_PATH_COLUMNS = ("url", "image", "path", "image_path", "filepath", "file_name")
_CAPTION_COLUMNS = ("caption", "text", "title")


class PairsSource:
    """One sample a row of the table."""

    def __init__(self, options: PairsOptions, kind: Kind) -> None:
        self.options = options
        self.kind = kind
        self.name = f"pairs {options.path.name}"
        self.folder = options.images or options.path.parent
        check_folder(self.folder)
        self.file = RecordFile(options.path)
        self.delimiter = "," if options.path.suffix.lower() == ".csv" else "\t"
        spans = Spans.of(_rows(self.file))
        if not len(spans):
            raise DataError(f"{options.path} holds blank lines alone, expected a header and rows")
        start, length = int(spans.starts[0]), int(spans.lengths[0])
        try:
            header = next(self._parse(self.file.read(start, length)), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{options.path}, line 1: {error}") from error
        self.columns = self._columns([name.strip().strip("\ufeff").lower() for name in header])
        self.spans = Spans(starts=spans.starts[1:], lengths=spans.lengths[1:])
        if not len(self.spans):
            raise DataError(f"{options.path} has a header, but no rows")
        self.lines = self.file.lines_of(self.spans.starts)

    def _columns(self, header: list[str]) -> tuple[int, int]:
        path = next((header.index(n) for n in _PATH_COLUMNS if n in header), None)
        caption = next((header.index(n) for n in _CAPTION_COLUMNS if n in header), None)
        if path is None or caption is None:
            kind = "comma" if self.delimiter == "," else "tab"
            shown = ", ".join(repr(name[:40]) for name in header[:4])
            raise DataError(
                f"{self.options.path}, line 1: expected a {kind}-separated header such as "
                f"'url' and 'caption', found {shown}"
            )
        return path, caption

    def _parse(self, data: bytes) -> Iterator[list[str]]:
        text = data.decode("utf-8-sig")
        if self.delimiter == ",":
            # not by splitlines: a caption may hold one of Unicode's other line ends
            return csv.reader(io.StringIO(text, newline=""))
        # as the released code writes them: tabs and line ends alone count, quotes are text
        return iter([text.split("\t")])

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        data = self.file.read(int(self.spans.starts[index]), int(self.spans.lengths[index]))
        try:
            row = next(self._parse(data), [])
            if len(row) <= max(self.columns):
                raise DataError(f"expected {max(self.columns) + 1} columns, found {len(row)}")
            image, caption = (row[column] for column in self.columns)
            return caption_sample(
                image_in(self.folder, image.strip()),
                caption,
                number=index,
                where=where,
                kind=self.kind,
                questions=self.options.questions,
            )
        except (DataError, PromptError, csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{where}: {error}") from error

    def where(self, index: int) -> str:
        return f"{self.options.path}:{self.lines[index]}"

    def groups(self) -> np.ndarray | None:
        return None

    def fingerprint(self) -> str:
        return f"{self.options!r}{self.file.version}"


def _rows(file: RecordFile) -> Iterator[tuple[int, int]]:
    """Rows of a table; in CSV a quoted cell may hold line breaks."""
    quotes = file.path.suffix.lower() == ".csv"
    start = at = 0
    open_quote = False
    with file.path.open("rb") as lines:
        for line in lines:
            at += len(line)
            if quotes and line.count(b'"') % 2:
                open_quote = not open_quote
            if open_quote:
                continue
            if not line.isspace():
                yield start, start + len(line.rstrip(b"\r\n")) + (at - start - len(line))
            start = at
    if open_quote:
        raise DataError(f"{file.path}:{file.line_of(start)}: a quoted cell never ends")
