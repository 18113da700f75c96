"""A run's directory: recipe, metrics, checkpoints that appear whole or not at all, adapters.

recipe.yaml            the resolved recipe
metrics.jsonl          a row for each step
broken.jsonl           records that could not be learned from
checkpoints/step-…     the newest few; each holds a loadable `adapter` and `state.pt`
adapter, best          the final adapter; the best one by the recipe's metric
.lock                  held by the process that writes here
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from llama_adapter.errors import CheckpointError, TrainingError
from llama_adapter.training.directory_lock import LOCK, locked, refuse_locked
from llama_adapter.training.recipe import Recipe

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
BROKEN = "broken.jsonl"
ADAPTER = "adapter"
BEST = "best"
STATE = "state.pt"
CACHE = "cache"
_STEP = re.compile(r"step-(\d+)")
_FREE = (
    "out", "checkpoint_every", "keep_checkpoints", "logging", "evaluation", "data.workers",
    "data.cache", "data.max_broken", "compute.device", "compute.strategy", "compute.threads",
    "compute.gradient_checkpointing", "compute.compile",
)  # fmt: skip
"""Keys that may differ when a run is resumed: the same numbers are learned from the same data."""


class RunDirectory:
    """Where one run keeps everything. Only the process of rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """Refuse what `held` would refuse, and leave no trace."""
        refuse_locked(self.path)
        self._check_free(recipe, resume=resume)

    def _check_free(self, recipe: Recipe, *, resume: bool) -> None:
        stored = self.path / RECIPE
        if stored.exists() and not resume:
            raise TrainingError(
                f"{self.path} holds a run already; go on with --resume or choose another out="
            )
        if stored.exists():
            self._check_same(recipe, stored)
        elif self.path.exists() and (not self.path.is_dir() or self._holds_more_than_lengths()):
            raise TrainingError(f"{self.path} exists and holds no run; choose another out=")

    def _holds_more_than_lengths(self) -> bool:
        """Whether there is anything but the lengths of samples, which data leaves when opened."""
        return any(path.name not in (CACHE, LOCK) for path in self.path.iterdir())

    @contextmanager
    def held(self, recipe: Recipe, *, resume: bool) -> Iterator[bool]:
        """Take the directory for this recipe, within a block; False where it cannot be locked.

        Raises TrainingError where another process trains there, where it holds a run already and
        `resume` is not asked for, or, with `resume`, where that run's recipe is another one.
        """
        self.check(recipe, resume=resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror}") from error
        with locked(self.path) as is_locked:
            # a run that began and ended just now was not there before
            self._check_free(recipe, resume=resume)
            try:
                if not (self.path / RECIPE).exists():
                    write_whole(self.path / RECIPE, recipe.to_yaml().encode())
            except OSError as error:
                raise TrainingError(f"cannot write {self.path}: {error.strerror}") from error
            yield is_locked

    def _check_same(self, recipe: Recipe, stored: Path) -> None:
        try:
            before = yaml.safe_load(stored.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TrainingError(f"{stored} cannot be read: {error}") from error
        now = recipe.model_dump(mode="json")
        for key, old, new in _differences(before, now):
            if not any(key == free or key.startswith(free + ".") for free in _FREE):
                raise TrainingError(
                    f"{self.path} is a run of another recipe: {key} was {old!r} and is now {new!r}"
                )

    def saved(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if _STEP.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def save(self, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
        """Let `write` fill a new checkpoint, then let it appear, and drop all but the newest.

        Raises CheckpointError where it cannot be written; those before it stay whole.
        """
        target = self.checkpoints / f"step-{step:08d}"
        partial = self.checkpoints / f".{target.name}.partial"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for abandoned in self.checkpoints.glob(".step-*"):
                shutil.rmtree(abandoned)
            partial.mkdir()
            write(partial)
            _appear(partial, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            before = self.saved()
            rest = f"{before[-1].name} is whole" if before else "there is none before it"
            raise CheckpointError(f"cannot write {target}: {error}; {rest}") from error
        for old in self.saved()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def publish(self, name: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a directory beside the checkpoints, in place of one of that name."""
        target, partial = self.path / name, self.path / f".{name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            _appear(partial, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"cannot write {target}: {error}") from error
        return target

    def rows(self) -> Iterator[dict[str, Any]]:
        """What metrics.jsonl holds; a torn last line is left out."""
        return JsonLines(self.path / METRICS).rows()


class JsonLines:
    """A file of JSON objects with a `step`, written line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row at once; TrainingError where the disk does not take it."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror}") from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every whole row."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict) or "step" not in row:
                    return  # torn when the process was killed; what follows is of no run
                yield row

    def forget_after(self, step: int) -> None:
        """Keep rows up to a step: those after it will be written again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        if kept or self.path.exists():
            write_whole(self.path, text.encode())


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was written."""
    found = _STEP.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    _sync(temporary)
    temporary.replace(path)


def _appear(partial: Path, target: Path) -> None:
    """Give a finished directory its name, once its files are on the disk."""
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if target.exists():
        old = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
