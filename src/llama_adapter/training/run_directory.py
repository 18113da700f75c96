"""A run's directory: recipe, metrics, adapters, and checkpoints that are complete or absent.

recipe.yaml            the resolved recipe
metrics.jsonl          a row for each step
broken.jsonl           invalid records, from which nothing is learned
checkpoints/step-…     the newest few; each holds a loadable `adapter`, `state.pt` and checksums
adapter, best          the final adapter; the best one by the recipe's metric
.lock                  held by the process that writes here
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

from llama_adapter.errors import CheckpointError, TrainingError
from llama_adapter.files import (
    JsonLines,
    is_partial,
    move_directory,
    open_regular,
    read_json_object,
    read_yaml,
    staged_directory,
    write_atomically,
)
from llama_adapter.training.directory_lock import LOCK, locked, refuse_locked
from llama_adapter.training.recipe import CACHE, Recipe

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
INVALID = "broken.jsonl"
ADAPTER = "adapter"
BEST = "best"
STATE = "state.pt"
CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"
TRACKED = "llama-adapter"
"""The project's name for trackers; tensorboard writes into a folder of that name."""
_WITHOUT_RESULTS = frozenset({RECIPE, METRICS, INVALID, CACHE, CHECKPOINTS, TRACKED, LOCK})
"""What a run that wrote no checkpoint can leave; nothing of it is worth to be kept."""
_MOST_STEPS = 10**12
_STEP = re.compile(r"step-(\d{1,12})")
_MAY_CHANGE = (
    "out", "checkpoint_every", "keep_checkpoints", "logging", "evaluation", "data.workers",
    "data.cache", "data.max_invalid", "vision.cache_folder", "compute.device",
    "compute.strategy", "compute.threads", "compute.gradient_checkpointing", "compute.compile",
)  # fmt: skip
"""Keys that may differ when a run is resumed: what is learned stays the same."""


