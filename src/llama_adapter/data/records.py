"""Where each record of a file starts: JSON arrays, JSON lines and tables, read one at a time.

Only places stay in memory, 20 bytes a record. A file is opened by whichever process reads
it; records are read with `pread`, which shares no position between processes.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import DataError

_CHUNK = 1 << 24
_JSON_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]"]', re.DOTALL)
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Where records lie in a file."""

    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def of(cls, found: Iterator[tuple[int, int]]) -> Spans:
        """From pairs of first byte and the one after the last."""
        flat = np.fromiter((value for span in found for value in span), dtype=np.int64)
        pairs = flat.reshape(-1, 2)
        return cls(starts=pairs[:, 0].copy(), lengths=pairs[:, 1] - pairs[:, 0])


class RecordFile:
    """A file that is read a few bytes at a time, from any process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if path.is_dir():
            raise DataError(f"{path} is a folder, expected a file")
        if status.st_size == 0:
            raise DataError(f"{path} is empty (0 bytes), expected records")
        self.size = status.st_size
        self.version = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"

    def read(self, start: int, length: int) -> bytes:
        """Bytes from somewhere in the file."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        return os.pread(self._descriptor, length, start)

    def line_of(self, offset: int) -> int:
        """The line, counted from 1, that a byte lies on."""
        return int(self.lines_of(np.array([offset]))[0])

    def lines_of(self, offsets: np.ndarray) -> np.ndarray:
        """The lines, counted from 1, that bytes in rising order lie on."""
        lines = np.empty(len(offsets), dtype=np.int32)
        before, first = 1, 0
        for start in range(0, int(offsets.max(initial=0)) + 1, _CHUNK):
            chunk = np.frombuffer(self.read(start, _CHUNK), dtype=np.uint8)
            ends = np.flatnonzero(chunk == ord("\n"))
            last = int(np.searchsorted(offsets, start + len(chunk)))
            lines[first:last] = before + np.searchsorted(ends, offsets[first:last] - start)
            before, first = before + len(ends), last
        return lines

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


class JsonRecords:
    """Objects of a JSON array, of JSON lines, or of one array inside a JSON object.

    Raises DataError for a file that is neither. A record is checked when it is read.
    """

    def __init__(self, path: Path, *, key: str | None = None) -> None:
        """`key` names the array to read, where the file is one object that holds arrays."""
        self.file = RecordFile(path)
        self.spans = self._find(key)
        if not len(self.spans):
            raise DataError(f"{path} holds no records")
        self.lines = self.file.lines_of(self.spans.starts)

    def _find(self, key: str | None) -> Spans:
        head = self.file.read(0, 4096)
        first = _NOT_BLANK.search(head, len(_BOM) if head.startswith(_BOM) else 0)
        if first is None:
            raise DataError(f"{self.file.path} begins with blanks, expected JSON")
        start = first.start()
        if head[start : start + 1] == b"[":
            return Spans.of(_array_items(self.file, start))
        if head[start : start + 1] != b"{":
            raise DataError(
                f"{self.file.path}, line 1: expected a JSON array or JSON lines, "
                f"found {head[start : start + 20]!r}"
            )
        if key is None:
            return Spans.of(_lines(self.file, start))
        array = _array_of(self.file, key)
        return Spans.of(_array_items(self.file, array))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One record; DataError says what is malformed on which line."""
        start, length = int(self.spans.starts[index]), int(self.spans.lengths[index])
        data = self.file.read(start, length)
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            # no JSON, no UTF-8, a number of thousands of digits, or brackets without end
            raise DataError(f"{self.where(index)}: malformed JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{self.where(index)}: expected an object, found {type(record).__name__}"
            )
        return record

    def where(self, index: int) -> str:
        """File and line, `data.json:17`; the record's number too, where one line holds them all."""
        place = f"{self.file.path}:{self.lines[index]}"
        in_one_line = len(self) > 1 and self.lines[0] == self.lines[-1]
        return f"{place} record {index + 1}" if in_one_line else place


def _lines(file: RecordFile, start: int) -> Iterator[tuple[int, int]]:
    """Lines that are not blank."""
    with file.path.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            end = start + len(line)
            if not line.isspace():
                yield start, start + len(line.rstrip())
            start = end


def _marks(file: RecordFile, start: int) -> Iterator[tuple[int, bytes]]:
    """Brackets and strings of a JSON text; the bytes of a string are cut to 64."""
    with (
        file.path.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text,
    ):
        released = 0
        for mark in _JSON_MARKS.finditer(text, start):
            at = mark.start()
            if text[at : at + 1] == b'"':
                if mark.end() == at + 1:
                    line = file.line_of(at)
                    raise DataError(f"{file.path}:{line}: malformed JSON: a string never ends")
                yield at, text[at : min(mark.end(), at + 64)]
            else:
                yield at, text[at : at + 1]
            if at - released > 4 * _CHUNK and hasattr(text, "madvise"):
                # pages already read would count as memory of this process
                done = at // mmap.PAGESIZE * mmap.PAGESIZE
                text.madvise(mmap.MADV_DONTNEED, released, done - released)
                released = done


def _array_items(file: RecordFile, start: int) -> Iterator[tuple[int, int]]:
    """Objects directly inside the array that opens at `start`."""
    depth = 0
    opened = start
    for at, mark in _marks(file, start):
        if mark in b"[{":
            depth += 1
            if depth == 2:
                opened = at
        elif mark in b"]}":
            depth -= 1
            if depth == 1:
                yield opened, at + 1
            if depth == 0:
                return
    line = file.line_of(file.size - 1)
    raise DataError(f"{file.path}:{line}: malformed JSON: the array never ends")


def _array_of(file: RecordFile, key: str) -> int:
    """Where the array under a key of the outermost object opens."""
    depth = 0
    wanted = json.dumps(key).encode()
    named = False
    found = []
    for at, mark in _marks(file, 0):
        if mark in (b"{", b"["):
            if named and depth == 1 and mark == b"[":
                return at
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        elif depth == 1:
            found.append(mark.decode(errors="replace"))
        named = mark == wanted
    names = ", ".join(dict.fromkeys(found[:8])) or "none"
    raise DataError(f"{file.path} has no array {key!r}; its keys and texts: {names}")
