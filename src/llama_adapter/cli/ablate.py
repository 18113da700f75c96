"""`llama-adapter ablate`: the paper's claims against their alternatives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_adapter.cli.numbers import between


def ablate(
    out: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = Path(
        "runs/ablation"
    ),
    docs: Annotated[
        Path | None,
        typer.Option(help="Where the table and the plot go; by default OUT.", show_default=False),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(help="Optimizer steps of every run.", callback=between(1, 1_000_000)),
    ] = 300,
    seeds: Annotated[
        int, typer.Option(help="How many seeds, from 0.", callback=between(1, 1000))
    ] = 3,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="A variant to run; may be repeated.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.")
    ] = False,
) -> None:
    """Compare the method with its alternatives at equal steps on equal data.

    Started again, it goes on where it was interrupted. Variants: reference, slots read all prompts,
    naive joint, scored unfairly, LANGUAGE keeps moving, late fusion, "late fusion, naive joint",
    no bias and scale, all tokens attend, K = 1.

    \b
    Examples:
      llama-adapter ablate
      llama-adapter ablate --steps 100 --seeds 1 --only reference --only "naive joint"
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.cli.progress import stages
    from llama_adapter.miniature.ablation import (
        AblationSettings,
        run_ablation,
        table,
        write_results,
    )

    settings = AblationSettings(steps=steps, seeds=tuple(range(seeds)), only=tuple(only or ()))
    settings.chosen()  # a misspelt variant is refused before anything runs
    with json_only(as_json) as emit:
        with stages() as stage:
            results = run_ablation(settings, out, stage=stage)
        write_results(results, settings, docs or out)
        if as_json:
            emit(results)
        else:
            typer.echo(table(results))
    typer.echo(f"table and plot: {docs or out}", err=True)
