"""Questions about images with short answers: VQAv2's two files, or records that hold both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.conversation import ImageRef
from llama_adapter.data.captions import IMAGE_KEYS
from llama_adapter.data.conversations import RecordOptions
from llama_adapter.data.media import MediaFolder
from llama_adapter.data.records import JsonRecords, RecordFile, Records, arrays_of
from llama_adapter.data.samples import Kind, Sample, placed
from llama_adapter.data.turns import Fields, Media, Turn, conversation_of
from llama_adapter.errors import DataError, PromptError

_ANSWER = ("answer", "multiple_choice_answer")


class VqaOptions(RecordOptions):
    """VQAv2's questions and annotations, or a list of {image, question, answer or answers}."""

    images: Path
    annotations: Path | None = None
    """The file of answers, where `path` holds questions alone."""
    split: str | tuple[str, ...] | None = None
    """Only records with this `split`, where the file has one."""

    def open(self, kind: Kind) -> VqaSource:
        return VqaSource(self, kind)


class VqaSource:
    """One sample a question; of several answers the most frequent is learned."""

    def __init__(self, options: VqaOptions, kind: Kind) -> None:
        self.folder = MediaFolder(options.images, outside=options.images_outside)
        self.options = options
        self.kind = kind
        self.name = f"vqa {options.path.name}"
        file = RecordFile(options.path)
        arrays = arrays_of(file)
        self._answers: _Answers | None = None
        self._images_of = ""
        if arrays is not None and "questions" in arrays.found:
            self.records = Records(file, arrays.found["questions"])
            self._answers = _Answers(options.annotations or options.path)
            self._images_of = str(arrays.value.get("data_subtype", ""))
        else:
            keys = (*IMAGE_KEYS, *_ANSWER, "question")
            self.records = JsonRecords(options.path, record_keys=keys)
        self._numbers = np.array(list(self._chosen()), dtype=np.int64)
        self._faults: list[str] = []
        if self._answers is not None:
            asked = {self._question_id(number) for number in range(len(self.records))}
            self._faults = self._answers.unasked(asked)
        if not len(self._numbers):
            of_split = f" of split {options.split!r}" if options.split else ""
            raise DataError(f"{options.path} holds no questions{of_split}")

    def _chosen(self) -> Iterator[int]:
        split = self.options.split
        wanted = (split,) if isinstance(split, str) else split
        for number in range(len(self.records)):
            if wanted is None or self._field(number, "split", wanted[0]) in wanted:
                yield number

    def _field(self, number: int, key: str, default: Any) -> Any:
        """A value of a record; the default where the record cannot be read."""
        try:
            return self.records[number].get(key)
        except DataError:
            return default

    def _question_id(self, number: int) -> str | None:
        return _key(self._field(number, "question_id", None))

    def __len__(self) -> int:
        return len(self._numbers) + len(self._faults)

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        if index >= len(self._numbers):
            raise DataError(f"{where}: is an answer to no question of {self.options.path}")
        record = self.records[int(self._numbers[index])]
        try:
            fields = Fields(record, ignore=self.options.ignore)
            image = self._image(fields)
            question = fields.text("question")
            answered = fields if self._answers is None else self._annotation(fields)
            answer = _answer_of(answered)
            for read in (fields, answered):
                read.check(shows_media=True)
            turns = [Turn("user", question), Turn("assistant", answer)]
            conversation = conversation_of(turns, Media(images=(image,)))
            return Sample(id=where, kind=self.kind, conversation=conversation)
        except (DataError, PromptError) as error:
            raise placed(error, where) from error

    def _image(self, fields: Fields) -> ImageRef:
        name, number = fields.value(*IMAGE_KEYS), fields.value("image_id")
        if name is not None or not isinstance(number, int):
            return self.folder.image(name)
        # as COCO names its files, by year and number or by number alone
        names = [f"COCO_{self._images_of}_{number:012d}.jpg", f"{number:012d}.jpg"]
        try:
            return self.folder.image(names[0])
        except DataError:
            return self.folder.image(names[1])

    def _annotation(self, fields: Fields) -> Fields:
        assert self._answers is not None
        found = self._answers.of(_key(fields.value("question_id")))
        if found.get("image_id") != fields.record.get("image_id"):
            raise DataError("its annotation is of another image")
        return Fields(found, ignore=self.options.ignore)

    def where(self, index: int) -> str:
        if index >= len(self._numbers):
            return self._faults[index - len(self._numbers)]
        return self.records.where(int(self._numbers[index]))

    def groups(self) -> np.ndarray | None:
        return self._groups

    @cached_property
    def _groups(self) -> np.ndarray:
        """Which questions are about one image."""
        groups: dict[str, int] = {}
        found = np.zeros(len(self), dtype=np.int64)
        for index in range(len(self)):
            image = f"#{index}"
            if index < len(self._numbers):
                number = int(self._numbers[index])
                names = (self._field(number, key, None) for key in (*IMAGE_KEYS, "image_id"))
                image = next((repr(name) for name in names if name is not None), image)
            found[index] = groups.setdefault(image, len(groups))
        return found

    def fingerprint(self) -> str:
        answers = "" if self._answers is None else self._answers.records.file.version
        return f"{self.options!r}{self.records.file.version}{answers}"


class _Answers:
    """Annotations by the id of their question."""

    def __init__(self, path: Path) -> None:
        file = RecordFile(path)
        arrays = arrays_of(file)
        if arrays is None or "annotations" not in arrays.found:
            raise DataError(
                f"{path} has no array 'annotations': name the file of answers by `annotations`"
            )
        self.records = Records(file, arrays.found["annotations"])
        self._number_of: dict[str, int] = {}
        self._unread: list[int] = []
        for number in range(len(self.records)):
            try:
                key = _key(self.records[number].get("question_id"))
            except DataError:
                key = None
            if key is None:
                self._unread.append(number)
            else:
                self._number_of[key] = -1 if key in self._number_of else number

    def of(self, key: str | None) -> Any:
        """The annotation of a question; DataError where there is none, or several."""
        number = None if key is None else self._number_of.get(key)
        if number is None:
            raise DataError(f"question_id {key} has no annotation")
        if number < 0:
            raise DataError(f"question_id {key} has several annotations")
        return self.records[number]

    def unasked(self, asked: set[str | None]) -> list[str]:
        """Where the annotations are that belong to none of the questions."""
        lost = [n for key, n in self._number_of.items() if key not in asked and n >= 0]
        return [self.records.where(number) for number in sorted((*self._unread, *lost))]


def _answer_of(fields: Fields) -> str:
    """The answer named as such, or the most frequent of all."""
    listed = fields.value("answers")
    named = fields.text(*_ANSWER, optional=True)
    if named:
        return named
    given = listed if isinstance(listed, list) else []
    texts: list[Any] = [each.get("answer") if isinstance(each, dict) else each for each in given]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"'answer' must be text or 'answers' a list of it, found {listed!r}"[:200])
    most_frequent: str = Counter(texts).most_common(1)[0][0]
    return most_frequent


def _key(value: Any) -> str | None:
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
