"""Output directories that appear whole or not at all."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from llama_adapter import files
from llama_adapter.errors import CheckpointError
from llama_adapter.files import expanded
from llama_adapter.model.references import resolve_reference

EXPORT_MARKER = "llama_adapter_export.json"
"""What every export adds to its files: other programs' models look the same without it."""

_OURS = ("adapter_config.json", EXPORT_MARKER)
"""Files that mark a directory as something we wrote and may replace."""


def mark_export(directory: Path, *, kind: str) -> None:
    """Mark a directory as an export, which a later one may replace."""
    (directory / EXPORT_MARKER).write_text(json.dumps({"format": kind}) + "\n")


def adapter_sources(directory: Path, *described: dict[str, Any] | None) -> tuple[Path, ...]:
    """An adapter directory, and what its descriptions of base and encoder refer to on disk."""
    names = [str((content or {}).get("name_or_path") or "") for content in described]
    paths = [Path(resolve_reference(name, directory=directory)) for name in names if name]
    return (directory, *(path for path in paths if path.exists()))


@contextmanager
def output_directory(
    out: Path, *, overwrite: bool = False, sources: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """A directory next to `out` to write into; it becomes `out` when the block ends well.

    After an error, an interrupt or a termination signal nothing is left; what a killed run left
    is removed by the next one. `sources` are inputs, which must not be inside `out`.
    Raises CheckpointError if `out` exists, unless `overwrite` and we wrote what is there, and
    where the disk is full or cannot be written.
    """
    if str(expanded(out)).startswith("~"):
        raise CheckpointError(f"cannot write {out}: no user has that name")
    try:
        with _staged(expanded(out).absolute(), overwrite, sources) as stage:
            yield stage
    except Exception as error:
        if (reason := _reason_of_system(error)) is None:
            raise
        raise CheckpointError(f"cannot write {out}: {reason}") from error


def _reason_of_system(error: Exception) -> str | None:
    """What the operating system says (a full or read-only disk); None for any other error."""
    if isinstance(error, OSError):
        if error.errno is None:  # an error of a library
            return None
        about = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{about}"
    # safetensors and tokenizers hand it on as text
    found = re.search(r"([^:(\n]+) \(os error \d+\)", str(error))
    return found[1].strip() if found else None


@contextmanager
def _staged(out: Path, overwrite: bool, sources: tuple[Path, ...]) -> Iterator[Path]:
    _check_target(out, overwrite=overwrite, sources=sources)
    missing_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _termination_raises(), files.staged_directory(out) as stage:
            yield stage
    except BaseException:
        for parent in missing_parents:
            with suppress(OSError):
                parent.rmdir()
        raise


def _check_target(out: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{source} is inside the output directory {out}")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a directory; expected a new directory")
    if not overwrite:
        raise CheckpointError(f"{out} exists; expected a new directory (--overwrite replaces it)")
    if any(out.iterdir()) and not any((out / name).exists() for name in _OURS):
        raise CheckpointError(
            f"{out} holds {len(list(out.iterdir()))} entries but no model that was "
            "imported or exported here; it is not overwritten"
        )


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit inside the block, so that clean-up runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
