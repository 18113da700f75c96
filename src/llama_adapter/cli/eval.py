"""`llama-adapter eval`: answer a benchmark, have the answers judged, count."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_adapter.cli.models import MODEL_HELP
from llama_adapter.cli.score import TASK_HELP
from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_adapter.cli.experts import PanelChoice
    from llama_adapter.evaluation.answering import Answerer
    from llama_adapter.evaluation.running import RunReport
    from llama_adapter.evaluation.tasks.base import Inputs, Task

SCORE_FILE = "score.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeChoice:
    """Who judges, as the options say."""

    kind: str | None = None
    url: str | None = None
    model: str | None = None
    prompts: Path | None = None
    concurrency: int = 8

    def __post_init__(self) -> None:
        if (self.url is not None or self.kind == "local") and not self.model:
            raise ConfigError("a judge is named with --judge-model, and none is given")
        if self.model and self.url is None and self.kind != "local":
            raise ConfigError("--judge-model needs --judge-url, or --judge local")
        kinds = ("local", "exact-match", "synonym-match")
        if self.kind is not None and self.kind not in kinds:
            raise ConfigError(f"--judge must be one of {', '.join(kinds)}, got {self.kind!r}")


def eval_(
    task: Annotated[str, typer.Argument(help=TASK_HELP, metavar="TASK", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the run.", metavar="DIR")],
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} With --endpoint, its name there.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The benchmark's own file or folder.", metavar="PATH")
    ] = None,
    media: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures or videos; by default around --data.", metavar="DIR"),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Answers to compare with (vicuna-80).", metavar="FILE")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data.")] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Evaluate an OpenAI-compatible server instead.", metavar="URL"),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            help="An expert that describes pictures in words, as in `chat`; may be repeated.",
            metavar="NAME[=VALUE]",
        ),
    ] = None,
    expert_timeout: Annotated[float, typer.Option(help="Seconds that each expert has.")] = 30.0,
    expert_tokens: Annotated[int, typer.Option(help="Most tokens of what experts say.")] = 512,
    judge: Annotated[
        str | None, typer.Option(help="local, exact-match or synonym-match.", metavar="KIND")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible judge; key from the environment.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Its model, or with --judge local a model's directory.")
    ] = None,
    judge_prompts: Annotated[
        Path | None, typer.Option(help="JSON of prompts instead of ours.", metavar="FILE")
    ] = None,
    judge_concurrency: Annotated[int, typer.Option(help="Prompts to a judge at once.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Only the first so many records.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: every n-th record from the i-th on.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put finished shards together.")] = False,
    seed: Annotated[int, typer.Option(help="For sampled answers and the bootstrap.")] = 0,
    frames: Annotated[int | None, typer.Option(help="Frames from a video.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What is asked, with {question} for the task's question.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: no sampling.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records at once.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a model on a benchmark; run it again to go on where it stopped.

    \b
    Examples:
      llama-adapter eval mme --model runs/mine/final --data MME/ --out runs/mme
      llama-adapter eval mme --model toy --expert ocr --data MME/ --out runs/mme-ocr
      llama-adapter eval msvd-qa --model toy --data msvd/ --out runs/msvd \\
          --judge-url http://localhost:8000/v1 --judge-model grader
    """
    from llama_adapter.cli.experts import PanelChoice
    from llama_adapter.cli.output import json_only
    from llama_adapter.cli.score import print_report
    from llama_adapter.evaluation.running import Selection, merge_shards, parse_shard
    from llama_adapter.evaluation.score import score
    from llama_adapter.evaluation.tasks import find_task
    from llama_adapter.evaluation.tasks.base import Inputs

    found = find_task(task)
    chosen = JudgeChoice(
        kind=judge,
        url=judge_url,
        model=judge_model,
        prompts=judge_prompts,
        concurrency=judge_concurrency,
    )
    # what is wrong in the options is said before a model is loaded
    panel = PanelChoice(names=tuple(expert or ()), timeout=expert_timeout, max_tokens=expert_tokens)
    selection = Selection(limit=limit, shard=parse_shard(shard) if shard else None)
    settings = {
        "seed": seed,
        "frames": frames,
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    with json_only(as_json) as emit:
        folder = out
        if merge:
            merge_shards(found, out)
        else:
            folder = _answer(
                found,
                Inputs(data=_needed(data), baseline=baseline, split=split),
                lambda: _answerer(model, endpoint=endpoint, device=device, panel=panel),
                out=out,
                media=media,
                selection=selection,
                settings=settings,
            ).folder
        _judge(found, folder, chosen)
        report = score(task, folder, seed=seed)
        (folder / SCORE_FILE).write_text(json.dumps(report.as_json(), indent=2) + "\n")
    if as_json:
        emit({**report.as_json(), "out": str(folder)})
    else:
        print_report(report)


def _needed(data: Path | None) -> Path:
    if data is None:
        raise ConfigError("--data is needed: the benchmark's own file or folder")
    return data


def _answerer(
    model: str | None, *, endpoint: str | None, device: str | None, panel: PanelChoice
) -> Answerer:
    from llama_adapter.evaluation.answering import EndpointAnswerer, LocalAnswerer

    if model is None:
        raise ConfigError("--model is needed: an adapter directory, `toy`, or a name at --endpoint")
    loaded = processor = None
    answerer: Answerer
    if endpoint is not None:
        answerer = EndpointAnswerer(url=endpoint, model=model)
    else:
        from llama_adapter.cli.models import adapter_directory, load

        loaded, processor = load(model, device=device)
        answerer = LocalAnswerer(loaded, processor, directory=adapter_directory(model))
    if not panel.names:
        return answerer
    from llama_adapter.evaluation.with_experts import ExpertAnswerer

    experts = panel.open(model=model, loaded=loaded, processor=processor, device=device)
    return ExpertAnswerer(answerer, experts, named=panel.names)


def _answer(
    task: Task,
    inputs: Inputs,
    make_answerer: Callable[[], Answerer],
    *,
    settings: dict[str, Any],
    **options: Any,
) -> RunReport:
    from llama_adapter.cli.progress import stages
    from llama_adapter.evaluation.running import run

    out = options.pop("out")
    answerer = make_answerer()
    changed = {name: value for name, value in settings.items() if value is not None}
    with stages() as stage:
        advance: Callable[[int], None] | None = None

        def progress(done: int, total: int) -> None:
            nonlocal advance
            advance = advance or stage(f"{task.name}: answers", total)
            advance(done)

        report = run(
            task,
            answerer,
            inputs,
            out,
            generation=replace(task.generation, **changed),
            progress=progress,
            **options,
        )
    if report.problems:
        typer.echo(f"{len(report.problems)} records have no answer:", err=True)
        for problem in report.problems[:5]:
            typer.echo(f"  {problem}", err=True)
    return report


def _judge(task: Task, folder: Path, choice: JudgeChoice) -> None:
    from llama_adapter.cli.progress import stages
    from llama_adapter.evaluation.judges import WORD_JUDGES, EndpointJudge, Judge, LocalJudge
    from llama_adapter.evaluation.judging import compare_words, judge_rows, read_judge_prompts
    from llama_adapter.evaluation.score import read_predictions

    if choice.kind is None and choice.url is None:
        if task.judging is not None:
            typer.echo("answers are stored but not judged: give --judge-url or --judge", err=True)
        return
    rows = read_predictions(task, folder).rows
    if choice.kind in WORD_JUDGES:
        compare_words(task, rows, str(choice.kind), folder)
        return
    judge: Judge
    if choice.kind == "local":
        judge = LocalJudge(str(choice.model))
    else:
        judge = EndpointJudge(
            url=str(choice.url), model=str(choice.model), concurrency=choice.concurrency
        )
    judging = read_judge_prompts(task, choice.prompts) if choice.prompts else None
    with stages() as stage:
        report = judge_rows(
            task,
            rows,
            judge,
            folder,
            judging=judging,
            progress=stage(f"{task.name}: verdicts", len(rows)),
        )
    typer.echo(
        f"judge {judge.name}: {report.asked} prompts, {report.prompt_tokens} + "
        f"{report.completion_tokens} tokens, {len(report.unreadable)} unreadable, "
        f"{len(report.unavailable)} without a reply",
        err=True,
    )
