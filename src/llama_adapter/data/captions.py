"""Image-caption pairs: COCO's annotations, lists of images and captions, and tables of both."""

from __future__ import annotations

import csv
import io
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.conversation import Conversation
from llama_adapter.data.keys import check_keys
from llama_adapter.data.media import MediaFolder
from llama_adapter.data.records import JsonRecords, RecordFile, Records, Span, Spans, arrays_of
from llama_adapter.data.samples import Kind, Sample, SourceOptions, placed
from llama_adapter.data.turns import Fields
from llama_adapter.errors import DataError, PromptError

QUESTIONS = (
    "Describe the image in one sentence.",
    "Write a short caption for this image.",
    "What does the picture show?",
    "Say briefly what is in the photo.",
)
"""Wordings that ask for a caption, where a recipe names none."""

IMAGE_KEYS = ("image", "path", "image_path", "filepath", "file_name", "filename", "image_name")
"""Keys and columns that name an image's file."""


class CaptionOptions(SourceOptions):
    """What all sources of captions share."""

    questions: tuple[str, ...] = QUESTIONS
    """What asks for the caption; a sample always gets the same one of them."""


class FolderOptions(CaptionOptions):
    """What sources share whose images lie in a folder."""

    path: Path
    images: Path | None = None
    """The folder that image names are relative to; None: the file's own."""
    images_outside: bool = False
    """Read images outside that folder too: absolute paths, `..`, links that lead out of it."""
    ignore: tuple[str, ...] = ()
    """Keys or columns that are not needed; other unknown ones are refused."""

    def folder(self) -> MediaFolder:
        """The folder of the images."""
        return MediaFolder(self.images or self.path.parent, outside=self.images_outside)


def caption_sample(
    image: Any, caption: Any, *, number: int, where: str, kind: Kind, questions: tuple[str, ...]
) -> Sample:
    """A question for a caption of an image, and the caption."""
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"caption must be text, found {caption!r}")
    # by the sample's own number: the same wording in every epoch and on every process
    question = questions[zlib.crc32(str(number).encode()) % len(questions)]
    conversation = Conversation.ask(question, images=[image], answer=caption.strip())
    return Sample(id=where, kind=kind, conversation=conversation)


class CocoOptions(FolderOptions):
    """A JSON file of captions and a folder of images.

    Reads COCO's own annotations, Karpathy's split file, and lists of {image, captions} or
    {image, caption}, as BLIP's.
    """

    images: Path
    split: str | tuple[str, ...] | None = None
    """Only records with this `split`, where the file has one."""

    def open(self, kind: Kind) -> CaptionSource:
        # the folder first: without it nothing else matters
        folder = self.folder()
        file = RecordFile(self.path)
        arrays = arrays_of(file)
        name = f"coco_captions {self.path.name}"
        if arrays is None or not arrays.keys & {"annotations", "images"}:
            return ListedCaptions(self, kind, folder, name=name, splits=self.split)
        if "images" not in arrays.found:
            raise DataError(f"{self.path} has no array 'images'; its keys: {_shown(arrays.keys)}")
        images = Records(file, arrays.found["images"])
        if "annotations" not in arrays.found and _has_sentences(images):
            return KarpathyCaptions(self, kind, folder, images, splits=self.split)
        if "annotations" not in arrays.found:
            raise DataError(
                f"{self.path} has no array 'annotations'; its keys: {_shown(arrays.keys)}"
            )
        annotations = Records(file, arrays.found["annotations"])
        return CocoCaptions(self, kind, folder, images, annotations)


def _shown(keys: frozenset[str]) -> str:
    return ", ".join(map(repr, sorted(keys)[:8])) or "none"


def _has_sentences(images: Records) -> bool:
    for number in range(min(len(images), 8)):
        try:
            if "sentences" in images[number]:
                return True
        except DataError:
            continue
    return False


