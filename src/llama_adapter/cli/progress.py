"""Progress on stderr: a bar for each stage of a long command, or lines where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def stages() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Within the block, yields what opens a stage: (label, total) -> advance(count)."""
    from rich.console import Console

    if not Console(stderr=True).is_terminal:
        yield lines
        return
    with bars("{task.description:<36}") as progress:

        def stage(label: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(label, total=total)
            return lambda count: progress.advance(task, count)

        yield stage


def lines(label: str, total: int) -> Callable[[int], None]:
    """A stage in a log: a line each half minute, and one when all is done."""
    import typer

    start = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if done - count < total <= done or now - said >= SECONDS_BETWEEN_LINES:
            said = now
            typer.echo(f"{label}: {done:,} of {total:,} in {now - start:.0f} s", err=True)

    return advance


def bars(label: str, *more: str) -> Any:
    """A `rich.progress.Progress` on stderr; `label` and `more` are texts before and after a bar."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        *map(TextColumn, more),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
