"""Reading JSON and JSON lines that others wrote, naming the place where one goes wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}: not JSON (line {error.lineno}: {error.msg})") from error


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, which must exist."""
    try:
        return path.read_text(encoding="utf-8-sig")
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


def read_objects(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON list, JSON lines or a CSV; and whether the last was cut short."""
    if path.suffix == ".csv":
        return list(csv.DictReader(read_text(path).splitlines())), False
    if read_text(path).lstrip().startswith("["):
        rows = read_json(path)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise EvaluationError(f"{path}: item {number} must be an object, found {kind}")
        return rows, False
    return read_jsonl(path)


def field_of(row: dict[str, Any], names: Iterable[str], *, where: str) -> Any:
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
