"""Reading files that anybody may have written, and writing files atomically.

Reading is bounded: only regular files (a pipe would be waited for, `/dev/zero` never ends), the
size is compared with a limit before anything is read, and JSON and YAML are refused where they
are nested too deeply, expand through aliases or name a key twice. Every refusal is one line that
names the file; the caller says which error of `llama_adapter.errors` it becomes.

Files and directories are written under another name, synced to disk, and renamed. Lines appended
to a `JsonLines` are not synced: a kill loses none, a power failure may lose the last ones.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import stat
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from llama_adapter.errors import LlamaAdapterError

MAX_TEXT_BYTES = 1 << 26
"""Bytes of a settings or text file (JSON, YAML, plain text); larger ones are refused."""
MAX_YAML_BYTES = 1 << 20
"""Bytes of a YAML file; PyYAML takes seconds for each MiB."""
MAX_YAML_NODES = 100_000
"""Values of a YAML document with every alias written out."""

_LONGEST_LINE = 1 << 24
# What PyYAML raises for scalars and tags that make no sense, besides its own YAMLError.
_YAML_FAULTS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


def open_regular(
    path: Path,
    *,
    error: type[LlamaAdapterError],
    limit: int | None = None,
    name: str | None = None,
) -> BufferedReader:
    """Open a regular file for reading; `error` for anything else, or for more than `limit` bytes.

    Does not wait: opening a pipe, a socket or a device is refused at once. Symbolic links are
    followed. Messages call the file by its path, or by `name`.
    """
    shown = name or _shown(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as fault:  # ValueError: a null byte in the name
        reason = getattr(fault, "strerror", None) or str(fault)
        raise error(f"cannot read {shown}: {reason}") from fault
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise error(f"cannot read {shown}: it is a folder, expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise error(f"cannot read {shown}: it is not a regular file")
        if limit is not None and status.st_size > limit:
            raise error(
                f"cannot read {shown}: it has {status.st_size} bytes, at most {limit} are read"
            )
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_bytes(
    path: Path,
    *,
    error: type[LlamaAdapterError],
    limit: int = MAX_TEXT_BYTES,
    name: str | None = None,
) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    shown = name or _shown(path)
    with open_regular(path, error=error, limit=limit, name=name) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size + 1)  # Python sets aside as much as it is asked for
            if len(content) > size:  # it grew, or a file system (/proc) says 0 for any length
                content += file.read(limit - size)
        except OSError as fault:
            raise error(f"cannot read {shown}: {fault.strerror or fault}") from fault
    if len(content) > limit:
        raise error(f"cannot read {shown}: it has more than {limit} bytes")
    return content


def read_text(path: Path, *, error: type[LlamaAdapterError], limit: int = MAX_TEXT_BYTES) -> str:
    """The content of a UTF-8 file, without a byte-order mark."""
    try:
        return read_bytes(path, error=error, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(f"{_shown(path)} is not UTF-8 text (byte {fault.start})") from fault


def read_json(path: Path, *, error: type[LlamaAdapterError], limit: int = MAX_TEXT_BYTES) -> Any:
    """The content of a JSON file; a key that occurs twice in one object is refused."""
    return parse_json(read_text(path, error=error, limit=limit), name=_shown(path), error=error)


def read_json_object(
    path: Path, *, error: type[LlamaAdapterError], limit: int = MAX_TEXT_BYTES
) -> dict[str, Any]:
    """As `read_json`, for a file that must hold one object."""
    content = read_json(path, error=error, limit=limit)
    if not isinstance(content, dict):
        raise error(f"{_shown(path)} must hold a JSON object, found {type(content).__name__}")
    return content


def parse_json(text: str | bytes, *, name: str, error: type[LlamaAdapterError]) -> Any:
    """JSON text that `name` holds; `error` where it is damaged, too deep or ambiguous."""
    with _json_faults(name, error):
        return json.loads(text, object_pairs_hook=_unique_keys)


def next_json(
    text: str, start: int, *, name: str, error: type[LlamaAdapterError]
) -> tuple[Any, int]:
    """The JSON document that begins at `start` of a text, and where it ends."""
    with _json_faults(name, error):
        return json.JSONDecoder(object_pairs_hook=_unique_keys).raw_decode(text, start)


@contextmanager
def _json_faults(name: str, error: type[LlamaAdapterError]) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as fault:
        raise error(f"{name} is not valid JSON: {fault.msg} (line {fault.lineno})") from fault
    except RecursionError as fault:
        raise error(f"{name} is not usable JSON: it is nested too deeply") from fault
    except ValueError as fault:  # a key twice, an integer of thousands of digits, bad UTF-8
        raise error(f"{name} is not usable JSON: {fault}") from fault


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice[:60]!r} occurs twice in one object")
    return found


def read_yaml(path: Path, *, error: type[LlamaAdapterError]) -> Any:
    """The content of a YAML file of plain values, within `MAX_YAML_BYTES`; as `parse_yaml`."""
    text = read_text(path, error=error, limit=MAX_YAML_BYTES)
    return parse_yaml(text, name=_shown(path), error=error)


def parse_yaml(text: str, *, name: str, error: type[LlamaAdapterError]) -> Any:
    """Plain values from YAML text; no tag makes anything else.

    `error` for a key that occurs twice, an alias that contains itself, aliases that write out to
    more than `MAX_YAML_NODES` values, and whatever is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            _written_out(node, {}, name=name, error=error)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue  # `<<: *alias`, which the superclass writes out
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    break  # the superclass refuses it with its place
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} occurs twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError as fault:
        raise error(f"{name} is not usable YAML: it is nested too deeply") from fault
    except (yaml.YAMLError, *_YAML_FAULTS) as fault:
        raise error(f"{name} is not valid YAML: {' '.join(str(fault).split())}") from fault


