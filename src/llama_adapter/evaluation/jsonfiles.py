"""Reading JSON and JSON lines that others wrote, naming the place where one goes wrong."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter import files
from llama_adapter.errors import EvaluationError

MAX_BYTES = 1 << 29
"""Bytes of a file of questions or answers; Karpathy's of COCO has 150 million."""
MAX_DEPTH = 64
"""Lists and objects within one another; result files have fewer than ten."""
_DOCUMENT = re.compile(r"[^ \t\r\n]")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    text = read_text(path)
    return _usable(files.parse_json(text, name=str(path), error=EvaluationError), text, path)


def read_text(path: Path, *, lenient: bool = False) -> str:
    """The content of a UTF-8 file, which must exist; `lenient` overlooks odd bytes."""
    if not lenient:
        return files.read_text(path, error=EvaluationError, limit=MAX_BYTES)
    content = files.read_bytes(path, error=EvaluationError, limit=MAX_BYTES)
    return content.decode("utf-8-sig", errors="backslashreplace").replace("\r\n", "\n")


def _usable(value: Any, text: str, path: Path) -> Any:
    """The value, without lone surrogates, which no file or terminal takes; not absurdly deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in inner for item in part if isinstance(item, dict | list)]
        if not level:
            break
    else:
        raise EvaluationError(f"{path}: is nested in more than {MAX_DEPTH} lists and objects")
    if "\\ud" not in text.lower():
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _documents(path: Path) -> tuple[list[Any], bool]:
    """The JSON documents that follow one another in a file, and whether its last line is cut.

    A killed run leaves half a line at the end and nothing else is forgiven.
    """
    text = read_text(path)
    found: list[Any] = []
    end = 0
    while begin := _DOCUMENT.search(text, end):
        try:
            value, end = files.next_json(text, begin.start(), name=str(path), error=EvaluationError)
        except EvaluationError as error:
            is_damaged = isinstance(error.__cause__, json.JSONDecodeError)
            if found and is_damaged and "\n" not in text[begin.start() :].strip():
                return _usable(found, text, path), True
            raise
        found.append(value)
    return _usable(found, text, path), False


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON-lines file, and whether its last line was cut short."""
    rows, is_cut = _documents(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}: line {number} must be an object, found {brief(row)}")
    return rows, is_cut


def read_any(path: Path, *, marks: Iterable[str] = ()) -> tuple[Any, bool]:
    """A JSON document, or the objects of JSON lines or a CSV; and whether the last was cut short.

    Names say little: there are result files called `.json` that hold lines of objects, and
    pretty-printed documents called `.jsonl`. A lone object with one of the `marks` among its keys
    is a list of one record.
    """
    if path.suffix.lower() == ".csv":
        return _table(path), False
    documents, is_cut = _documents(path)
    documents = [
        _from_samples(document, where=f"{path}: line {n}")
        for n, document in enumerate(documents, start=1)
    ]
    if not documents:
        raise EvaluationError(f"{path}: is empty")
    if len(documents) == 1 and not is_cut:
        content = documents[0]
        is_record = isinstance(content, dict) and any(m in content for m in (*marks, _DOC_ID))
        return ([content] if is_record else content), False
    for number, row in enumerate(documents, start=1):
        if not isinstance(row, dict):
            raise EvaluationError(
                f"{path}: expected one JSON document or lines of objects; document {number} of "
                f"{len(documents)} is {brief(row)}"
            )
    return documents, is_cut


_DOC_ID = "doc_id"
_ANSWERS = frozenset((
    "answer", "text", "caption", "pred", "prediction", "output", "response", "predicted_answer",
))  # fmt: skip


def _from_samples(line: Any, *, where: str) -> Any:
    """A line of lmms-eval's `*_samples_*.jsonl` as a record with `pred`; anything else as it is.

    Its `doc` is the benchmark's own record; the right answer in it must not pass for the model's.
    """
    if not isinstance(line, dict) or not {_DOC_ID, "filtered_resps"} <= line.keys():
        return line
    doc, said, reference = line.get("doc"), line["filtered_resps"], line.get("target")
    if not isinstance(doc, dict):
        raise EvaluationError(
            f"{where}: is one of lmms-eval's samples and lacks doc, the benchmark's own record"
        )
    while isinstance(said, list) and said:
        said = said[0]
    if not isinstance(said, str):
        raise EvaluationError(
            f"{where}: filtered_resps of lmms-eval's samples must hold a text, found {brief(said)}"
        )
    record = {name: value for name, value in doc.items() if name.lower() not in _ANSWERS}
    right = doc.get("answer", reference)
    if isinstance(right, str | int | float):
        record["gt"] = right
    return {"id": f"#{line[_DOC_ID]}", **record, "pred": said}