class CaptionSource(ABC):
    """One sample a caption; a subclass says which records there are and what they hold."""

    records: Records

    def __init__(
        self, options: FolderOptions, kind: Kind, folder: MediaFolder, *, name: str
    ) -> None:
        self.options = options
        self.kind = kind
        self.folder = folder
        self.name = name
        self._record = self._caption = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._record)

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        record = self.records[int(self._record[index])]
        try:
            fields = Fields(record, ignore=self.options.ignore)
            name, caption = self._read(fields, int(self._caption[index]))
            image = self.folder.image(name)
            fields.check(shows_media=True)
            return caption_sample(
                image,
                caption,
                number=index,
                where=where,
                kind=self.kind,
                questions=self.options.questions,
            )
        except (DataError, PromptError) as error:
            raise placed(error, where) from error

    def _read(self, fields: Fields, number: int) -> tuple[Any, Any]:
        """The image's name and one of the record's captions."""
        raise NotImplementedError

    def text(self, index: int) -> str:
        """A caption by itself; its image is not looked for."""
        fields = Fields(self.records[int(self._record[index])], ignore=self.options.ignore)
        _, caption = self._read(fields, int(self._caption[index]))
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"caption must be text, found {caption!r}")
        return caption.strip()

    def where(self, index: int) -> str:
        return (
            f"{self.records.where(int(self._record[index]))} "
            f"caption {int(self._caption[index]) + 1}"
        )

    def listed_together(self) -> np.ndarray:
        """For each caption a number that those share which the file lists together."""
        return self._record

    @abstractmethod
    def groups(self) -> np.ndarray | None:
        """For each caption a number that those of one image share."""

    def fingerprint(self) -> str:
        return f"{self.options!r}{self.records.file.version}"


class ListedCaptions(CaptionSource):
    """Records that each name an image and hold its captions, or one of them."""

    _CAPTIONS: tuple[str, ...] = ("captions", "caption", "text")

    def __init__(
        self,
        options: FolderOptions,
        kind: Kind,
        folder: MediaFolder,
        *,
        name: str,
        splits: str | tuple[str, ...] | None = None,
        records: Records | None = None,
    ) -> None:
        super().__init__(options, kind, folder, name=name)
        keys = (*IMAGE_KEYS, *self._CAPTIONS, "url")
        self.records = records or JsonRecords(options.path, record_keys=keys)
        wanted = (splits,) if isinstance(splits, str) else splits
        pairs = np.array(list(self._captions_of_records(wanted)), dtype=np.int64).reshape(-1, 2)
        self._record, self._caption = pairs[:, 0].copy(), pairs[:, 1].copy()
        if not len(pairs):
            of_split = f" of split {splits!r}" if splits else ""
            raise DataError(f"{options.path} holds no captions{of_split}")

    def _captions_of_records(self, wanted: tuple[str, ...] | None) -> Iterator[tuple[int, int]]:
        """Number of the record and of the caption; an invalid record stays one sample."""
        for number in range(len(self.records)):
            try:
                record = self.records[number]
            except DataError:
                yield number, 0
                continue
            if wanted is not None and record.get("split") not in wanted:
                continue
            given = [record[key] for key in self._CAPTIONS if isinstance(record.get(key), list)]
            count = len(given[0]) if given else 1
            yield from ((number, index) for index in range(max(1, count)))

    def _read(self, fields: Fields, number: int) -> tuple[Any, Any]:
        name = fields.value(*IMAGE_KEYS)
        # the address that an image was loaded from, next to the file; else the file's name
        url = fields.value("url")
        captions = fields.value(*self._CAPTIONS)
        if isinstance(captions, list):
            captions = captions[number]
        return (url if name is None else name), captions

    def groups(self) -> np.ndarray | None:
        return self._groups

    @cached_property
    def _groups(self) -> np.ndarray:
        """The first record of each one's image: lists of {image, caption} name it several times."""
        numbers, where = np.unique(self._record, return_inverse=True)
        first: dict[str, int] = {}
        return np.array([first.setdefault(self._image_of(n), n) for n in numbers.tolist()])[where]

    def _image_of(self, number: int) -> str:
        try:
            name, _ = self._read(Fields(self.records[number], ignore=self.options.ignore), 0)
        except DataError:
            name = None
        return repr(name) if name else f"record {number}"


class KarpathyCaptions(ListedCaptions):
    """Karpathy's split file: images with sentences."""

    _CAPTIONS = ("sentences",)

    def __init__(
        self,
        options: FolderOptions,
        kind: Kind,
        folder: MediaFolder,
        images: Records,
        *,
        splits: str | tuple[str, ...] | None,
    ) -> None:
        name = f"coco_captions {options.path.name}"
        super().__init__(options, kind, folder, name=name, splits=splits, records=images)

    def _read(self, fields: Fields, number: int) -> tuple[Any, Any]:
        inner, name = fields.value("filepath"), fields.value("filename")
        sentences = fields.value("sentences")
        if not isinstance(sentences, list):
            raise DataError(f"'sentences' must be a list, found {type(sentences).__name__}")
        sentence = sentences[number]
        caption = sentence.get("raw") if isinstance(sentence, dict) else None
        return f"{inner}/{name}" if isinstance(inner, str) and name else name, caption