def _written_out(
    node: Any, sizes: dict[int, int | None], *, name: str, error: type[LlamaAdapterError]
) -> int:
    """How many values a YAML node has with its aliases written out."""
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) in sizes:
        known = sizes[id(node)]
        if known is None:
            raise error(f"{name} is not usable YAML: an alias contains itself")
        return known
    sizes[id(node)] = None
    parts = node.value
    inner = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
    size = 1 + sum(_written_out(part, sizes, name=name, error=error) for part in inner)
    if size > MAX_YAML_NODES:
        raise error(
            f"{name} is not usable YAML: with its aliases written out it has more than "
            f"{MAX_YAML_NODES} values"
        )
    sizes[id(node)] = size
    return size


def expanded(path: Path | str) -> Path:
    """With the home folder that a leading `~` means; as it is where no user has that name."""
    # where Path.expanduser raises a RuntimeError
    return Path(os.path.expanduser(path))  # noqa: PTH111


def can_be_path(text: str) -> bool:
    """Whether a text can name a file at all: no control characters, nothing too long."""
    odd = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text)
    return not odd and len(text) <= 4096 and all(len(p.encode()) <= 255 for p in text.split("/"))


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` when the block ends well, and else is removed.

    The content is on disk before the name appears. OSError as the file system raises it.
    """
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file; after an error the old content, or nothing, is there."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that becomes `path` when the block ends well, and else is removed.

    The same promise as `atomic_file` for a whole directory, in place of one that is there. What
    killed processes left of it is removed first. Its parent must exist.
    """
    stage = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _remove_abandoned(path)
    try:
        stage.mkdir()
        yield stage
        for part in (*stage.rglob("*"), stage):
            _sync(part)
        _replace_directory(path, stage)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def move_directory(path: Path, target: Path) -> None:
    """Rename a directory, in place of one that has that name."""
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def is_partial(path: Path) -> bool:
    """Whether a killed process left it before it was complete."""
    return path.name.startswith(".") and ".partial-" in path.name


def final_name(path: Path) -> str:
    """The name that a file or directory has, or will have once what is partial is complete."""
    return path.name[1:].rpartition(".partial-")[0] if is_partial(path) else path.name


class JsonLines:
    """A file of JSON objects, a line each, that grows at its end.

    `is_row` says which objects are rows; `strict` refuses to write numbers that are not finite.
    """

    def __init__(
        self,
        path: Path,
        *,
        error: type[LlamaAdapterError],
        is_row: Callable[[dict[str, Any]], bool] = bool,
        strict: bool = False,
    ) -> None:
        self.path = path
        self.invalid = 0
        """Lines that the last reading left out, but for one that a kill cut off at the end."""
        self._error, self._is_row, self._strict = error, is_row, strict

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows in one go; the error where the disk does not take them."""
        lines = (
            json.dumps(row, ensure_ascii=False, allow_nan=not self._strict) + "\n" for row in rows
        )
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))
        except OSError as fault:
            raise self._error(f"cannot write {self.path}: {fault.strerror}") from fault

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every valid row; `invalid` then says how many lines were left out."""
        return (row for _, row in self._lines())

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        self.invalid = 0
        if not self.path.exists():
            return
        with open_regular(self.path, error=self._error) as file:
            while line := file.readline(_LONGEST_LINE):
                row = self._row(line)
                if row is not None:
                    yield line, row
                elif line.endswith(b"\n"):
                    self.invalid += 1

    def _row(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = parse_json(line, name=str(self.path), error=self._error)
        except LlamaAdapterError:
            return None
        return row if isinstance(row, dict) and self._is_row(row) else None

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the other rows, and lines that are not rows."""
        if not self.path.exists():
            return
        kept = [line.rstrip(b"\n") + b"\n" for line, row in self._lines() if is_kept(row)]
        try:
            write_atomically(self.path, b"".join(kept))
        except OSError as fault:
            raise self._error(f"cannot write {self.path}: {fault.strerror}") from fault

    def drop_partial_line(self, *, limit: int) -> None:
        """Cut off half a line that a kill left at the end, so that rows can be appended."""
        if not self.path.exists():
            return
        content = read_bytes(self.path, error=self._error, limit=limit)
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def _replace_directory(path: Path, stage: Path) -> None:
    if not path.exists():
        stage.rename(path)
        return
    old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    try:
        move_directory(path, old)
        stage.rename(path)
    except BaseException:  # a signal, too, must not leave `path` away
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Remove stages of runs that were killed: their process is gone, or its number is ours."""
    for stage in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        pid = stage.name.rsplit("-", 1)[1]
        is_gone = Path("/proc").exists() and not Path(f"/proc/{pid}").exists()
        if pid.isdigit() and (is_gone or int(pid) == os.getpid()):
            shutil.rmtree(stage, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shown(path: Path) -> str:
    """A path for a message: odd bytes and control characters escaped."""
    text = str(path)
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
