"""What a run reports while it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama_adapter.training.metrics import Row

Progress = Callable[[str, int], Callable[[int], None]]
"""Called with a label and a size; what it returns is called with how much was just done."""


def silent(_label: str, _total: int) -> Callable[[int], None]:
    """Progress that nobody watches."""
    return lambda _done: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """Functions that a run calls; by default they do nothing."""

    step: Callable[[Row], None] = lambda _row: None
    """After each step, in the process of rank 0."""
    message: Callable[[str], None] = lambda _message: None
    """With a sentence for the user."""
    progress: Progress = silent
    """When a preparation begins, such as reading data."""
