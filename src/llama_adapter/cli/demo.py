"""`llama-adapter demo`: photographs, then the miniature world with an adapter trained live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_adapter.cli.numbers import MAX_SEED, between
from llama_adapter.cli.settings import Unread, given_options, refuse_unread
from llama_adapter.errors import CheckpointError

if TYPE_CHECKING:
    from llama_adapter.photos.gallery import Gallery


def demo(
    context: typer.Context,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the report and the adapter go; by default runs/demo, or runs/photographs "
            "with --photos-only.",
            show_default=False,
        ),
    ] = None,
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
    photos_only: Annotated[
        bool, typer.Option("--photos-only", help="The photographs and nothing else.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.")
    ] = False,
) -> None:
    """Watch a frozen text model learn to see, on this machine.

    First the model `photos` describes eight photographs and answers questions about them. Then, in
    the miniature world, the bundled adapters are measured, a fresh one is trained on captions and
    text instructions, and that is measured too. Writes report.html, results.json and the adapter.
    The training is that of recipes/miniature-v2.yaml, for minutes; the measuring is `llama-adapter
    eval miniature`.

    \b
    Examples:
      llama-adapter demo
      llama-adapter demo --quick --out /tmp/demo
      llama-adapter demo --minutes 20 --seed 1
      llama-adapter demo --photos-only
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.cli.progress import stages
    from llama_adapter.miniature.demo import claim, demo_recipe, run_demo, show_photographs
    from llama_adapter.miniature.task import HeldOutScenes

    refuse_unread(given_options(context), _unread(photos_only=photos_only, quick=quick))
    out = out or Path("runs/photographs" if photos_only else "runs/demo")
    recipe = demo_recipe(out, minutes=1.0 if quick else minutes, seed=seed)
    with json_only(as_json) as emit:
        missing = _missing(needed=photos_only)
        claim(out)
        with stages() as stage:
            photographs = _photographs(stage, missing)
            if photos_only:
                results = show_photographs(out, photographs)
            else:
                sizes = {"images": 150, "questions": 220} if quick else {}
                test = HeldOutScenes.draw(**sizes)
                results = run_demo(out, recipe, test, photographs=photographs, stage=stage)
        if as_json:
            emit(results)
        else:
            _print_photographs(photographs)
            if not photos_only:
                _print_table(results)
    typer.echo(f"\nreport:  {out / 'report.html'}", err=True)
    if not photos_only:
        typer.echo(f"adapter: {out / 'adapter'}", err=True)
    model = "photos" if photographs.cards else out / "adapter"
    typer.echo(
        f'ask it:  llama-adapter chat {model} --image FILE --prompt "What do you see?"', err=True
    )


def _unread(*, photos_only: bool, quick: bool) -> Unread:
    if photos_only:
        yield frozenset(("seed", "minutes", "quick")), "nothing is trained with --photos-only"
    if quick:
        yield frozenset(("minutes",)), "--quick trains for one"


def _missing(*, needed: bool) -> str | None:
    """What the photos model lacks, said in one line; CheckpointError where it is needed."""
    from llama_adapter.photos.bundled import why_missing

    missing = why_missing()
    if missing is not None and needed:
        raise CheckpointError(f"no photographs can be shown: {missing}")
    if missing is not None:
        typer.echo(f"photographs are left out: {missing}", err=True)
    return missing


def _photographs(stage: Any, missing: str | None) -> Gallery:
    from llama_adapter.cli.models import load
    from llama_adapter.photos.gallery import Gallery, answer_gallery, photographs

    if missing is not None:
        return Gallery(missing=missing)
    advance = stage("photographs", len(photographs()))
    return answer_gallery(*load("photos"), advance=advance)


def _print_photographs(gallery: Gallery) -> None:
    for card in gallery.cards:
        typer.echo(f"{card.photograph.path.name}: {card.caption}")
        for one in card.answers:
            mark = "right" if one.is_right else f"expected: {' or '.join(one.expected)}"
            typer.echo(f"  {one.question} {one.answer} ({mark})")


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