def _table(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV with a header."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise EvaluationError(f"{path}: is not a table: {error}") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise EvaluationError(f"{path}: row {number} has not as many fields as the header")
    return rows


def lines_to_append(path: Path) -> files.JsonLines:
    """A file of JSON lines without half a line at its end, which a killed run may have left."""
    lines = files.JsonLines(path, error=EvaluationError)
    lines.drop_partial_line(limit=MAX_BYTES)
    path.touch()
    return lines


def read_objects(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON list, JSON lines or a CSV; and whether the last was cut short."""
    content, is_cut = read_any(path)
    is_line = "\n" not in read_text(path).strip() if isinstance(content, dict) else False
    if isinstance(content, dict) and (is_line or path.suffix.lower() == ".jsonl"):
        content = [content]
    if not isinstance(content, list):
        raise EvaluationError(f"{path}: expected a list of objects, found {brief(content)}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}: item {number} must be an object, found {brief(row)}")
    return content, is_cut


def brief(value: Any) -> str:
    """What a JSON value is, for a message.

    >>> brief({"a": 1, "b": 2}), brief("hm"), brief([1, 2])
    ('an object with a, b', "'hm'", 'a list of 2')
    """
    if isinstance(value, dict):
        return f"an object with {keys_of(value)}"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:60]


def keys_of(row: Mapping[Any, Any]) -> str:
    """The first few keys of an object, for a message."""
    shown = [key if key.isprintable() else repr(key) for key in map(str, list(row)[:8])]
    return ", ".join(key[:40] for key in shown) or "nothing in it"


def lowered(item: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its keys in lower case: files differ in it."""
    return {name.strip().lower(): value for name, value in item.items()}


def field_of(row: Mapping[str, Any], names: Sequence[str], *, where: str) -> Any:
    """The value under the first of the names that the row has."""
    for name in names:
        if name in row and row[name] is not None:
            return row[name]
    raise EvaluationError(f"{where} lacks {' or '.join(names)}; it has {keys_of(row)}")


@dataclass(frozen=True, slots=True)
class Item:
    """An object of a file, and what messages call it."""

    fields: dict[str, Any]
    where: str

    def value(self, *names: str) -> Any:
        """What is under the first of the names that the object has; an error without any."""
        return field_of(self.fields, names, where=self.where)

    def text(self, *names: str) -> str:
        """The same as a text."""
        return text_of(self.value(*names), where=self.where)

    def id(self, *names: str) -> str:
        """The same as an id."""
        return id_of(self.value(*names), where=self.where)


def items_of(content: Iterable[Any], where: str, *, first: int = 1) -> Iterator[Item]:
    """The objects of a list, called `where` and their number; anything else is refused."""
    for number, fields in enumerate(content, start=first):
        place = f"{where} {number}"
        if not isinstance(fields, dict):
            raise EvaluationError(f"{place} must be an object, found {brief(fields)}")
        yield Item(fields, place)


def id_of(value: Any, *, where: str) -> str:
    """An id that a file gives as text or a number.

    >>> id_of("v_1", where=""), id_of(7, where=""), id_of(391895.0, where="")
    ('v_1', '7', '391895')
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise EvaluationError(f"{where}: an id must be a text or a number, found {brief(value)}")
    return str(value)


def text_of(value: Any, *, where: str) -> str:
    """A question or an answer; nothing where a file has null or NaN, as tables write it.

    >>> text_of("a dog", where=""), text_of(2, where=""), text_of(None, where="")
    ('a dog', '2', '')
    >>> text_of(["a dog"], where="")
    'a dog'
    """
    match value:
        case str():
            return value
        case None:
            return ""
        case float():
            return str(value) if math.isfinite(value) else ""
        case bool() | int():
            return str(value)
        case [str() as only]:
            return only
        case _:
            raise EvaluationError(f"{where}: expected a text, found {brief(value)}")


def find_file(path: Path, patterns: Iterable[str], *, what: str) -> Path:
    """The file itself, or the one in the folder that fits the first fitting pattern."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise EvaluationError(f"{path}: no such file or folder; expected {what}")
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(p.relative_to(path)) for p in found[:4])
            raise EvaluationError(f"{path}: {names} could all be {what}; name the one you mean")
        if found:
            return found[0]
    raise EvaluationError(f"{path}: lacks {what} (looked for {', '.join(patterns)})")


def unique(ids: Iterable[str], *, where: str) -> Iterator[str]:
    """The ids again, refusing one that comes twice."""
    seen: set[str] = set()
    for id_ in ids:
        if id_ in seen:
            raise EvaluationError(f"{where}: id {brief(id_)} comes twice")
        seen.add(id_)
        yield id_
