"""`llama-adapter demo`: what the shipped adapters can do, and a fresh one trained live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_adapter.cli.numbers import MAX_SEED, between

if TYPE_CHECKING:
    from llama_adapter.miniature.demo import DemoResult


def demo(
    out: Annotated[Path, typer.Option(help="Where the report and the adapter go.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[
        int, typer.Option(help="Seed of the live training.", callback=between(0, MAX_SEED))
    ] = 0,
    minutes: Annotated[
        float,
        typer.Option(help="How long the live training may take.", callback=between(0.01, 10_000)),
    ] = 6.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="One minute of training and a smaller exam.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.")
    ] = False,
) -> None:
    """Watch a frozen text model learn to see, on this machine.

    Measures the shipped adapters, trains a fresh one on captions and text instructions, and
    measures that too; writes report.html, pictures.png, results.json and the adapter.

    \b
    Examples:
      llama-adapter demo
      llama-adapter demo --quick --out /tmp/demo
      llama-adapter demo --minutes 20 --seed 1
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.cli.progress import stages
    from llama_adapter.miniature.demo import DemoSettings, run_demo, save_demo

    settings = DemoSettings.quick(seed=seed) if quick else DemoSettings(minutes=minutes, seed=seed)
    with json_only(as_json) as emit:
        with stages() as stage:
            result = run_demo(settings, stage=stage)
            save_demo(result, out)
        if as_json:
            emit(result.to_dict())
        else:
            _print_table(result)
    typer.echo(f"\nreport:  {out / 'report.html'}", err=True)
    typer.echo(f"adapter: {out / 'adapter'}", err=True)
    typer.echo(
        f'ask it:  llama-adapter chat {out / "adapter"} --image FILE --prompt "What do you see?"',
        err=True,
    )


def _print_table(result: DemoResult) -> None:
    from rich.console import Console
    from rich.table import Table

    from llama_adapter.miniature.measure import CLAIMS

    table = Table(title="On held-out scenes, % right (95% interval)")
    for heading in ("", "claim", "shipped", "trained live"):
        table.add_column(heading)
    for name, text in CLAIMS.items():
        cells = []
        for measured in (result.shipped, result.trained):
            found = measured.claims.get(name)
            if found is None:
                cells.append("–")
            else:
                low, high = found.interval()
                cells.append(f"{100 * found.value:5.1f}  ({100 * low:.0f}–{100 * high:.0f})")
        table.add_row(name, text, *cells)
    Console().print(table)
