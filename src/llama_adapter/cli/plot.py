"""`llama-adapter plot`: what a run measured, as an image and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    run: Annotated[
        Path, typer.Argument(help="A run directory.", metavar="RUN", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where the files go; by default RUN.", metavar="DIR", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Draw losses, gates, learning rates and throughput of a run: one PNG and one HTML page.

    \b
    Examples:
      llama-adapter plot runs/toy
      llama-adapter plot runs/toy --out report/
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.training.plot import plot_run

    def say(message: str) -> None:
        typer.echo(message, err=True)

    with json_only(as_json) as emit:
        files = [str(path) for path in plot_run(run, out, say=say)]
        if as_json:
            emit({"files": files})
        else:
            typer.echo("\n".join(files))
