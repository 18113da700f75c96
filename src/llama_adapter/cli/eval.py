"""`llama-adapter eval`: answer a benchmark, have the answers judged, count."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer
from typer import Option

from llama_adapter.cli.experts import ExpertSettings
from llama_adapter.cli.judges import JudgeSettings, judge_answers
from llama_adapter.cli.models import BUILT_IN_NAMES, MODEL_OPTION
from llama_adapter.cli.numbers import (
    MAX_BEAMS,
    MAX_FRAMES,
    MAX_NEW_TOKENS,
    MAX_SEED,
    MAX_TEMPERATURE,
    between,
)
from llama_adapter.cli.output import json_only
from llama_adapter.cli.score import TASK_HELP
from llama_adapter.cli.settings import Unread, given_options, refuse_unread
from llama_adapter.errors import ConfigError, EvaluationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_adapter.evaluation.answering import Answerer
    from llama_adapter.evaluation.records import Record
    from llama_adapter.evaluation.running import Selection
    from llama_adapter.evaluation.tasks.base import Generation, Inputs, Task
    from llama_adapter.miniature.task import HeldOutScenes

MINIATURE = "miniature"
_EVAL_HELP = f"{TASK_HELP[:-1]}; or {MINIATURE}, which draws its own data."
_LENGTHS_HELP = (
    "Tokens of the longest answer; by default 64, but mme 16, vqav2 16, coco-caption 32, "
    "scienceqa 128, videoinstruct 256, infimm-eval 256, vicuna-80 1024."
)
_Task = Annotated[str, typer.Argument(help=_EVAL_HELP, metavar="TASK", show_default=False)]
_Out = Annotated[Path, Option(help="Folder of the run.", metavar="DIR")]
_Json = Annotated[bool, Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswererSettings:
    """Who answers."""

    section: ClassVar[str] = "Answers"

    model: Annotated[str | None, MODEL_OPTION] = None
    endpoint: Annotated[
        str | None,
        Option(
            help="Evaluate an OpenAI-compatible server instead, http://127.0.0.1:8000/v1 or so.",
            metavar="URL",
        ),
    ] = None
    predictions: Annotated[
        Path | None,
        Option(help="Have these stored answers judged instead of asking a model.", metavar="FILE"),
    ] = None
    device: Annotated[str | None, Option(help="cpu, cuda, …")] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """What is asked about."""

    section: ClassVar[str] = "Data"

    data: Annotated[
        Path | None, Option(help="The benchmark's own file or folder.", metavar="PATH")
    ] = None
    media: Annotated[
        Path | None,
        Option(help="Folder of images or videos; by default around --data.", metavar="DIR"),
    ] = None
    baseline: Annotated[
        Path | None, Option(help="Answers to compare with (vicuna-80).", metavar="FILE")
    ] = None
    split: Annotated[str | None, Option(help="Split of the data.")] = None
    limit: Annotated[
        int | None,
        Option(
            help="Only so many records, as many of each part; of "
            f"{MINIATURE}, so many questions and images, but 2 images at least.",
            callback=between(1, 10**12),
        ),
    ] = None
    shard: Annotated[
        str | None, Option(help="i/n: every n-th record from the i-th on.", metavar="I/N")
    ] = None
    merge: Annotated[bool, Option("--merge", help="Put finished shards together.")] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AskingSettings:
    """How it is asked; what is not given is the task's own."""

    section: ClassVar[str] = "Generation"

    prompt: Annotated[
        str | None,
        Option(
            help="What is asked, with {question} for the task's question; by default the task's."
        ),
    ] = None
    images: Annotated[
        Literal["own", "none", "shuffled"] | None,
        Option(help="Show each record's own images (default), none, or another record's."),
    ] = None
    frames: Annotated[
        int | None,
        Option(help="Frames from a video; by default 8.", callback=between(1, MAX_FRAMES)),
    ] = None
    max_new_tokens: Annotated[
        int | None, Option(help=_LENGTHS_HELP, callback=between(1, MAX_NEW_TOKENS))
    ] = None
    temperature: Annotated[
        float | None,
        Option(help="0 (default): no sampling.", callback=between(0, MAX_TEMPERATURE)),
    ] = None
    beams: Annotated[
        int | None,
        Option(help="Beam search with so many; 1 (default): none.", callback=between(1, MAX_BEAMS)),
    ] = None
    seed: Annotated[
        int, Option(help="For sampled answers and the bootstrap.", callback=between(0, MAX_SEED))
    ] = 0
    batch_size: Annotated[
        int | None,
        Option(
            help=f"Records at once; by default 8, {MINIATURE} 64.", callback=between(1, 1_000_000)
        ),
    ] = None

    def changed(self) -> dict[str, Any]:
        """What differs from the task's own."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """All that `eval` is told."""

    answerer: AnswererSettings
    data: DataSettings
    asking: AskingSettings
    experts: ExpertSettings
    judge: JudgeSettings

    def unread(self, task: str, options: frozenset[str]) -> Unread:
        """Options that would have no effect here, and why; `options` are those of the task."""
        every = {
            field.name for group in fields(self) for field in fields(getattr(self, group.name))
        }
        yield frozenset(every - options), f"the task {task} does not read it"
        whose, data, judge = self.answerer, self.data, self.judge
        asking = frozenset((
            "model", "endpoint", "media", "limit", "shard",
            "prompt", "images", "frames", "max_new_tokens", "temperature", "beams", "batch_size",
            "expert", "expert_timeout", "expert_tokens", "expert_cache",
        ))  # fmt: skip
        if whose.predictions is not None:
            yield asking | {"merge"}, "--predictions are answers already"
            if data.data is None:
                yield frozenset(("baseline", "split")), "it needs --data"
        if self.asking.images == "none":
            yield frozenset(("media", "frames")), "no image is shown"
            if self.experts.names <= {"caption", "ocr", "detection"}:
                yield frozenset(("expert",)), "no image is shown"
        if data.merge:
            yield asking | {"data", "baseline", "split"}, "--merge only puts answers together"
        yield from self.experts.unread()
        if not judge.is_model:
            prices = ("judge_price_in", "judge_price_out")
            yield frozenset(("judge_prompts", *prices)), "it needs --judge-url or --judge local"
        if judge.judge_url is None:
            yield frozenset(("judge_concurrency",)), "it needs --judge-url"
        if whose.endpoint is not None:
            yield frozenset(("beams",)), "OpenAI's interface does not have it"
        is_elsewhere = whose.endpoint is not None and not self.experts.expert
        is_local = judge.judge == "local"
        if (is_elsewhere or whose.predictions is not None or data.merge) and not is_local:
            yield frozenset(("device",)), "no model runs here"


def eval_(
    context: typer.Context,
    task: _Task,
    out: _Out,
    answerer: AnswererSettings,
    data: DataSettings,
    asking: AskingSettings,
    experts: ExpertSettings,
    judge: JudgeSettings,
    *,
    as_json: _Json = False,
) -> None:
    """Evaluate a model on a benchmark; run it again to go on where it stopped.

    The task miniature stores no answers: run again, it starts over.

    \b
    Examples:
      llama-adapter eval miniature --model toy --out runs/miniature
      llama-adapter eval vqa --model toy --data questions.jsonl --out runs/vqa \\
          --judge synonym-match
      llama-adapter eval mme --model toy --expert ocr --data MME/ --out runs/mme
      llama-adapter eval msvd-qa --model runs/mine/adapter --data msvd/ --out runs/msvd \\
          --judge-url http://localhost:8000/v1 --judge-model grader
      llama-adapter eval msvd-qa --predictions results.json --data msvd/ --out runs/judged \\
          --judge-url http://localhost:8000/v1 --judge-model grader
    """
    # what is wrong in the options is said before a model is loaded
    settings = EvalSettings(
        answerer=answerer, data=data, asking=asking, experts=experts, judge=judge
    )
    given = given_options(context)
    if task == MINIATURE:
        from llama_adapter.miniature import EVAL_OPTIONS

        refuse_unread(given, settings.unread(task, EVAL_OPTIONS))
        _eval_miniature(settings, out, as_json=as_json)
        return
    from llama_adapter.evaluation.tasks import find_task

    found = find_task(task, others=[MINIATURE])
    refuse_unread(given, settings.unread(task, found.options))
    judge.check(found)
    experts.check(answerer.model)
    plan = _plan(found, out, settings)
    with contextlib.ExitStack() as opened:
        emit = opened.enter_context(json_only(as_json))
        if answerer.predictions is not None:
            plan.take(answerer.predictions, plan.inputs(data) if data.data is not None else None)
        elif not data.merge:
            inputs = plan.inputs(data)
            plan.answer(_answerer(opened, settings), inputs, media=data.media)
        plan.judge_and_score(
            judge, merge=data.merge, device=answerer.device, emit=emit if as_json else None
        )


def _eval_miniature(settings: EvalSettings, out: Path, *, as_json: bool) -> None:
    from llama_adapter.cli.models import adapter_directory, load
    from llama_adapter.cli.progress import stages
    from llama_adapter.cli.score import print_report
    from llama_adapter.evaluation.answering import LocalAnswerer
    from llama_adapter.evaluation.manifest import make_manifest, start_or_resume
    from llama_adapter.evaluation.predictions import SCORE_FILE
    from llama_adapter.evaluation.score import ScoreReport
    from llama_adapter.evaluation.tasks.base import Generation
    from llama_adapter.files import write_atomically
    from llama_adapter.miniature.task import (
        ANSWER_TOKENS,
        BATCH_SIZE,
        METRICS,
        HeldOutScenes,
        bundled_expert_captions,
        evaluate,
        num_answers,
    )

    model = settings.answerer.model
    if model is None:
        raise ConfigError(f"--model is needed: an adapter directory or {BUILT_IN_NAMES}")
    test = HeldOutScenes.draw(limit=settings.data.limit)
    batch_size = settings.asking.batch_size or BATCH_SIZE
    with json_only(as_json) as emit:
        loaded, processor = load(model, device=settings.answerer.device)
        answerer = LocalAnswerer(loaded, processor, directory=adapter_directory(model))
        records = _miniature_records(test)
        manifest = make_manifest(
            task=MINIATURE,
            model=answerer.describe(),
            data=None,
            records=records,
            generation=Generation(max_new_tokens=ANSWER_TOKENS, batch_size=batch_size),
            shard=None,
            example=records[0].question,
        )
        start_or_resume(out, manifest)
        with stages() as stage:
            expert = bundled_expert_captions(
                test,
                batch_size=batch_size,
                progress=stage("the caption expert", len(test.images)),
            )
            total = num_answers(test, is_multimodal=loaded.adapter_config.is_multimodal)
            results = evaluate(
                loaded,
                processor,
                test,
                expert_captions=expert,
                batch_size=batch_size,
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
            counts={name: score.total for name, score in results.metrics.items()},
        )
        splits = results.to_dict()
        result = {
            **report.as_json(),
            "images": len(test.images),
            "by_objects": splits["by_objects"],
            "by_question": splits["by_question"],
        }
        write_atomically(out / SCORE_FILE, json.dumps(result, indent=2) + "\n")
        if as_json:
            emit({**result, "out": str(out)})
        else:
            counted = f"{len(test.questions)} questions, captions of {len(test.images)} images"
            print_report(report, counted=counted)


def _miniature_records(test: HeldOutScenes) -> list[Record]:
    """What the manifest's checksum covers: the questions, and the scenes of the images."""
    from llama_adapter.evaluation.records import Record

    questions = [
        Record(
            id=f"question {number}",
            questions=(one.asked.question,),
            reference=one.asked.answer,
            metadata={"scene": one.scene, "passage": one.passage},
        )
        for number, one in enumerate(test.questions)
    ]
    captions = [
        Record(id=f"caption {number}", questions=(), reference=asdict(scene))
        for number, scene in enumerate(test.scenes)
    ]
    return [*questions, *captions]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """One run: what is asked of whom, and where it is kept."""

    task: Task
    out: Path
    generation: Generation
    selection: Selection

    def inputs(self, given: DataSettings) -> Inputs:
        """What the task reads."""
        from llama_adapter.evaluation.tasks.base import Inputs

        if given.data is None:
            raise ConfigError("--data is needed: the benchmark's own file or folder")
        for path in (given.data, given.baseline):
            if path is not None and not path.exists():
                raise ConfigError(f"{path} does not exist")
        return Inputs(data=given.data, baseline=given.baseline, split=given.split)

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
            typer.echo(f"without an answer: {len(report.problems):,}", err=True)
        for problem in report.problems[:5]:
            typer.echo(f"  {problem}", err=True)
        # where only the data are at fault, asking again is in vain
        if report.failed and len(report.problems) == report.records:
            url = answerer.describe().get("url")
            raise EvaluationError(
                f"{url}: none of the {report.records:,} records is answered "
                f"(the first: {report.problems[0]}). Run the same command again to ask again"
            )

    def judge_and_score(
        self,
        judge: JudgeSettings,
        *,
        merge: bool,
        device: str | None,
        emit: Callable[[dict[str, Any]], object] | None,
    ) -> None:
        """Verdicts, numbers, `score.json`, and the numbers once more for the user.

        EvaluationError where the judge replied to nothing, once `score.json` says so, too.
        """
        from llama_adapter.cli.score import print_report
        from llama_adapter.evaluation.predictions import SCORE_FILE
        from llama_adapter.evaluation.running import merge_shards
        from llama_adapter.evaluation.score import score
        from llama_adapter.files import write_atomically

        folder = merge_shards(self.task, self.out).parent if merge else self.folder
        judged = judge_answers(self.task, folder, judge, device=device)
        report = score(self.task.name, folder, seed=self.generation.seed)
        if report.unjudged and not judge.is_given and self.task.judging is not None:
            typer.echo(
                f"answers are stored, {report.unjudged:,} of them not judged: run the same command "
                "with --judge-url and --judge-model, or with --judge",
                err=True,
            )
        usage = judged.usage
        result = {**report.as_json(), **({} if usage is None else {"judging": usage})}
        write_atomically(folder / SCORE_FILE, json.dumps(result, indent=2) + "\n")
        if judged.failure is not None:
            raise EvaluationError(judged.failure)
        if emit is not None:
            emit({**result, "out": str(folder)})
            return
        print_report(report)
        if usage and "cost" in usage:
            typer.echo(f"judging cost {usage['cost']:.4f} for {usage['replies']} replies")