class RunDirectory:
    """Where one run keeps everything. Only the process of rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """Refuse what `acquire` would refuse, and leave no trace."""
        try:
            refuse_locked(self.path)
            self._check_available(recipe, resume=resume)
            # a link to nothing is there too: no folder can be made under its name
            above = (self.path, *self.path.absolute().parents)
            existing = next(p for p in above if os.path.lexists(p))
            if not existing.is_dir():
                raise TrainingError(f"cannot write {self.path}: {existing} is not a folder")
            if not os.access(existing, os.W_OK | os.X_OK):
                raise TrainingError(f"cannot write {self.path}: {existing} is read-only for you")
            if existing != self.path:
                self._check_makes_folders(existing)
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            raise TrainingError(f"cannot use {self.path}: {error.strerror}") from error

    def _check_makes_folders(self, above: Path) -> None:
        """Try it under another name: /proc, for one, seems writable and takes no folder."""
        try:
            Path(tempfile.mkdtemp(prefix=".", dir=above)).rmdir()
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror}") from error

    def _check_available(self, recipe: Recipe, *, resume: bool) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise TrainingError(f"{self.path} exists and holds no run; choose another out=")
        names = {path.name for path in self.path.iterdir() if not is_partial(path)}
        if names <= {CACHE, LOCK} or self._is_without_results(names):
            return
        if RECIPE not in names:
            raise TrainingError(f"{self.path} exists and holds no run; choose another out=")
        if not resume:
            raise TrainingError(
                f"{self.path} holds a run already; go on with --resume or choose another out="
            )
        self._check_same(recipe, self.path / RECIPE)

    def _is_without_results(self, names: set[str]) -> bool:
        """Whether a run began here and ended before its first checkpoint."""
        return LOCK in names and names <= _WITHOUT_RESULTS and not self.saved()

    @contextmanager
    def acquire(self, recipe: Recipe, *, resume: bool) -> Iterator[bool]:
        """Take the directory for this recipe, within a block; False where it cannot be locked.

        A block that ends before `begin` leaves no directory that was not there before it, but
        for the lengths of samples, which data leaves when it is opened.
        Raises TrainingError where another process trains there, where it holds a run already and
        `resume` is not asked for, or, with `resume`, where that run's recipe is another one.
        """
        self.check(recipe, resume=resume)
        absent = [p for p in (self.path, *self.path.absolute().parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror}") from error
        with locked(self.path) as is_locked:
            # a run that began and ended just now was not there before
            self._check_available(recipe, resume=resume)
            try:
                yield is_locked
            finally:
                if not (self.path / RECIPE).exists():
                    self._release(absent)

    def begin(self, recipe: Recipe) -> None:
        """Start-up is over and steps follow: write the recipe down, unless the run goes on.

        What a run left that wrote no checkpoint is forgotten. Raises TrainingError where the
        directory cannot be written.
        """
        names = {path.name for path in self.path.iterdir() if not is_partial(path)}
        try:
            for abandoned in filter(is_partial, list(self.path.iterdir())):
                _remove(abandoned)
            if RECIPE not in names or self._is_without_results(names):
                for name in (METRICS, INVALID):
                    (self.path / name).unlink(missing_ok=True)
                write_atomically(self.path / RECIPE, recipe.to_yaml())
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror}") from error

    def _release(self, absent: list[Path]) -> None:
        for path in self.path.iterdir():
            if path.name == LOCK or is_partial(path):
                _remove(path)
        for folder in (self.path / CACHE, *absent):  # those that are not empty stay
            with suppress(OSError):
                folder.rmdir()

    def _check_same(self, recipe: Recipe, stored: Path) -> None:
        before = read_yaml(stored, error=TrainingError)
        if not isinstance(before, dict):
            raise TrainingError(f"{stored} is damaged: it must hold keys and values")
        now = recipe.model_dump(mode="json")
        if recipe.adapter.start is not None and isinstance(before.get("adapter"), dict):
            before["adapter"].pop("preset", None)  # which version 0.1 also wrote
        with suppress(ValidationError):  # what this version's recipes cannot say differs below
            # keys that are younger than the run have their defaults
            before = Recipe.model_validate(before).model_dump(mode="json")
        for key, old, new in _differences(before, now):
            if not any(key == free or key.startswith(free + ".") for free in _MAY_CHANGE):
                raise TrainingError(
                    f"{self.path} is a run of another recipe: {key} was {_short(old)} and is now "
                    f"{_short(new)}"
                )

    def saved(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [
            path
            for path in self.checkpoints.iterdir()
            if _STEP.fullmatch(path.name) and path.is_dir()
        ]
        return sorted(found, key=step_of)

    def set_aside(self, checkpoint: Path) -> None:
        """Rename a damaged checkpoint, so that no run resumes from it or counts it."""
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        try:
            move_directory(checkpoint, aside)
        except OSError as error:
            raise CheckpointError(f"cannot rename {checkpoint}: {error.strerror}") from error

    def save(self, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
        """Let `write` fill a new checkpoint, then commit it, and drop all but the newest.

        Raises CheckpointError where it cannot be written; those before it stay whole.
        """
        target = self.checkpoints / f"step-{step:08d}"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for abandoned in self.checkpoints.glob(".step-*"):
                shutil.rmtree(abandoned)
            with staged_directory(target) as stage:
                write(stage)
                write_checksums(stage)
        except (OSError, SafetensorError) as error:
            before = self.saved()
            rest = f"{before[-1].name} is whole" if before else "there is none before it"
            raise CheckpointError(f"cannot write {target}: {error}; {rest}") from error
        for old in self.saved()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def publish(self, name: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a directory next to the checkpoints, in place of one of that name."""
        target = self.path / name
        try:
            with staged_directory(target) as stage:
                write(stage)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {target}: {error}") from error
        return target


def rows_of_steps(path: Path) -> JsonLines:
    """A file of rows with a `step`."""
    return JsonLines(path, error=TrainingError, is_row=_has_step, strict=True)


def _has_step(row: dict[str, Any]) -> bool:
    step = row.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _MOST_STEPS


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was written."""
    found = _STEP.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def write_checksums(directory: Path) -> None:
    """Write down the SHA-256 of every file in a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sums = {path.relative_to(directory).as_posix(): _sha256(path) for path in files}
    write_atomically(directory / CHECKSUMS, json.dumps({"sha256": sums}, indent=2) + "\n")


def check_checksums(directory: Path) -> None:
    """CheckpointError where a file differs from what `write_checksums` wrote down.

    Checkpoints of version 0.1 have no checksums.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return
    sums = read_json_object(path, error=CheckpointError).get("sha256")
    if not isinstance(sums, dict) or STATE not in sums:
        raise CheckpointError(f"{path} is damaged: sha256 must hold a checksum for each file")
    for name, expected in sums.items():
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()):
            raise CheckpointError(f"{path} is damaged: {name!a} is not in that folder")
        found = _sha256(file)
        if found != expected:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is {found[:16]}…, {CHECKSUMS} says "
                f"{str(expected)[:16]}…"
            )


def _sha256(path: Path) -> str:
    with open_regular(path, error=CheckpointError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf that differs, by its dotted key."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), now.get(name), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{key}.{index}")
    elif before != now:
        yield key, before, now
