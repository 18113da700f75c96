"""Progress bars on stderr, one per stage of a long command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stages() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Within the block, yields what opens a bar: (label, total) -> advance(count)."""
    with bars("{task.description:<36}") as progress:

        def stage(label: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(label, total=total)
            return lambda count: progress.advance(task, count)

        yield stage


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