def _plan(task: Task, out: Path, settings: EvalSettings) -> _Plan:
    from llama_adapter.evaluation.running import Selection, parse_shard

    shard = settings.data.shard
    return _Plan(
        task=task,
        out=out,
        generation=replace(task.generation, **settings.asking.changed()),
        selection=Selection(limit=settings.data.limit, shard=parse_shard(shard) if shard else None),
    )


def _answerer(opened: contextlib.ExitStack, settings: EvalSettings) -> Answerer:
    from llama_adapter.evaluation.answering import EndpointAnswerer, LocalAnswerer

    model, device = settings.answerer.model, settings.answerer.device
    if model is None:
        raise ConfigError(
            f"--model is needed: an adapter directory, {BUILT_IN_NAMES}, or a name at --endpoint"
        )
    loaded = processor = None
    answerer: Answerer
    if settings.answerer.endpoint is not None:
        remote = EndpointAnswerer(url=settings.answerer.endpoint, model=model)
        answerer = opened.enter_context(contextlib.closing(remote))
    else:
        from llama_adapter.cli.models import adapter_directory, load

        loaded, processor = load(model, device=device)
        answerer = LocalAnswerer(loaded, processor, directory=adapter_directory(model))
    named = settings.experts.expert
    if not named:
        return answerer
    from llama_adapter.evaluation.with_experts import ExpertAnswerer

    pool = settings.experts.open(model, loaded=loaded, processor=processor, device=device)
    return ExpertAnswerer(answerer, pool, named=named)
