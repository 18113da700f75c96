"""Where each record of a file starts: JSON arrays, JSON lines and tables, read one at a time.

Only places stay in memory, 24 bytes a record. A file is opened by whichever process reads
it; records are read with `pread`, which shares no position between processes. Every value of a
file is a record, malformed text between values too, so that nothing vanishes uncounted.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_adapter.errors import DataError
from llama_adapter.files import open_regular, parse_json

MAX_RECORD_BYTES = 1 << 26
"""Bytes of one record, of one line, and of one value in JSON; longer ones are not read."""

_CHUNK = 1 << 24
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
# strings, brackets, commas, and runs of whatever else there is
_TOKENS = re.compile(_STRING + rb'|[{}\[\],"]|[^ \t\r\n{}\[\],"]++', re.DOTALL)
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_ENCODINGS = {  # the longer marks first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "compressed (gzip)",
}

Span = tuple[int, int]
"""First byte and the one after the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Where records lie in a file."""

    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def of(cls, found: Iterator[Span]) -> Spans:
        """From pairs of first byte and the one after the last."""
        flat = np.fromiter((value for span in found for value in span), dtype=np.int64)
        pairs = flat.reshape(-1, 2)
        return cls(starts=pairs[:, 0].copy(), lengths=pairs[:, 1] - pairs[:, 0])


class RecordFile:
    """A regular UTF-8 file that is read a few bytes at a time, from any process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = open_regular(path, error=DataError)
        status = os.fstat(self._file.fileno())
        if status.st_size == 0:
            raise DataError(f"{path} is empty (0 bytes), expected records")
        self.size = status.st_size
        self.version = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        head = self.read(0, 4)
        found = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)
        if found or (head.startswith((b"[\0", b"{\0", b"\0[", b"\0{"))):
            raise DataError(f"{path} is {found or 'UTF-16'}, expected UTF-8 text")

    def read(self, start: int, length: int) -> bytes:
        """Bytes from somewhere in the file."""
        if self._file is None:
            self._file = open_regular(self.path, error=DataError)
        try:
            return os.pread(self._file.fileno(), length, start)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error

    def record_lines(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """First byte and content of each line; DataError for one of `MAX_RECORD_BYTES`."""
        with open_regular(self.path, error=DataError) as lines:
            lines.seek(start)
            while line := lines.readline(MAX_RECORD_BYTES):
                if len(line) == MAX_RECORD_BYTES:
                    raise DataError(
                        f"{self.path}:{self.line_of(start)}: the line has more than "
                        f"{MAX_RECORD_BYTES} bytes"
                    )
                yield start, line
                start += len(line)

    def line_of(self, offset: int) -> int:
        """The line, counted from 1, that a byte is on."""
        return int(self.lines_of(np.array([offset]))[0])

    def lines_of(self, offsets: np.ndarray) -> np.ndarray:
        """The lines, counted from 1, that bytes in rising order lie on."""
        lines = np.empty(len(offsets), dtype=np.int64)
        before, first = 1, 0
        for start in range(0, int(offsets.max(initial=0)) + 1, _CHUNK):
            chunk = np.frombuffer(self.read(start, _CHUNK), dtype=np.uint8)
            ends = np.flatnonzero(chunk == ord("\n"))
            last = int(np.searchsorted(offsets, start + len(chunk)))
            lines[first:last] = before + np.searchsorted(ends, offsets[first:last] - start)
            before, first = before + len(ends), last
        return lines

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # type: ignore[union-attr]


class Records:
    """JSON values of a file by number; each is checked when it is read."""

    def __init__(self, file: RecordFile, spans: Spans) -> None:
        self.file = file
        self.spans = spans
        self.lines = file.lines_of(spans.starts)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One record; DataError says what is malformed on which line."""
        start, length = int(self.spans.starts[index]), int(self.spans.lengths[index])
        where = self.where(index)
        if length > MAX_RECORD_BYTES:
            raise DataError(f"{where}: has {length} bytes, at most {MAX_RECORD_BYTES} are read")
        try:
            text = self.file.read(start, length).removeprefix(codecs.BOM_UTF8).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: the record is not UTF-8 text: {error}") from error
        record = parse_json(text, name=f"{where}: the record", error=DataError)
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, found {type(record).__name__}")
        return record

    def where(self, index: int) -> str:
        """File and line, `data.json:17`; the record's number too, where a line holds several."""
        around = self.lines[max(0, index - 1) : index + 2]
        place = f"{self.file.path}:{self.lines[index]}"
        shares_its_line = int((around == self.lines[index]).sum()) > 1
        return f"{place} record {index + 1}" if shares_its_line else place


class JsonRecords(Records):
    """The records of a JSON text: objects one after the other, or in arrays.

    A file that is one object holding one array, `{"data": [...]}`, means the array's records.
    Raises DataError for a file that is neither.
    """

    def __init__(self, path: Path, *, record_keys: Collection[str] = ()) -> None:
        """`record_keys` are those of a record: an object that has one of them is not a wrapper."""
        file = RecordFile(path)
        spans = Spans.of(_records(file))
        if len(spans) == 1:
            arrays = arrays_of(file, int(spans.starts[0]))
            if arrays and len(arrays.found) == 1 and not arrays.keys & set(record_keys):
                [spans] = arrays.found.values()
        if not len(spans):
            raise DataError(f"{path} holds no records")
        super().__init__(file, spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrays:
    """What is directly inside the only object of a file."""

    value: Mapping[str, Any]
    """The object with its arrays emptied."""
    found: Mapping[str, Spans]
    """The items of each array, by its key."""

    @property
    def keys(self) -> frozenset[str]:
        """All keys of the object."""
        return frozenset(self.value)


def arrays_of(file: RecordFile, start: int | None = None) -> Arrays | None:
    """The arrays of a file that is one JSON object; None for any other file.

    DataError where the object is malformed outside its arrays, or has a key twice.
    """
    start = _start(file) if start is None else start
    if file.read(start, 1) != b"{":
        return None
    found: list[list[Span]] = []
    kept: list[Span] = []
    depth, after = 0, start
    items = _Items()
    for at, end, token in _tokens(file, start):
        if depth == 0 and at > start:
            return None  # more follows the object
        if token in b"{[":
            depth += 1
            if depth == 2 and token == b"[":
                kept.append((after, end))
                items = _Items()
                found.append(items.done)
                after = -1
                continue
        elif token in b"}]":
            depth -= 1
            if depth == 1 and after == -1:
                items.close()
                after = at
            if depth == 0:
                kept.append((after, end))
                continue
        if after == -1:
            items.take(at, end, separates=depth == 2 and token == b",")
    if depth:
        return None
    value = _without_items(file, kept)
    names = [key for key, inner in value.items() if inner == []]
    if len(names) != len(found):
        raise DataError(f"{file.path} is not valid JSON: brackets do not fit")
    spans = {key: Spans.of(iter(of)) for key, of in zip(names, found, strict=True)}
    return Arrays(value=value, found=spans)


def _without_items(file: RecordFile, kept: list[Span]) -> Mapping[str, Any]:
    """An object whose arrays are emptied: the parts of its text that are kept."""
    if sum(end - start for start, end in kept) > MAX_RECORD_BYTES:
        raise DataError(f"{file.path} holds more than {MAX_RECORD_BYTES} bytes outside its arrays")
    text = b"".join(file.read(start, end - start) for start, end in kept).decode(errors="replace")
    value: Mapping[str, Any] = parse_json(text, name=str(file.path), error=DataError)
    return value


class _Items:
    """Stretches between commas, each from its first token to its last."""

    def __init__(self) -> None:
        self.done: list[Span] = []
        self._first = self._last = -1
        self._separated = False

    def take(self, at: int, end: int, *, separates: bool) -> None:
        """One more token; one that separates ends an item, an empty one too."""
        if separates:
            self.done.append((self._first, self._last) if self._first >= 0 else (at, end))
            self._first, self._separated = -1, True
            return
        if self._first < 0:
            self._first = at
        self._last = end

    def close(self) -> None:
        """The array ends here."""
        if self._first >= 0:
            self.done.append((self._first, self._last))
        elif self._separated:
            # a comma and nothing behind it: malformed, and counted as the comma
            self.done.append((self.done[-1][1], self.done[-1][1] + 1))


def _start(file: RecordFile) -> int:
    """The first byte of a file that is neither blank nor a byte-order mark."""
    head = file.read(0, 4096)
    mark = codecs.BOM_UTF8
    first = _NOT_BLANK.search(head, len(mark) if head.startswith(mark) else 0)
    if first is None:
        raise DataError(f"{file.path} begins with blanks, expected JSON")
    return first.start()


def _records(file: RecordFile) -> Iterator[Span]:
    start = _start(file)
    head = file.read(start, 20)
    if head[:1] not in b"[{":
        raise DataError(f"{file.path}, line 1: expected a JSON array or JSON lines, found {head!r}")
    if head.startswith(b"{") and _is_json_lines(file, start):
        return _lines(file, start)
    return _values(file, start)


def _is_json_lines(file: RecordFile, start: int) -> bool:
    """Whether one of the first two lines is an object: one of them may be damaged."""
    try:
        lines = (line for _, line in file.record_lines(start) if not line.isspace())
        return any(_is_object(line) for line, _ in zip(lines, range(2), strict=False))
    except DataError:  # one line without end
        return False


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _lines(file: RecordFile, start: int) -> Iterator[Span]:
    """Lines that are not blank."""
    for at, line in file.record_lines(start):
        if not line.isspace():
            yield at, at + len(line.rstrip())


def _values(file: RecordFile, start: int) -> Iterator[Span]:
    """Values that follow one another, arrays opened; what is between them is malformed."""
    depth = 0
    first = last = -1  # of an object, or of what is between values
    items: _Items | None = None
    for at, end, token in _tokens(file, start):
        if depth == 0 and token in b"{[":
            if first >= 0:
                yield first, last
            first, items = at, _Items() if token == b"[" else None
            depth = 1
        elif depth == 0:
            if token == codecs.BOM_UTF8:
                continue  # files put together, each with its mark
            first, last = (first if first >= 0 else at), end
        else:
            depth += (token in b"{[") - (token in b"}]")
            if depth:
                if items is not None:
                    items.take(at, end, separates=depth == 1 and token == b",")
                    if len(items.done) > _TOGETHER:
                        last_done = items.done.pop()
                        yield from items.done
                        items.done[:] = [last_done]
                continue
            if items is None:
                yield first, end
            elif token == b"]":
                items.close()
                yield from items.done
            else:
                line = file.line_of(at)
                raise DataError(f"{file.path}:{line}: malformed JSON: an array ends with '}}'")
            first = -1
    if depth:
        line = file.line_of(file.size - 1)
        what = "object" if items is None else "array"
        raise DataError(f"{file.path}:{line}: malformed JSON: the {what} never ends")
    if first >= 0:
        yield first, last


_TOGETHER = 1000
"""Items of an array that are found before they are handed on."""


def _tokens(file: RecordFile, start: int) -> Iterator[tuple[int, int, bytes]]:
    """Tokens of a JSON text: first byte, the one after the last, and the first 8 bytes."""
    size = _CHUNK
    while start < file.size:
        chunk = file.read(start, size)
        reaches_end = start + len(chunk) >= file.size
        open_from = -1
        for found in _TOKENS.finditer(chunk):
            at, end = found.span()
            is_open = end == at + 1 and chunk[at] == 34  # a quote: the string goes on
            if is_open or (end == len(chunk) and chunk[at] not in b'{}[],"'):
                if not reaches_end:
                    open_from = at
                    break
                if is_open:
                    line = file.line_of(start + at)
                    raise DataError(f"{file.path}:{line}: malformed JSON: a string never ends")
            yield start + at, start + end, chunk[at : min(end, at + 8)]
        if not chunk:
            return  # it became shorter while it was read
        if open_from == 0:
            if size >= MAX_RECORD_BYTES:
                line = file.line_of(start)
                raise DataError(
                    f"{file.path}:{line}: malformed JSON: a value of more than "
                    f"{MAX_RECORD_BYTES} bytes"
                )
            size *= 2
            continue
        start += len(chunk) if open_from < 0 else open_from
        size = _CHUNK
