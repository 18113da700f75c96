"""`llama-adapter score`: numbers from stored answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llama_adapter.evaluation.score import ScoreReport

TASK_HELP = (
    "msvd-qa, msrvtt-qa, activitynet-qa, videoinstruct, infimm-eval, coco-caption, scienceqa, "
    "mme, vicuna-80, vqa or vqav2."
)


def score(
    task: Annotated[str, typer.Argument(help=TASK_HELP, metavar="TASK", show_default=False)],
    predictions: Annotated[
        Path,
        typer.Option(
            help="Answers: predictions.jsonl or the folder of a run, or a public result file.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="The benchmark's own file or folder.", metavar="PATH", show_default=False
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data; the published one by default.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="For captions: auto, ptb (needs Java), simple or none.")
    ] = "auto",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples; 0 for no intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score stored answers, with 95% intervals; no model and no judge is asked.

    \b
    Examples:
      llama-adapter score coco-caption --predictions pred.json --data references.json
      llama-adapter score mme --predictions results/
      llama-adapter score scienceqa --predictions results.json --data ScienceQA/
      llama-adapter score vicuna-80 --predictions review.jsonl --json
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.evaluation.score import score as score_answers
    from llama_adapter.evaluation.tasks.base import Counting, Inputs

    with json_only(as_json) as emit:
        report = score_answers(
            task,
            predictions,
            inputs=None if data is None else Inputs(data=data, split=split),
            counting=Counting(tokenizer=tokenizer),
            resamples=resamples,
            seed=seed,
        )
    if as_json:
        emit(report.as_json())
    else:
        print_report(report)


def print_report(report: ScoreReport, *, counted: str | None = None) -> None:
    """A line a metric, then what a reader must know; `counted` is said in place of records."""
    counted = counted or (
        f"{report.n} records, {report.unanswered} unanswered, "
        f"{report.unparsed} unparsed, {report.unjudged} unjudged"
    )
    typer.echo(f"{report.task}: {counted}")
    width = max(map(len, report.metrics), default=0) + 2
    for name, value in report.metrics.items():
        interval = report.intervals.get(name)
        shown = "" if interval is None else f"   95% [{interval[0]:.2f}, {interval[1]:.2f}]"
        typer.echo(f"  {name:<{width}}{value:9.2f}{shown}")
    for note in report.notes:
        typer.echo(f"note: {note}")
