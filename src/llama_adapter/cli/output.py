"""What goes to stdout and what does not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from llama_adapter.errors import LlamaAdapterError


def one_line(message: str) -> str:
    """A message on one line; control characters, which steer terminals, are escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in " ".join(message.split())
    )


def set_up_streams() -> None:
    """Let any text be printed and any input be read, whatever the terminal's encoding.

    What cannot be encoded is escaped; bytes that are not text become lone surrogates, which
    questions may not have and names of files may.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def drop_unwritten() -> None:
    """Give up what standard output did not take, which Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Within the block, bad input ends the program: one line on stderr, exit status 2."""
    try:
        yield
    except LlamaAdapterError as error:
        refuse(str(error))
    except OSError as error:
        if error.errno is None:  # not the system's: an error of a library, and of ours
            raise
        refuse(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))


def refuse(message: str) -> NoReturn:
    """Say what is wrong in one line and exit as bad input does."""
    with contextlib.suppress(OSError, AttributeError):  # stderr may be what cannot be written
        sys.stderr.write(f"error: {one_line(message)}\n")
        sys.stderr.flush()
    if sys.stdout is not None:
        drop_unwritten()
    sys.exit(2)


@contextlib.contextmanager
def json_only(wanted: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Within the block, everything printed goes to stderr if JSON is wanted.

    Yields a function that prints one JSON object to the real stdout.
    """
    stdout = sys.stdout

    def emit(result: Mapping[str, Any]) -> None:
        text = json.dumps(result, ensure_ascii=False, allow_nan=False, default=str)
        try:
            text.encode(stdout.encoding or "utf-8")
        except UnicodeEncodeError:  # a terminal of few characters, or a lone surrogate
            text = json.dumps(result, allow_nan=False, default=str)
        stdout.write(text + "\n")
        stdout.flush()

    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield emit
