"""`llama-adapter eval`: answer a benchmark, have the answers judged, count."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from llama_adapter.cli.experts import ExpertChoice
from llama_adapter.cli.judges import JudgeChoice, judge_answers
from llama_adapter.cli.models import MODEL_HELP
from llama_adapter.cli.numbers import MAX_FRAMES, MAX_NEW_TOKENS, MAX_SEED, MAX_TEMPERATURE, between
from llama_adapter.cli.output import json_only
from llama_adapter.cli.score import TASK_HELP
from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_adapter.evaluation.answering import Answerer
    from llama_adapter.evaluation.running import Selection
    from llama_adapter.evaluation.tasks.base import Generation, Inputs, Task

SCORE_FILE = "score.json"

MINIATURE = "miniature"
_EVAL_HELP = f"{TASK_HELP[:-1]}; or {MINIATURE}, which draws its own data."
_Task = Annotated[str, typer.Argument(help=_EVAL_HELP, metavar="TASK", show_default=False)]
_Out = Annotated[Path, Option(help="Folder of the run.", metavar="DIR")]
_Model = Annotated[str | None, Option(help=f"{MODEL_HELP} With --endpoint, its name there.")]
_Data = Annotated[Path | None, Option(help="The benchmark's own file or folder.", metavar="PATH")]
_Predictions = Annotated[
    Path | None,
    Option(help="Have these stored answers judged instead of asking a model.", metavar="FILE"),
]
_Media = Annotated[
    Path | None,
    Option(help="Folder of pictures or videos; by default around --data.", metavar="DIR"),
]
_Baseline = Annotated[
    Path | None, Option(help="Answers to compare with (vicuna-80).", metavar="FILE")
]
_Split = Annotated[str | None, Option(help="Split of the data.")]
_Endpoint = Annotated[
    str | None, Option(help="Evaluate an OpenAI-compatible server instead.", metavar="URL")
]
_Experts = Annotated[
    list[str] | None,
    Option(
        help="An expert that describes pictures in words, as in `chat`; may be repeated.",
        metavar="NAME[=VALUE]",
    ),
]
_ExpertTimeout = Annotated[float, Option(help="Seconds that each expert has.")]
_ExpertTokens = Annotated[int, Option(help="Most tokens of what experts say.")]
_Judge = Annotated[str | None, Option(help="local, exact-match or synonym-match.", metavar="KIND")]
_JudgeUrl = Annotated[
    str | None, Option(help="OpenAI-compatible judge; key from the environment.", metavar="URL")
]
_JudgeModel = Annotated[
    str | None, Option(help="Its model, or with --judge local a model's directory.")
]
_JudgePrompts = Annotated[
    Path | None, Option(help="JSON of prompts instead of ours.", metavar="FILE")
]
_PRICES = between(0, 1e9)
_JudgeConcurrency = Annotated[
    int, Option(help="Prompts to a judge at once.", callback=between(1, 1000))
]
_PriceIn = Annotated[
    float | None, Option(help="Of a million tokens that the judge reads.", callback=_PRICES)
]
_PriceOut = Annotated[
    float | None, Option(help="Of a million tokens that it writes.", callback=_PRICES)
]
_Limit = Annotated[
    int | None,
    Option(help="Only so many records, as many of each part.", callback=between(1, 10**12)),
]
_Shard = Annotated[
    str | None, Option(help="i/n: every n-th record from the i-th on.", metavar="I/N")
]
_Merge = Annotated[bool, Option("--merge", help="Put finished shards together.")]
_Seed = Annotated[
    int, Option(help="For sampled answers and the bootstrap.", callback=between(0, MAX_SEED))
]
_Frames = Annotated[
    int | None, Option(help="Frames from a video.", callback=between(1, MAX_FRAMES))
]
_Prompt = Annotated[
    str | None, Option(help="What is asked, with {question} for the task's question.")
]
_MaxNewTokens = Annotated[
    int | None, Option(help="Longest answer.", callback=between(1, MAX_NEW_TOKENS))
]
_Temperature = Annotated[
    float | None, Option(help="0: no sampling.", callback=between(0, MAX_TEMPERATURE))
]
_Images = Annotated[
    Literal["own", "none", "shuffled"] | None,
    Option(help="Show each record's own images, none, or another record's."),
]
_BatchSize = Annotated[int | None, Option(help="Records at once.", callback=between(1, 1_000_000))]
_Device = Annotated[str | None, Option(help="cpu, cuda, …")]
_Json = Annotated[bool, Option("--json", help="Print one JSON object.")]


def eval_(
    task: _Task,
    out: _Out,
    model: _Model = None,
    data: _Data = None,
    predictions: _Predictions = None,
    media: _Media = None,
    baseline: _Baseline = None,
    split: _Split = None,
    endpoint: _Endpoint = None,
    expert: _Experts = None,
    expert_timeout: _ExpertTimeout = 30.0,
    expert_tokens: _ExpertTokens = 512,
    judge: _Judge = None,
    judge_url: _JudgeUrl = None,
    judge_model: _JudgeModel = None,
    judge_prompts: _JudgePrompts = None,
    judge_concurrency: _JudgeConcurrency = 8,
    judge_price_in: _PriceIn = None,
    judge_price_out: _PriceOut = None,
    limit: _Limit = None,
    shard: _Shard = None,
    merge: _Merge = False,
    seed: _Seed = 0,
    frames: _Frames = None,
    prompt: _Prompt = None,
    images: _Images = None,
    max_new_tokens: _MaxNewTokens = None,
    temperature: _Temperature = None,
    batch_size: _BatchSize = None,
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Evaluate a model on a benchmark; run it again to go on where it stopped.

    \b
    Examples:
      llama-adapter eval miniature --model toy --out runs/miniature
      llama-adapter eval mme --model toy --expert ocr --data MME/ --out runs/mme
      llama-adapter eval msvd-qa --model runs/mine/adapter --data msvd/ --out runs/msvd \\
          --judge-url http://localhost:8000/v1 --judge-model grader
      llama-adapter eval msvd-qa --predictions results.json --data msvd/ --out runs/judged \\
          --judge-url http://localhost:8000/v1 --judge-model grader
    """
    # what is wrong in the options is said before a model is loaded
    if task == MINIATURE:
        others = {
            "--data": data,
            "--predictions": predictions,
            "--endpoint": endpoint,
            "--expert": expert,
            "--judge": judge,
            "--judge-url": judge_url,
            "--shard": shard,
            "--merge": merge,
        }
        for option, value in others.items():
            if value:
                raise ConfigError(f"miniature draws its own data and has no use for {option}")
        _eval_miniature(model, out, limit=limit, device=device, as_json=as_json)
        return
    chosen = JudgeChoice(
        kind=judge,
        url=judge_url,
        model=judge_model,
        prompts=judge_prompts,
        concurrency=judge_concurrency,
        prices=(judge_price_in, judge_price_out),
    )
    if predictions is not None and (model or endpoint or merge or limit or shard):
        raise ConfigError(
            "--predictions are answers already: no --model, --limit, --shard, --merge"
        )
    experts = ExpertChoice(
        model=model,
        names=tuple(expert or ()),
        timeout=expert_timeout,
        max_tokens=expert_tokens,
    )
    sampling = {"seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens}
    asking = {"frames": frames, "prompt": prompt, "batch_size": batch_size, "images": images}
    plan = _plan(task, out, {**sampling, **asking}, limit=limit, shard=shard)
    with contextlib.ExitStack() as opened:
        emit = opened.enter_context(json_only(as_json))
        if predictions is not None:
            known = plan.inputs(data, baseline=baseline, split=split) if data is not None else None
            plan.take(predictions, known)
        elif not merge:
            inputs = plan.inputs(data, baseline=baseline, split=split)
            answerer = _answerer(opened, model, endpoint, device=device, experts=experts)
            plan.answer(answerer, inputs, media=media)
        plan.judge_and_score(chosen, merge=merge, device=device, emit=emit if as_json else None)


def _eval_miniature(
    model: str | None, out: Path, *, limit: int | None, device: str | None, as_json: bool
) -> None:
    from llama_adapter.cli.models import load
    from llama_adapter.cli.progress import stages
    from llama_adapter.cli.score import print_report
    from llama_adapter.evaluation.score import ScoreReport
    from llama_adapter.files import write_atomically
    from llama_adapter.miniature.task import (
        METRICS,
        HeldOutScenes,
        bundled_expert_captions,
        evaluate,
        num_answers,
    )

    if model is None:
        raise ConfigError("--model is needed: an adapter directory or `toy`")
    test = HeldOutScenes.draw() if limit is None else HeldOutScenes.draw(questions=limit)
    with json_only(as_json) as emit:
        loaded, processor = load(model, device=device)
        with stages() as stage:
            expert = bundled_expert_captions(
                test, progress=stage("the caption expert", len(test.images))
            )
            total = num_answers(test, is_multimodal=loaded.adapter_config.is_multimodal)
            results = evaluate(
                loaded,
                processor,
                test,
                expert_captions=expert,
                progress=stage("miniature: answers", total),
            )
        report = ScoreReport(
            task=MINIATURE,
            n=len(test.questions),
            unanswered=0,
            unparsed=0,
            unjudged=0,
            metrics={name: 100 * score.value for name, score in results.metrics.items()},
            intervals={
                name: (100 * score.interval()[0], 100 * score.interval()[1])
                for name, score in results.metrics.items()
            },
            protocol={"metrics": METRICS, "model": model},
        )
        splits = results.to_dict()
        result = {
            **report.as_json(),
            "by_objects": splits["by_objects"],
            "by_question": splits["by_question"],
        }
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / SCORE_FILE, json.dumps(result, indent=2) + "\n")
        if as_json:
            emit({**result, "out": str(out)})
        else:
            print_report(report)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """One run: what is asked of whom, and where it is kept."""

    task: Task
    out: Path
    generation: Generation
    selection: Selection

    def inputs(self, data: Path | None, *, baseline: Path | None, split: str | None) -> Inputs:
        """What the task reads."""
        from llama_adapter.evaluation.tasks.base import Inputs

        if data is None:
            raise ConfigError("--data is needed: the benchmark's own file or folder")
        for path in (data, baseline):
            if path is not None and not path.exists():
                raise ConfigError(f"{path} does not exist")
        return Inputs(data=data, baseline=baseline, split=split)

    @property
    def folder(self) -> Path:
        """Where the answers are."""
        from llama_adapter.evaluation.running import run_folder

        return run_folder(self.out, self.selection)

    def take(self, predictions: Path, inputs: Inputs | None) -> None:
        """Put stored answers where a run keeps its own."""
        from llama_adapter.evaluation.predictions import PREDICTIONS, store_answers
        from llama_adapter.evaluation.score import read_joined

        if (self.folder / PREDICTIONS).resolve() in (
            predictions.resolve(),
            (predictions / PREDICTIONS).resolve(),
        ):
            return  # a run of ours, which is judged where it is
        store_answers(read_joined(self.task, predictions, inputs), self.folder, task=self.task.name)

    def answer(self, answerer: Answerer, inputs: Inputs, *, media: Path | None) -> None:
        """Get the answers that are not there yet, behind a bar."""
        from llama_adapter.cli.progress import stages
        from llama_adapter.evaluation.running import run

        with stages() as stage:
            advance: Callable[[int], None] | None = None

            def progress(done: int, total: int) -> None:
                nonlocal advance
                advance = advance or stage(f"{self.task.name}: answers", total)
                advance(done)

            report = run(
                self.task,
                answerer,
                inputs,
                self.out,
                generation=self.generation,
                selection=self.selection,
                media=media,
                progress=progress,
            )
        if report.problems:
            typer.echo(f"{len(report.problems)} records have no answer:", err=True)
        for problem in report.problems[:5]:
            typer.echo(f"  {problem}", err=True)

    def judge_and_score(
        self,
        choice: JudgeChoice,
        *,
        merge: bool,
        device: str | None,
        emit: Callable[[dict[str, Any]], object] | None,
    ) -> None:
        """Verdicts, numbers, `score.json`, and the numbers once more for whoever asked."""
        from llama_adapter.cli.score import print_report
        from llama_adapter.evaluation.running import merge_shards
        from llama_adapter.evaluation.score import score
        from llama_adapter.files import write_atomically

        folder = merge_shards(self.task, self.out).parent if merge else self.folder
        usage = judge_answers(self.task, folder, choice, device=device)
        report = score(self.task.name, folder, seed=self.generation.seed)
        result = {**report.as_json(), **({} if usage is None else {"judging": usage})}
        write_atomically(folder / SCORE_FILE, json.dumps(result, indent=2) + "\n")
        if emit is not None:
            emit({**result, "out": str(folder)})
            return
        print_report(report)
        if usage and "cost" in usage:
            typer.echo(f"judging cost {usage['cost']:.4f} for {usage['replies']} replies")


