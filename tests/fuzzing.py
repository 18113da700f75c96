"""What the fuzz campaigns share: mutations with a fixed seed, and what may come of them.

A campaign hands a reader damaged inputs and counts what happened. Allowed are two outcomes: the
input is accepted (and then `accepted` checks that what was loaded is right), or it is refused by
one line of our own error tree. A traceback, a hang and something left behind each fail the test.

`make test` runs few inputs of each campaign; `make fuzz` sets FUZZ_SCALE for a long one and
FUZZ_REPORT to a file that gets one JSON line of counts for each campaign.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_adapter.errors import LlamaAdapterError

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))
"""How many times the inputs of `make test` a campaign runs."""

SECONDS = 30
"""A single input that takes longer is a hang."""

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 10**12, -(10**12), 0.5, float("nan"), float("inf"), 1e308, "", "x",
    "\x00", "\ud800", "../" * 8 + "etc/passwd", "/dev/zero", "x" * 10_000, [], {}, [[]], [None],
    {"a": {"b": []}}, [1, "x", None],
)  # fmt: skip
"""What a mutated JSON or YAML file has where something else is expected."""


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """A copy with one to three damages: bits flipped, parts cut, doubled, zeroed or made up."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        size = len(content)
        at = rng.randrange(size + 1)
        length = min(rng.choice((1, 2, 8, 64, 512, 4096)), max(size - at, 1))
        kind = rng.randrange(7)
        if kind == 0 and size:
            content[at % size] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at : at + length] = bytes(length)
        elif kind == 4:
            content[at:at] = rng.randbytes(length)
        elif kind == 5:
            content[at:at] = content[at : at + length]
        else:
            content[at : at + length] = rng.randbytes(length)
    return bytes(content)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three entries deleted, renamed, doubled or replaced."""
    content = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(content))
        if not places:
            return rng.choice(HOSTILE_VALUES)
        inner, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, dict):
            inner[f"{key}x"] = inner.pop(key)
        elif kind == 2 and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[key]))
        else:
            inner[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    return content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict | list):
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(inner):
        yield value, key
        yield from _places(part)


def mutated_json_text(value: Any, rng: random.Random) -> bytes:
    """A mutated JSON file: mostly odd values, sometimes damaged text, depth or doubled keys."""
    kind = rng.randrange(8)
    text = json.dumps(value).encode()
    if kind == 0:
        return mutated_bytes(text, rng)
    if kind == 1:
        return b"[" * 100_000 + b"]" * rng.choice((0, 100_000))
    if kind == 2 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        extra = json.dumps({key: rng.choice(HOSTILE_VALUES)})
        return text[:-1] + b", " + extra[1:].encode()
    if kind == 3:
        return text.replace(b"1", b"1" * 5000, 1)
    return json.dumps(mutated_json(value, rng)).encode()


class Campaign:
    """Counts of one campaign: `accepted`, `refused`, and by failing the test everything else."""

    def __init__(self, name: str, *, inputs: int, seed: int = 0) -> None:
        self.name = name
        self.inputs = inputs * SCALE
        self.counts: Counter[str] = Counter()
        self._seed = seed

    def __iter__(self) -> Iterator[random.Random]:
        """One source of randomness for each input; the counts are reported at the end."""
        for number in range(self.inputs):
            self._number = number
            yield random.Random(f"{self.name}:{self._seed}:{number}")
        report = os.environ.get("FUZZ_REPORT")
        if report:
            with Path(report).open("a", encoding="utf-8") as file:
                row = {"campaign": self.name, "inputs": self.inputs, **self.counts}
                file.write(json.dumps(row) + "\n")

    def attempt(
        self,
        read: Callable[[], Any],
        *,
        accepted: Callable[[Any], None] = lambda result: None,
        refusals: type[LlamaAdapterError] | tuple[type[LlamaAdapterError], ...] = LlamaAdapterError,
    ) -> None:
        """Run the reader on one input; AssertionError for a traceback or a hang.

        `accepted` checks what an accepted input became: a silent wrong load fails there.
        """
        where = f"{self.name}, input {self._number}"
        try:
            with time_limit(SECONDS, where):
                result = read()
        except refusals as error:
            message = str(error)
            assert message, where
            assert len(message) < 2000, f"{where}: message of {len(message)} characters"
            self.counts["refused"] += 1
        except (HangError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        else:
            accepted(result)
            self.counts["accepted"] += 1


class HangError(AssertionError):
    """One input took longer than `SECONDS`."""


@contextmanager
def time_limit(seconds: int, where: str) -> Iterator[None]:
    """HangError where the block takes longer; only in the main thread, as pytest runs tests."""
    assert threading.current_thread() is threading.main_thread()

    def stop(*_: Any) -> None:
        raise HangError(f"{where}: took more than {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
