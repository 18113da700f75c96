"""`--judge…`: from what a user writes to verdicts beside the answers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from llama_adapter.evaluation.judges import Judge
    from llama_adapter.evaluation.judging import JudgeReport
    from llama_adapter.evaluation.tasks.base import Task

KINDS = ("local", "exact-match", "synonym-match")


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeChoice:
    """Who judges, as the options say; refused before a model is loaded."""

    kind: str | None = None
    url: str | None = None
    model: str | None = None
    prompts: Path | None = None
    concurrency: int = 8
    prices: tuple[float | None, float | None] = (None, None)
    """For a million tokens that a judge reads, and writes."""

    def __post_init__(self) -> None:
        if (self.url is not None or self.kind == "local") and not self.model:
            raise ConfigError("a judge is named with --judge-model, and none is given")
        if self.model and self.url is None and self.kind != "local":
            raise ConfigError("--judge-model needs --judge-url, or --judge local")
        if self.kind is not None and self.kind not in KINDS:
            raise ConfigError(f"--judge must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind is not None and self.url is not None:
            raise ConfigError(f"--judge {self.kind} and --judge-url are two judges; give one")
        if self.concurrency < 1:
            raise ConfigError(f"--judge-concurrency must be at least 1, got {self.concurrency}")
        if (self.prices[0] is None) != (self.prices[1] is None):
            raise ConfigError("--judge-price-in and --judge-price-out are needed together")

    @property
    def is_given(self) -> bool:
        """Whether anybody judges."""
        return self.kind is not None or self.url is not None

    def open(self, *, device: str | None = None) -> Judge:
        """The judge: a model here, or one behind an endpoint."""
        from llama_adapter.evaluation.judges import EndpointJudge, LocalJudge

        if self.kind == "local":
            from llama_adapter.cli.models import torch_device

            return LocalJudge(str(self.model), device=torch_device(device))
        return EndpointJudge(url=str(self.url), model=str(self.model), concurrency=self.concurrency)


def judge_answers(
    task: Task, folder: Path, choice: JudgeChoice, *, device: str | None = None
) -> dict[str, Any] | None:
    """Have the answers in a folder judged; what that took, in tokens and money."""
    from llama_adapter.evaluation.costs import Prices, judge_usage
    from llama_adapter.evaluation.judges import WORD_JUDGES
    from llama_adapter.evaluation.judging import compare_words
    from llama_adapter.evaluation.score import read_predictions

    if not choice.is_given:
        if task.judging is not None:
            typer.echo("answers are stored but not judged: give --judge-url or --judge", err=True)
        return None
    prices = Prices(prompt=choice.prices[0], completion=choice.prices[1])
    rows = read_predictions(task, folder).rows
    if choice.kind in WORD_JUDGES:
        compare_words(task, rows, str(choice.kind), folder)
    else:
        report = _ask(task, folder, choice, rows, device=device)
        listed = {"unreadable": report.unreadable, "unavailable": report.unavailable}
        usage = judge_usage(folder, prices=prices) or {}
        return {**usage, **{name: list(labels) for name, labels in listed.items()}}
    return judge_usage(folder, prices=prices)


def _ask(
    task: Task, folder: Path, choice: JudgeChoice, rows: Any, *, device: str | None
) -> JudgeReport:
    from llama_adapter.cli.progress import stages
    from llama_adapter.evaluation.judging import judge_rows, read_judge_prompts

    judging = read_judge_prompts(task, choice.prompts) if choice.prompts else None
    with contextlib.closing(choice.open(device=device)) as judge, stages() as stage:
        advance = stage(f"{task.name}: verdicts", len(rows))
        report = judge_rows(task, rows, judge, folder, judging=judging, progress=advance)
    typer.echo(
        f"judge {judge.name}: {report.asked} prompts, {report.prompt_tokens} + "
        f"{report.completion_tokens} tokens, {len(report.unreadable)} unreadable, "
        f"{len(report.unavailable)} without a reply",
        err=True,
    )
    for label in (*report.unreadable, *report.unavailable)[:5]:
        typer.echo(f"  {label}", err=True)
    return report
