"""`--judge…`: from what a user writes to verdicts next to the answers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer import Option

from llama_adapter.cli.numbers import between
from llama_adapter.config import not_one_of
from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from llama_adapter.evaluation.judges import Judge
    from llama_adapter.evaluation.judging import JudgeReport
    from llama_adapter.evaluation.tasks.base import Task

KINDS = ("local", "exact-match", "synonym-match")


_PRICE = between(0, 1e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """How judging went."""

    usage: dict[str, Any] | None = None
    """What it took, in tokens and money; None where no judge is given."""
    failure: str | None = None
    """Why it was in vain, where the judge replied to nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeSettings:
    """Who judges; refused before a model is loaded."""

    section: ClassVar[str] = "Judge"

    judge: Annotated[
        str | None,
        Option(
            help="local: --judge-model on this machine; exact-match or synonym-match: words are "
            "compared, without a model.",
            metavar="KIND",
        ),
    ] = None
    judge_url: Annotated[
        str | None, Option(help="OpenAI-compatible judge; key from the environment.", metavar="URL")
    ] = None
    judge_model: Annotated[
        str | None, Option(help="Its model, or with --judge local a model's directory.")
    ] = None
    judge_prompts: Annotated[
        Path | None, Option(help="JSON of prompts instead of ours.", metavar="FILE")
    ] = None
    judge_concurrency: Annotated[
        int, Option(help="Prompts to a judge at once.", callback=between(1, 1000))
    ] = 8
    judge_price_in: Annotated[
        float | None,
        Option(help="Price of a million tokens that the judge reads.", callback=_PRICE),
    ] = None
    judge_price_out: Annotated[
        float | None, Option(help="Price of a million tokens that it writes.", callback=_PRICE)
    ] = None

    def __post_init__(self) -> None:
        if (self.judge_url is not None or self.judge == "local") and not self.judge_model:
            raise ConfigError("a judge is named with --judge-model, and none is given")
        if self.judge_model and not self.is_model:
            raise ConfigError("--judge-model needs --judge-url, or --judge local")
        if self.judge is not None and self.judge not in KINDS:
            raise ConfigError(not_one_of("--judge", self.judge, KINDS))
        if self.judge is not None and self.judge_url is not None:
            raise ConfigError(f"--judge {self.judge} and --judge-url are two judges; give one")
        if (self.judge_price_in is None) != (self.judge_price_out is None):
            raise ConfigError("--judge-price-in and --judge-price-out are needed together")

    @property
    def is_given(self) -> bool:
        """Whether anybody judges."""
        return self.judge is not None or self.judge_url is not None

    @property
    def is_model(self) -> bool:
        """Whether a model judges, not a comparison of words."""
        return self.judge_url is not None or self.judge == "local"

    def check(self, task: Task) -> None:
        """Refuse a comparison of words for a task of long answers."""
        if self.judge is not None and not self.is_model:
            from llama_adapter.evaluation.judging import check_word_judge

            check_word_judge(task, self.judge)

    def open(self, *, device: str | None = None) -> Judge:
        """The judge: a model here, or one behind an endpoint."""
        from llama_adapter.evaluation.judges import EndpointJudge, LocalJudge

        if self.judge == "local":
            from llama_adapter.cli.models import torch_device

            return LocalJudge(str(self.judge_model), device=torch_device(device))
        return EndpointJudge(
            url=str(self.judge_url),
            model=str(self.judge_model),
            concurrency=self.judge_concurrency,
        )


def judge_answers(
    task: Task, folder: Path, settings: JudgeSettings, *, device: str | None = None
) -> Judged:
    """Have the answers in a folder judged.

    Where the judge replied to nothing, nothing is raised yet: what is stored is scored first.
    """
    from llama_adapter.evaluation.costs import Prices, judge_usage
    from llama_adapter.evaluation.judging import compare_words
    from llama_adapter.evaluation.score import read_predictions

    if not settings.is_given:
        return Judged()
    prices = Prices(prompt=settings.judge_price_in, completion=settings.judge_price_out)
    rows = read_predictions(task, folder).rows
    if settings.is_model:
        report, failure = _ask(task, folder, settings, rows, device=device)
        listed = {"unreadable": report.unreadable, "unavailable": report.unavailable}
        usage = judge_usage(folder, prices=prices) or {}
        usage |= {name: list(labels) for name, labels in listed.items()}
        return Judged(usage=usage, failure=failure)
    compare_words(task, rows, str(settings.judge), folder)
    return Judged(usage=judge_usage(folder, prices=prices))


def _ask(
    task: Task, folder: Path, settings: JudgeSettings, rows: Any, *, device: str | None
) -> tuple[JudgeReport, str | None]:
    """What was judged, and why nothing was where the judge never replied."""
    from llama_adapter.cli.progress import stages
    from llama_adapter.evaluation.judging import judge_rows, read_judge_prompts

    judging = None
    if settings.judge_prompts:
        judging = read_judge_prompts(task, settings.judge_prompts)
    with contextlib.closing(settings.open(device=device)) as judge, stages() as stage:
        advance = stage(f"{task.name}: verdicts", len(rows))
        report = judge_rows(task, rows, judge, folder, judging=judging, progress=advance)
    typer.echo(
        f"judge {judge.name}: {report.asked} prompts, {report.prompt_tokens} + "
        f"{report.completion_tokens} tokens, {len(report.unreadable)} unreadable, "
        f"{len(report.unavailable)} without a reply",
        err=True,
    )
    for label in (*report.unavailable, *report.unreadable)[:5]:
        reason = report.reasons.get(label, "no reply could be read")
        typer.echo(f"  {label}: {reason}", err=True)
    if not report.is_without_reply:
        return report, None
    return report, (
        f"the judge {judge.name} replied to none of the {report.asked:,} prompts. The answers "
        "are kept: run the same command again, and they are judged"
    )