class CocoCaptions(CaptionSource):
    """COCO's annotations; groups tell which captions are of one image.

    An image without a usable `id` and `file_name` is one more, invalid sample.
    """

    def __init__(
        self,
        options: CocoOptions,
        kind: Kind,
        folder: MediaFolder,
        images: Records,
        annotations: Records,
    ) -> None:
        super().__init__(options, kind, folder, name=f"coco_captions {options.path.name}")
        self.records = annotations
        self.images = images
        self._number_of: dict[str, int] = {}
        self._faults: list[tuple[int, str]] = []
        for number in range(len(images)):
            self._list_image(number)
        if not self._number_of:
            raise DataError(f"{options.path}: 'images' name no file: expected id and file_name")
        self._record = np.arange(len(annotations) + len(self._faults), dtype=np.int64)
        self._caption = np.zeros(len(self._record), dtype=np.int64)
        if not len(annotations):
            raise DataError(f"{options.path} holds no captions")

    def _list_image(self, number: int) -> None:
        try:
            record = self.images[number]
            key = _image_key(record.get("id"))
            if not isinstance(record.get("file_name"), str):
                raise DataError(f"file_name must be text, found {record.get('file_name')!r}")
        except DataError as error:
            self._faults.append((number, str(error)))
            return
        if key in self._number_of:
            self._faults.append((number, f"image id {key} stands for a second image"))
            self._number_of[key] = -1
        else:
            self._number_of[key] = number

    def __getitem__(self, index: int) -> Sample:
        self._refuse_fault(index)
        return super().__getitem__(index)

    def text(self, index: int) -> str:
        self._refuse_fault(index)
        return super().text(index)

    def _refuse_fault(self, index: int) -> None:
        if index >= len(self.records):
            reason = self._faults[index - len(self.records)][1]
            raise placed(DataError(reason), self.where(index))

    def where(self, index: int) -> str:
        if index >= len(self.records):
            return self.images.where(self._faults[index - len(self.records)][0])
        return self.records.where(index)

    def _read(self, fields: Fields, number: int) -> tuple[Any, Any]:  # noqa: ARG002
        key = _image_key(fields.value("image_id"))
        image = self._number_of.get(key)
        if image is None:
            raise DataError(f"image_id {key} is none of the file's images")
        if image < 0:
            raise DataError(f"image_id {key} stands for several images")
        return self.images[image].get("file_name"), fields.value("caption")

    def listed_together(self) -> np.ndarray:
        return self._groups

    def groups(self) -> np.ndarray | None:
        return self._groups

    @cached_property
    def _groups(self) -> np.ndarray:
        """Which annotations are of one image; those that cannot be read make one group."""
        keys = [self._key(index) for index in range(len(self))]
        numbers = {key: number for number, key in enumerate(sorted(set(keys), key=_by_number))}
        return np.fromiter((numbers[key] for key in keys), dtype=np.int64, count=len(keys))

    def _key(self, index: int) -> str:
        try:
            return _image_key(self.records[index].get("image_id"))
        except (DataError, IndexError):
            return ""


