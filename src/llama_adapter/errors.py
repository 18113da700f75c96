"""Everything this package refuses to do, as one small tree.

    LlamaAdapterError
    ├── ConfigError              a setting, preset, recipe or key is wrong
    ├── UnsupportedModelError    a base model or model family cannot be adapted
    ├── CheckpointError          a file of weights is missing, damaged or does not fit
    ├── PromptError              a prompt is empty, too long or malformed
    ├── ImageError               an image cannot be read or is absurd
    ├── VideoError               a video cannot be read or is absurd
    ├── DataError                a data set or one of its records is wrong
    ├── TrainingError            a training run cannot start or go on
    ├── EvaluationError          a task, its predictions or its judge cannot be scored
    ├── ExpertError              an expert cannot be found or gave no usable text
    ├── ServingError             the server cannot start or a request cannot be served
    │   ├── QueueFullError       as many requests wait as may; try again later
    │   └── UnavailableError     the engine is starting, draining or dead
    └── MissingDependencyError   an optional package is not installed

Each message is one line that names the thing, what was found and what was expected.
The command line prints it and exits with 2.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LlamaAdapterError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigError(LlamaAdapterError):
    """A setting, preset, recipe or key is wrong."""


class UnsupportedModelError(LlamaAdapterError):
    """A base model or model family cannot be adapted."""


class CheckpointError(LlamaAdapterError):
    """A file of weights is missing, damaged or does not fit."""


class PromptError(LlamaAdapterError):
    """A prompt is empty, too long or malformed."""


class ImageError(LlamaAdapterError):
    """An image cannot be read or is absurd."""


class VideoError(LlamaAdapterError):
    """A video cannot be read or is absurd."""


class DataError(LlamaAdapterError):
    """A data set or one of its records is wrong."""


class TrainingError(LlamaAdapterError):
    """A training run cannot start or go on."""


class EvaluationError(LlamaAdapterError):
    """A task, its predictions or its judge cannot be scored."""


class ExpertError(LlamaAdapterError):
    """An expert cannot be found or gave no usable text."""


class ServingError(LlamaAdapterError):
    """The server cannot start or a request cannot be served."""


class QueueFullError(ServingError):
    """As many requests wait as may; try again later."""


class UnavailableError(ServingError):
    """The engine is starting, draining or dead."""


class MissingDependencyError(LlamaAdapterError):
    """An optional package is not installed; the message holds the command that installs it."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"run: pip install 'llama-adapter[{extra}]'"
        )


def import_extra(package: str, *, extra: str, purpose: str) -> Any:
    """An optional package; MissingDependencyError where it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        missing = (error.name or package).partition(".")[0]
        raise MissingDependencyError(missing, extra=extra, purpose=purpose) from error
