"""Waiting for other threads, and making them wait: no test hangs on who is faster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 120.0
"""How long anything may take on a busy machine."""


def becomes(condition: Callable[[], object], seconds: float = SECONDS) -> bool:
    """Whether a condition comes true within a time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def held(engine: Any) -> Iterator[None]:
    """An engine whose thread waits inside the block: what it is asked there begins at its end."""
    begun, end = threading.Event(), threading.Event()
    call = engine._calls.put(lambda: (begun.set(), end.wait(SECONDS))[0])
    try:
        assert begun.wait(SECONDS)
        yield
    finally:
        end.set()
    call.result(SECONDS)


@contextmanager
def before_each_pass(model: Any, wait: Callable[[], object]) -> Iterator[None]:
    """Passes of a model's decoder begin when a function has returned."""

    def before(*_: Any) -> None:
        wait()

    hook = model.language_model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
