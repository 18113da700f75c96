"""What goes to stdout and what does not."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def json_only(wanted: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Within the block, everything printed goes to stderr if JSON is wanted.

    Yields a function that prints one JSON object to the real stdout.
    """
    stdout = sys.stdout

    def emit(result: Mapping[str, Any]) -> None:
        text = json.dumps(result, ensure_ascii=False, allow_nan=False, default=str)
        stdout.write(text + "\n")
        stdout.flush()

    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield emit