def _plan(
    task: str, out: Path, settings: dict[str, Any], *, limit: int | None, shard: str | None
) -> _Plan:
    from llama_adapter.evaluation.running import Selection, parse_shard
    from llama_adapter.evaluation.tasks import find_task

    found = find_task(task)
    changed = {name: value for name, value in settings.items() if value is not None}
    return _Plan(
        task=found,
        out=out,
        generation=replace(found.generation, **changed),
        selection=Selection(limit=limit, shard=parse_shard(shard) if shard else None),
    )


def _answerer(
    opened: contextlib.ExitStack,
    model: str | None,
    endpoint: str | None,
    *,
    device: str | None,
    experts: ExpertChoice,
) -> Answerer:
    from llama_adapter.evaluation.answering import EndpointAnswerer, LocalAnswerer

    if model is None:
        raise ConfigError("--model is needed: an adapter directory, `toy`, or a name at --endpoint")
    loaded = processor = None
    answerer: Answerer
    if endpoint is not None:
        remote = EndpointAnswerer(url=endpoint, model=model)
        answerer = opened.enter_context(contextlib.closing(remote))
    else:
        from llama_adapter.cli.models import adapter_directory, load

        loaded, processor = load(model, device=device)
        answerer = LocalAnswerer(loaded, processor, directory=adapter_directory(model))
    if not experts.names:
        return answerer
    from llama_adapter.evaluation.with_experts import ExpertAnswerer

    pool = experts.open(loaded=loaded, processor=processor, device=device)
    return ExpertAnswerer(answerer, pool, named=experts.names)
