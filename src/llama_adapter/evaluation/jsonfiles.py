"""Reading JSON and JSON lines that others wrote, naming the place where one goes wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}: not JSON (line {error.lineno}: {error.msg})") from error
    except RecursionError as error:
        raise EvaluationError(f"{path}: not JSON of any use (nested too deeply)") from error


def read_text(path: Path, *, lenient: bool = False) -> str:
    """The content of a UTF-8 file, which must exist; `lenient` overlooks odd bytes."""
    try:
        return path.read_text(
            encoding="utf-8-sig", errors="backslashreplace" if lenient else "strict"
        )
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON-lines file, and whether its last line was cut short.

    A killed run leaves half a line at the end and nothing else is forgiven.
    """
    rows: list[dict[str, Any]] = []
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and len(lines) > 1:
                return rows, True
            raise EvaluationError(f"{path}: line {number} is not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise EvaluationError(
                f"{path}: line {number} must be an object, found {type(row).__name__}"
            )
        rows.append(row)
    return rows, False


def read_any(path: Path) -> tuple[Any, bool]:
    """A JSON document, or the objects of JSON lines or a CSV; and whether the last was cut short.

    Names say little: there are result files called `.json` that hold lines of objects.
    """
    if path.suffix.lower() == ".csv":
        return list(csv.DictReader(read_text(path).splitlines())), False
    text = read_text(path).strip()
    first, _, rest = text.partition("\n")
    if path.suffix.lower() == ".jsonl" and not text.startswith("["):
        return read_jsonl(path)
    return read_jsonl(path) if rest and _is_object(first) else (read_json(path), False)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def read_objects(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON list, JSON lines or a CSV; and whether the last was cut short."""
    content, is_cut = read_any(path)
    if isinstance(content, dict) and "\n" not in read_text(path).strip():
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
        return f"an object with {', '.join(map(str, list(value)[:4])) or 'nothing in it'}"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:60]


def field_of(row: Mapping[str, Any], names: Iterable[str], *, where: str) -> Any:
    """The value under the first of the names that the row has."""
    for name in names:
        if name in row and row[name] is not None:
            return row[name]
    expected = " or ".join(names)
    raise EvaluationError(f"{where} lacks {expected}; it has {', '.join(map(str, row)) or 'none'}")


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
            raise EvaluationError(f"{where}: id {id_!r} comes twice")
        seen.add(id_)
        yield id_
