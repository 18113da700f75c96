"""VideoInstruct (Video-ChatGPT's benchmark): free answers about videos, graded in five aspects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import field_of, read_objects
from llama_adapter.evaluation.judge_prompts import VIDEO_ASPECTS
from llama_adapter.evaluation.parsing import parse_score
from llama_adapter.evaluation.predictions import Predictions, number
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Judging, Task
from llama_adapter.evaluation.tasks.video_qa import public_entries, split_entry

ASPECTS = ("correctness", "detail", "context", "temporal", "consistency")
PARTS = {
    "generic": ("correctness", "detail", "context"),
    "temporal": ("temporal",),
    "consistency": ("consistency",),
}
"""Which aspects the answers of each question file are graded in."""
_NAMES = {
    "correctness": ("correctness", "generic_1", "benchmark_1", "1_"),
    "detail": ("detail", "benchmark_2", "2_"),
    "context": ("context", "benchmark_3", "3_"),
    "temporal": ("temporal", "benchmark_4", "4_"),
    "consistency": ("consistency", "benchmark_5", "5_"),
}


def read(inputs: Inputs) -> list[Record]:
    """`generic_qa.json`, `temporal_qa.json` and `consistency_qa.json`; any one alone will do."""
    folder = inputs.data if inputs.data.is_dir() else inputs.data.parent
    files = {part: sorted(folder.glob(f"**/{part}_qa.json")) for part in PARTS}
    if inputs.data.is_file():
        files = {p: [inputs.data] if p in inputs.data.name else [] for p in PARTS}
    if not any(files.values()):
        wanted = ", ".join(f"{part}_qa.json" for part in PARTS)
        raise EvaluationError(f"{inputs.data}: lacks {wanted}")
    return [
        _record(part, number_, item, where=f"{found[0]}: item {number_}")
        for part, found in files.items()
        if found
        for number_, item in enumerate(read_objects(found[0])[0])
    ]


def _record(part: str, number_: int, item: dict[str, Any], *, where: str) -> Record:
    names = ("Q1", "Q2") if part == "consistency" else ("Q",)
    return Record(
        id=f"{part}-{number_}",
        questions=tuple(str(field_of(item, (name,), where=where)) for name in names),
        gold=str(field_of(item, ("A",), where=where)),
        video=str(field_of(item, ("video_name",), where=where)),
        facts={"part": part},
    )


def read_public(path: Path) -> Predictions:
    """Five judged files as Video-ChatGPT's scripts store them, named after their aspects."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    rows = []
    for aspect, file in _by_aspect(files, where=str(path)).items():
        for key, entry in public_entries(file):
            verdict, question = split_entry(entry, where=f"{file}: {key}")
            lowered = {name.lower(): value for name, value in question.items()}
            asked = [str(lowered[n]) for n in ("q", "question", "q1", "q2") if n in lowered]
            given = [str(lowered[n]) for n in ("pred", "pred1", "pred2") if n in lowered]
            record = Record(
                id=f"{aspect}/{key}",
                questions=tuple(asked) or ("",),
                gold=lowered.get("a", lowered.get("answer")),
                facts={"aspects": [aspect]},
            )
            answers = tuple(given) or (("(not kept)",) * len(record.questions))
            verdicts = {} if verdict is None else {aspect: verdict}
            rows.append(Row(record=record, answers=answers, verdicts=verdicts))
    return Predictions(rows=tuple(rows))


def _by_aspect(files: list[Path], *, where: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        for aspect, names in _NAMES.items():
            if any(name in file.stem.lower() for name in names):
                found.setdefault(aspect, file)
                break
    if not found:
        raise EvaluationError(
            f"{where}: expected result files named after {', '.join(ASPECTS)}, "
            f"found {', '.join(f.name for f in files[:5]) or 'none'}"
        )
    return found


def aspects_of(record: Record) -> tuple[str, ...]:
    """The aspects that a record's answers are graded in."""
    aspects = record.facts.get("aspects") or PARTS.get(str(record.fact("part")), ("?",))
    unknown = [aspect for aspect in aspects if aspect not in ASPECTS]
    if unknown:
        raise EvaluationError(f"record {record.id!r}: is of no part or aspect of VideoInstruct")
    return tuple(aspects)


def count(predictions: Predictions, _: Counting) -> Tally:
    """Mean of the integer part of each aspect's scores, and the mean of the five."""
    sums, unanswered, unjudged = [], 0, 0
    for row in predictions.rows:
        line = np.zeros((len(ASPECTS), 3))
        scores = {a: number(row.verdicts.get(a, {}).get("score")) for a in aspects_of(row.record)}
        for aspect, score in scores.items():
            if score is not None:
                line[ASPECTS.index(aspect)] = int(score), score, 1
        unanswered += not row.is_answered
        unjudged += row.is_answered and None in scores.values()
        sums.append(line.ravel())
    return Tally(
        n=len(predictions.rows),
        sums_UC=table(sums, columns=3 * len(ASPECTS)),
        metrics=_metrics,
        unanswered=unanswered,
        unjudged=unjudged,
        protocol={"score": "mean of the score's integer part, over judged answers"},
    )


def _metrics(totals: Floats) -> dict[str, Floats]:
    parts = totals.reshape(*totals.shape[:-1], len(ASPECTS), 3)
    whole = ratio(parts[..., 0], parts[..., 2])
    exact = ratio(parts[..., 1], parts[..., 2])
    metrics = {aspect: whole[..., i] for i, aspect in enumerate(ASPECTS)}
    # the mean is that of the five: NaN, and so not shown, where one is missing
    metrics["mean"] = whole.mean(axis=-1)
    metrics["mean_unrounded"] = exact.mean(axis=-1)
    return metrics


def judge_questions(row: Row) -> Mapping[str, Mapping[str, str]]:
    """The answer is graded in each aspect; consistency shows both answers at once."""
    record = row.record
    fields = {"question": record.question, "gold": str(record.gold), "answer": row.answer}
    if len(record.questions) > 1:
        fields |= {"question_2": record.questions[1], "answer_2": row.answers[1]}
    return dict.fromkeys(aspects_of(record), fields)


VIDEOINSTRUCT = Task(
    name="videoinstruct",
    summary="1,996 generic, 499 temporal and 499 paired questions about 500 videos",
    read=read,
    prompts=lambda record: record.questions,
    count=count,
    read_public=read_public,
    part=lambda record: str(record.facts["part"]),
    media="video",
    judging=Judging(
        questions=judge_questions,
        prompts=VIDEO_ASPECTS,
        parse=lambda _, reply: parse_score(reply, low=0, high=5),
    ),
    generation=Generation(max_new_tokens=256),
)
