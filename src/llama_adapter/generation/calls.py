"""Functions that other threads let an engine's thread call, between two steps of its work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class Calls:
    """Calls that wait for the engine's thread, in the order in which they came."""

    def __init__(self, changed: threading.Condition) -> None:
        """`changed` is the engine's: the thread that waits for work hears of a call."""
        self._changed = changed
        self._waiting: deque[tuple[Callable[[], None], Future[None]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, function: Callable[[], None]) -> Future[None]:
        """Let the engine's thread call a function; the future holds what it raises."""
        done: Future[None] = Future()
        with self._changed:
            self._waiting.append((function, done))
            self._changed.notify()
        return done

    def make(self) -> None:
        """For the engine's thread: call all that wait."""
        while self._waiting:
            function, done = self._waiting.popleft()
            complete(done, function)

    def refuse(self, error: Exception) -> None:
        """For an engine that is dead: nobody waits for ever."""
        while self._waiting:
            self._waiting.popleft()[1].set_exception(error)


def complete(done: Future[None], function: Callable[[], None]) -> None:
    """Call a function, and let those who wait for it know how it went."""
    try:
        function()
    except Exception as error:
        done.set_exception(error)
    else:
        done.set_result(None)
