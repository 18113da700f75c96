"""`llama-adapter demo`: what the bundled adapters can do, and a fresh one trained live."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llama_adapter.cli.numbers import MAX_SEED, between


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
        bool, typer.Option("--quick", help="One minute of training and a smaller test.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.")
    ] = False,
) -> None:
    """Watch a frozen text model learn to see, on this machine.

    Measures the bundled adapters, trains a fresh one on captions and text instructions, and
    measures that too; writes report.html, results.json and the adapter. The training is that of
    recipes/miniature-v2.yaml, for minutes; the measuring is `llama-adapter eval miniature`.

    \b
    Examples:
      llama-adapter demo
      llama-adapter demo --quick --out /tmp/demo
      llama-adapter demo --minutes 20 --seed 1
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.cli.progress import stages
    from llama_adapter.miniature.demo import demo_recipe, run_demo
    from llama_adapter.miniature.task import HeldOutScenes

    recipe = demo_recipe(out, minutes=1.0 if quick else minutes, seed=seed)
    test = HeldOutScenes.draw(images=150, questions=220) if quick else HeldOutScenes.draw()
    with json_only(as_json) as emit:
        with stages() as stage:
            results = run_demo(out, recipe, test, stage=stage)
        if as_json:
            emit(results)
        else:
            _print_table(results)
    typer.echo(f"\nreport:  {out / 'report.html'}", err=True)
    typer.echo(f"adapter: {out / 'adapter'}", err=True)
    typer.echo(
        f'ask it:  llama-adapter chat {out / "adapter"} --image FILE --prompt "What do you see?"',
        err=True,
    )


def _print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llama_adapter.miniature.task import METRICS

    table = Table(title="On held-out scenes, % right (95% interval)")
    for heading in ("metric", "", "bundled", "trained live"):
        table.add_column(heading)
    for name, text in METRICS.items():
        cells = []
        for side in ("bundled", "trained"):
            found = results[side]["metrics"].get(name)
            if found is None:
                cells.append("–")
            else:
                low, high = 100 * found["low"], 100 * found["high"]
                cells.append(f"{100 * found['value']:5.1f}  ({low:.0f}–{high:.0f})")
        table.add_row(name, text, *cells)
    Console().print(table)
