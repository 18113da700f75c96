"""The user's own texts, cut into passages that say where they come from."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from llama_adapter.errors import DataError, import_extra
from llama_adapter.files import parse_json, read_bytes

SUFFIXES = frozenset({".txt", ".md", ".markdown", ".rst", ".text", ".jsonl", ".json", ".pdf"})
MAX_FILE_BYTES = 64 * 2**20
"""Larger files are left out, and named."""
PASSAGE_WORDS = 120
"""About as many words make a passage; paragraphs stay whole where they are shorter."""
PASSAGE_CHARACTERS = 8000
"""Most characters of a passage: text without blanks is cut there."""

_TEXT_KEYS = ("text", "content", "body", "passage", "answer", "output", "caption")
_TITLE_KEYS = ("title", "question", "instruction", "name", "id")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A stretch of a text."""

    text: str
    source: str
    """`notes.md:12` for a line, `manual.pdf, page 3`, `faq.jsonl:4` for a record."""


def text_files(folder: Path) -> list[Path]:
    """Every file below the folder that holds text, in order.

    Hidden ones are left out, and links that lead out of the folder: who may write into the
    folder could otherwise have any file of this machine read.
    """
    home = folder.resolve()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and path.resolve().is_relative_to(home)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def passages_of(path: Path, *, name: str) -> list[Passage]:
    """The passages of one file; DataError saying why it holds none that can be read."""
    data = read_bytes(path, error=DataError, limit=MAX_FILE_BYTES, name=name)
    if path.suffix.lower() == ".pdf":
        return list(_of_pdf(data, name))
    if b"\0" in data[:4096]:
        raise DataError(f"{name}: is not a text")
    text = data.decode("utf-8-sig", errors="replace")
    match path.suffix.lower():
        case ".jsonl":
            return list(_of_lines(text, name))
        case ".json":
            return list(_of_json(text, name))
        case _:
            return list(_of_text(text, name))


def _of_text(text: str, name: str) -> Iterator[Passage]:
    """Paragraphs joined or split to about PASSAGE_WORDS words; headings go with what follows."""
    start, words = 1, 0
    gathered: list[str] = []
    for line, paragraph in _paragraphs(text):
        for piece in _pieces(paragraph):
            size = len(piece.split())
            if gathered and (words + size > PASSAGE_WORDS or piece.startswith("#")):
                yield Passage(text=" ".join(gathered), source=f"{name}:{start}")
                gathered, words = [], 0
            if not gathered:
                start = line
            gathered.append(piece)
            words += size
    if gathered:
        yield Passage(text=" ".join(gathered), source=f"{name}:{start}")


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs with the number of their first line."""
    numbered = enumerate(text.splitlines(), start=1)
    for is_text, group in groupby(numbered, lambda line: bool(line[1].strip())):
        if is_text:
            lines = list(group)
            yield lines[0][0], " ".join(line.strip() for _, line in lines)


def _pieces(paragraph: str) -> Iterator[str]:
    """A long paragraph in sentences, a long sentence in words, a long word in characters."""
    if len(paragraph.split()) <= PASSAGE_WORDS:
        pieces = [paragraph]
    else:
        sentences = (sentence.split() for sentence in _SENTENCE_END.split(paragraph))
        pieces = [
            " ".join(words[start : start + PASSAGE_WORDS])
            for words in sentences
            for start in range(0, len(words), PASSAGE_WORDS)
        ]
    for piece in pieces:
        for start in range(0, len(piece), PASSAGE_CHARACTERS):
            yield piece[start : start + PASSAGE_CHARACTERS]


def _of_lines(text: str, name: str) -> Iterator[Passage]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            record = parse_json(line, name=f"{name}: line {number}", error=DataError)
            yield from _of_record(record, source=f"{name}:{number}")


def _of_json(text: str, name: str) -> Iterator[Passage]:
    content = parse_json(text, name=name, error=DataError)
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        yield from _of_record(record, source=f"{name}, record {number}")


def _of_record(record: Any, *, source: str) -> Iterator[Passage]:
    """A record's title and text; of one without either, all that is text in it."""
    if isinstance(record, str):
        text = record
    elif isinstance(record, dict):
        keys = [key for key in (*_TITLE_KEYS, *_TEXT_KEYS) if isinstance(record.get(key), str)]
        if not any(key in _TEXT_KEYS for key in keys):
            keys = [key for key, value in record.items() if isinstance(value, str)]
        text = ". ".join(record[key].strip().rstrip(".") for key in keys if record[key].strip())
    else:
        return
    for piece in _pieces(" ".join(text.split())):
        if piece:
            yield Passage(text=piece, source=source)


def _of_pdf(data: bytes, name: str) -> Iterator[Passage]:
    pypdf = import_extra("pypdf", extra="search", purpose="reading PDF files")
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    except Exception as error:  # a damaged file makes pypdf raise whatever it runs into
        raise DataError(f"{name}: cannot be read as a PDF ({str(error)[:200]})") from error
    if not any(page.strip() for page in pages):
        raise DataError(f"{name}: holds images of text, but no text")
    for number, page in enumerate(pages, start=1):
        for passage in _of_text(page, name):
            yield Passage(text=passage.text, source=f"{name}, page {number}")
