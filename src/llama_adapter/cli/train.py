"""`llama-adapter train`: a recipe to a trained adapter, in one process or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_adapter.errors import LlamaAdapterError

if TYPE_CHECKING:
    from llama_adapter.training.callbacks import Callbacks
    from llama_adapter.training.recipe import Recipe, SourceTypes
    from llama_adapter.training.run import TrainingResult


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe, such as those in recipes/.", metavar="RECIPE.yaml", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes of the recipe, in lists by number: captions.sources.0.path=my.json.",
            metavar="[KEY.PATH=VALUE]...",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in `out`.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Read some data, estimate steps and memory, name all errors; train nothing.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train an adapter as a recipe says.

    A run that was killed goes on with --resume and ends with the same weights; Ctrl-C writes a
    checkpoint first. Several processes or machines: start it with torchrun or `accelerate launch`.

    \b
    Examples:
      llama-adapter train recipes/toy.yaml
      llama-adapter train recipes/toy.yaml steps=200 out=runs/short seed=1
      llama-adapter train recipes/captions-and-instructions.yaml --check prompt.template=chat \\
        base.model=Qwen/Qwen3-0.6B vision.model=openai/clip-vit-large-patch14
      llama-adapter train recipes/paper-7b.yaml --resume
      torchrun --nproc-per-node 8 -m llama_adapter.cli train recipes/paper-7b.yaml
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.training.recipe import load_recipe

    types = source_types()
    settings = _with_built_in(load_recipe(recipe, overrides or [], types=types))
    with json_only(as_json) as emit:
        if check:
            _check(settings, types, resume=resume, emit=emit if as_json else None)
            return
        from llama_adapter.training.launch import train as run_recipe

        with watching(settings) as callbacks:
            result = run_recipe(
                settings,
                resume=resume,
                types=types,
                callbacks=callbacks,
                score_captions=score_captions,
            )
        if os.environ.get("RANK", "0") != "0":
            return
        if as_json:
            emit(_as_json(result))
        else:
            typer.echo(f"{result.adapter}  sha256 {result.checksum}")
            shown = "" if settings.vision is None else " --image FILE"
            typer.echo(f"ask it: llama-adapter chat {result.adapter}{shown}", err=True)


def _with_built_in(settings: Recipe) -> Recipe:
    """With the directory of a built-in model where `adapter.start` names one."""
    from llama_adapter.cli.models import BUILT_IN
    from llama_adapter.model.configuration import ADAPTER_CONFIG_NAME

    start = settings.adapter.start
    if start is None or str(start) not in BUILT_IN or (start / ADAPTER_CONFIG_NAME).exists():
        return settings
    changed = {"start": BUILT_IN[str(start)].directory()}
    return settings.model_copy(update={"adapter": settings.adapter.model_copy(update=changed)})


def _as_json(result: TrainingResult) -> dict[str, Any]:
    return {
        "adapter": str(result.adapter),
        "checksum": result.checksum,
        "steps": result.steps,
        "started_at": result.started_at,
        "broken": result.invalid,
        "trained": result.trained,
    }


def source_types() -> SourceTypes:
    """Every source type that a recipe may name, those of the miniature world too."""
    from llama_adapter.miniature.sources import SOURCES_WITH_MINIATURES

    return SOURCES_WITH_MINIATURES


class CaptionScores:
    """CIDEr and BLEU-4 as COCO's server computes them; without Java the tokens are approximate."""

    def __call__(
        self, captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        from llama_adapter.evaluation.captions import caption_metrics, caption_sums

        totals = caption_sums(captions, references, meteor=False).sums_UC.sum(axis=0)
        found = caption_metrics(totals)
        return {"cider": float(found["CIDEr"]), "bleu4": float(found["BLEU-4"])}

    @property
    def metrics(self) -> list[str]:
        """What it scores, found by scoring: what is not installed is missed here, not later."""
        return list(self(["a star"], [["a star"]]))


score_captions = CaptionScores()


def _check(
    settings: Recipe, types: SourceTypes, *, resume: bool, emit: Callable[[Any], None] | None
) -> None:
    from llama_adapter.training.build import load_processor
    from llama_adapter.training.dry_run import check_recipe
    from llama_adapter.training.run_directory import RunDirectory

    world = int(os.environ.get("WORLD_SIZE", "1"))
    report = check_recipe(
        settings, load_processor(settings), types=types, world=world, score_captions=score_captions
    )
    try:
        RunDirectory(settings.out).check(settings, resume=resume)
    except LlamaAdapterError as error:
        report = replace(report, errors=(*report.errors, str(error)))
    if emit is not None:
        emit(report.to_dict())
    else:
        typer.echo(report.as_text())
    report.refuse()


@contextmanager
def watching(recipe: Recipe) -> Iterator[Callbacks]:
    """A progress bar on a terminal, else a line now and then; on stderr, in one process."""
    from rich.console import Console

    from llama_adapter.cli.progress import bars, lines
    from llama_adapter.training.callbacks import Callbacks

    if os.environ.get("RANK", "0") != "0":
        yield Callbacks()
    elif not Console(stderr=True).is_terminal:
        yield Callbacks(
            step=_lines(recipe),
            message=lambda message: typer.echo(message, err=True),
            progress=lines,
        )
    else:
        with bars("{task.description}", "{task.fields[speed]}") as display:
            yield _bar_callbacks(display, recipe)


def _lines(recipe: Recipe) -> Callable[[dict[str, Any]], None]:
    def show(row: dict[str, Any]) -> None:
        step = row["step"]
        scored = any(name.startswith("held_out/") for name in row)
        steps = _total(row, recipe)
        if step % recipe.logging.every == 0 or scored or step == steps:
            speed = row["tokens"] / max(row["seconds"], 1e-9)
            typer.echo(
                f"step {step}/{_total(row, recipe) or '?'}  {_losses(row)}  {speed:,.0f} tokens/s",
                err=True,
            )

    return show


def _total(row: dict[str, Any], recipe: Recipe) -> int | None:
    """The steps in all as far as they are known: with `minutes` the pace tells after a few."""
    from llama_adapter.training.recipe import MOST_STEPS

    steps = row.get("steps", recipe.steps)
    return None if steps == MOST_STEPS else steps


def _losses(row: dict[str, Any]) -> str:
    shown = []
    for name, value in row.items():
        part, _, rest = name.partition("/")
        if part in ("loss", "held_out"):
            shown.append(f"{rest} {'not finite' if value is None else f'{value:.4g}'}")
    return "  ".join(shown)


def _bar_callbacks(display: Any, recipe: Recipe) -> Callbacks:
    from llama_adapter.training.callbacks import Callbacks

    training: list[Any] = []

    def step(row: dict[str, Any]) -> None:
        if not training:
            training.append(display.add_task("train", total=None, speed=""))
        speed = row["tokens"] / max(row["seconds"], 1e-9)
        display.update(
            training[0],
            completed=row["step"],
            total=_total(row, recipe),
            description=_losses(row),
            speed=f"{speed:,.0f} tokens/s",
        )

    def progress(label: str, total: int) -> Callable[[int], None]:
        task = display.add_task(label, total=total, speed="")
        return lambda done: display.advance(task, done)

    return Callbacks(step=step, message=display.console.print, progress=progress)
