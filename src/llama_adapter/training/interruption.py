"""Ctrl-C and SIGTERM end a run between two steps, after a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what schedulers and container engines send before they kill."""
REPEATED_SECONDS = 1.0
"""A signal that comes again so soon is the same one: launchers pass on what the terminal sent."""


class Interruption:
    """Whether this process was asked to end."""

    asked: int | None = None
    """The signal that asked."""
    when = 0.0


def leave(number: int) -> None:
    """End as Python does at a signal, now that everything is kept."""
    if number == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt


@contextmanager
def noticed(tell: Callable[[str], None]) -> Iterator[Interruption]:
    """Inside the block the first signal is noted and told, a second one acts as before.

    Signals reach the main thread of Python alone: in another thread nothing changes. What is
    ignored stays ignored, as Ctrl-C is by what `nohup` or a script has put into the background.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    known = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {number: each for number, each in known.items() if each != signal.SIG_IGN}
    process = os.getpid()

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that reads data: its parent ends it
            return
        if interruption.asked is None:
            interruption.asked, interruption.when = number, time.monotonic()
            name = signal.Signals(number).name
            # the terminal may be gone, or be written to at this moment
            with suppress(OSError, RuntimeError):
                tell(f"{name}: the run ends after this step and a checkpoint; again: at once")
        elif time.monotonic() - interruption.when > REPEATED_SECONDS:
            restore()
            os.kill(process, number)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        restore()
