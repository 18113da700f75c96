"""`llama-adapter report`: all runs in one table, next to published numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs.", metavar="DIR...", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Write report.md, .csv and .html there.", metavar="DIR"),
    ] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tabulate every run found, next to the published numbers and their sources.

    \b
    Examples:
      llama-adapter report runs/
      llama-adapter report runs/mme runs/msvd --out report/
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.evaluation.report import as_markdown, find_runs, table
    from llama_adapter.evaluation.report_page import write_report

    with json_only(as_json) as emit:
        runs = find_runs(folders, resamples=resamples)
        lines = table(runs)
        written = write_report(runs, out) if out is not None else []
    if as_json:
        emit({"lines": [asdict(line) for line in lines], "files": [str(p) for p in written]})
    elif out is None:
        typer.echo(as_markdown(lines))
    for path in written:
        typer.echo(str(path), err=True)