def _image_key(value: Any) -> str:
    """An image's id; some files write numbers as text, pandas writes them as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"an image's id must be a number or text, found {value!r}")
    return str(value)


def _by_number(key: str) -> tuple[bool, int, str]:
    """Sorts ids that are numbers as numbers; what has none comes before the images."""
    is_number = re.fullmatch(r"-?\d{1,30}", key) is not None
    return (bool(key) and not is_number, int(key) if is_number else -1, key)


class PairsOptions(FolderOptions):
    """A table of image paths and captions, TSV or CSV with a header line, or JSON records.

    The header names the two columns: `image`, `path` or `url`, and `caption` or `text`.
    """

    def open(self, kind: Kind) -> CaptionSource | PairsSource:
        if self.path.suffix.lower() in {".json", ".jsonl", ".ndjson"}:
            name = f"pairs {self.path.name}"
            return ListedCaptions(self, kind, self.folder(), name=name)
        return PairsSource(self, kind)


_PATH_COLUMNS = (*IMAGE_KEYS, "url")
_CAPTION_COLUMNS = ("caption", "text", "title")


class PairsSource:
    """One sample a row of the table."""

    def __init__(self, options: PairsOptions, kind: Kind) -> None:
        self.options = options
        self.kind = kind
        self.name = f"pairs {options.path.name}"
        self.folder = options.folder()
        self.file = RecordFile(options.path)
        self.delimiter = "," if options.path.suffix.lower() == ".csv" else "\t"
        spans = Spans.of(_rows(self.file))
        if not len(spans):
            raise DataError(f"{options.path} holds blank lines alone, expected a header and rows")
        try:
            header = self._cells(int(spans.starts[0]), int(spans.lengths[0]))
            self.header = [name.strip().lower() for name in header]
            self.columns = self._columns()
        except (csv.Error, UnicodeDecodeError, DataError) as error:
            raise DataError(f"{options.path}, line 1: {error}") from error
        self.spans = Spans(starts=spans.starts[1:], lengths=spans.lengths[1:])
        if not len(self.spans):
            raise DataError(f"{options.path} has a header, but no rows")
        self.lines = self.file.lines_of(self.spans.starts)

    def _columns(self) -> tuple[int, int]:
        header = self.header
        path = next((n for n in _PATH_COLUMNS if n in header), None)
        caption = next((n for n in _CAPTION_COLUMNS if n in header), None)
        if path is None or caption is None:
            kind = "comma" if self.delimiter == "," else "tab"
            shown = ", ".join(repr(name[:40]) for name in header[:4])
            raise DataError(
                f"expected a {kind}-separated header such as 'url' and 'caption', found {shown}"
            )
        for name in (path, caption):
            if header.count(name) > 1:
                raise DataError(f"two columns are called {name!r}")
        return header.index(path), header.index(caption)

    def _cells(self, start: int, length: int) -> list[str]:
        """The cells of one row."""
        text = self.file.read(start, length).decode("utf-8-sig")
        if self.delimiter != ",":
            # as the released code writes them: tabs and line ends alone count, quotes are text
            return text.split("\t")
        # not by splitlines: a caption may hold one of Unicode's other line ends
        rows = list(csv.reader(io.StringIO(text, newline="")))
        if len(rows) != 1:
            raise DataError(f"a lone carriage return splits the line in {len(rows)}")
        return rows[0]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        try:
            row = self._cells(int(self.spans.starts[index]), int(self.spans.lengths[index]))
            if len(row) <= max(self.columns):
                raise DataError(f"expected {len(self.header)} columns, found {len(row)}")
            if any(cell.strip() for cell in row[len(self.header) :]):
                raise DataError(f"has {len(row)} columns, but the header names {len(self.header)}")
            image, caption = (row[column] for column in self.columns)
            named = zip(self.header, map(_number_or_text, row), strict=False)
            read = {self.header[column] for column in self.columns}
            ignore = self.options.ignore
            check_keys(dict(named), read, ignore=ignore, shows_media=True, what="column")
            return caption_sample(
                self.folder.image(image.strip()),
                caption,
                number=index,
                where=where,
                kind=self.kind,
                questions=self.options.questions,
            )
        except (DataError, PromptError, csv.Error, UnicodeDecodeError) as error:
            raise placed(error, where) from error

    def where(self, index: int) -> str:
        return f"{self.options.path}:{self.lines[index]}"

    def groups(self) -> np.ndarray | None:
        return None

    def fingerprint(self) -> str:
        return f"{self.options!r}{self.file.version}"


def _number_or_text(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


_REST_OF_QUOTED = re.compile(rb'(?:[^"]|"")*+"')


def _rows(file: RecordFile) -> Iterator[Span]:
    """Rows of a table; in CSV a quoted cell may hold line breaks."""
    quotes = file.path.suffix.lower() == ".csv"
    start, length, quoted = 0, 0, False
    for at, line in file.record_lines():
        if not quoted:
            start = at
        quoted = quotes and _ends_in_quotes(line, quoted=quoted)
        if quoted:
            continue
        length = at + len(line.rstrip(b"\r\n")) - start
        if start != at or not line.isspace():
            yield start, start + length
    if quoted:
        raise DataError(f"{file.path}:{file.line_of(start)}: a quoted cell never ends")


def _ends_in_quotes(line: bytes, *, quoted: bool) -> bool:
    """Whether a quoted cell goes on behind a line; as csv.reader, a quote opens one at its start.

    >>> _ends_in_quotes(b'5" nails,a.jpg', quoted=False)
    False
    """
    at = 0
    while True:
        if quoted or line[at : at + 1] == b'"':
            found = _REST_OF_QUOTED.match(line, at + (not quoted))
            if found is None:
                return True
            at = found.end()
        comma = line.find(b",", at)
        if comma < 0:
            return False
        at, quoted = comma + 1, False
