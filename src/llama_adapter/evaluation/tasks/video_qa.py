"""MSVD-QA, MSRVTT-QA and ActivityNet-QA: a short answer about a video, graded by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    field_of,
    find_file,
    read_any,
    read_json,
    read_objects,
    unique,
)
from llama_adapter.evaluation.judge_prompts import SHORT_ANSWER
from llama_adapter.evaluation.parsing import parse_yes_no_score
from llama_adapter.evaluation.predictions import Predictions, number, without_repeats
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, Verdict, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Judging, Task

ASPECT = "answer"
_VIDEO = ("video_name", "video", "video_id")
_PUBLIC = {"question": ("question", "q", "Q"), "gold": ("answer", "a", "A")}


def read_msvd(inputs: Inputs, *, patterns: Sequence[str], prefix: str = "") -> list[Record]:
    """A JSON or CSV list of {answer, id, question, video_id} or {…, video_name}."""
    path = find_file(inputs.data, patterns, what="the question file")
    rows, _ = read_objects(path)
    ids = [str(r.get("question_id") or r.get("id") or n) for n, r in enumerate(rows)]
    return [
        Record(
            id=id_,
            questions=(str(field_of(row, ("question",), where=f"{path}: item {n}")),),
            gold=str(field_of(row, ("answer",), where=f"{path}: item {n}")),
            video=_video_name(field_of(row, _VIDEO, where=f"{path}: item {n}"), prefix),
        )
        for n, (id_, row) in enumerate(zip(unique(ids, where=str(path)), rows, strict=True))
    ]


def _video_name(value: Any, prefix: str) -> str:
    """MSVD and MSRVTT's own files number their videos; the files are called `video6513`."""
    name = str(value)
    return f"{prefix}{name}" if name.isdigit() else name


def read_activitynet(inputs: Inputs) -> list[Record]:
    """Questions in one file, answers in another; the two are aligned by position and checked."""
    data = inputs.data
    split = inputs.split or "test"
    questions_path = find_file(data, (f"{split}_q.json", f"**/{split}_q.json"), what="questions")
    answers_path = questions_path.with_name(questions_path.name.replace("_q.json", "_a.json"))
    questions, answers = read_objects(questions_path)[0], read_objects(answers_path)[0]
    if len(questions) != len(answers):
        raise EvaluationError(
            f"{answers_path}: has {len(answers)} answers for {len(questions)} questions"
        )
    records = []
    for n, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        asked, given = f"{questions_path}: item {n}", f"{answers_path}: item {n}"
        id_ = field_of(question, ("question_id",), where=asked)
        answered = field_of(answer, ("question_id",), where=given)
        if id_ != answered:
            raise EvaluationError(f"{given} is for {answered!r}, the question is {id_!r}")
        video = str(field_of(question, ("video_name",), where=asked))
        records.append(
            Record(
                id=str(id_),
                questions=(str(field_of(question, ("question",), where=asked)),),
                gold=str(field_of(answer, ("answer",), where=given)),
                video="v_" + video.removeprefix("v_"),
                facts={"type": answer.get("type")},
            )
        )
    return records


def read_public(path: Path) -> Predictions:
    """Judged results as Video-ChatGPT's scripts store them: `{key: [verdict, question]}`.

    A folder holds one such file, or one `[verdict, question]` file for each answer. Plain lists
    of {id, question, answer, pred} are read as answers that nobody judged yet.
    """
    rows, notes = without_repeats(
        [_public_row(key, entry, where=f"{path}: {key}") for key, entry in public_entries(path)],
        where=str(path),
    )
    return Predictions(rows=tuple(rows), notes=notes)


def public_entries(path: Path) -> list[tuple[str, Any]]:
    """Keys and entries of a result file, or of a folder of them."""
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise EvaluationError(f"{path}: holds no JSON result files")
        if len(files) == 1:
            return public_entries(files[0])
        return [(file.stem, read_json(file)) for file in files]
    content, _ = read_any(path)
    if isinstance(content, dict):
        return list(content.items())
    rows, _ = read_objects(path)
    return [(str(r.get("question_id") or r.get("id") or n), r) for n, r in enumerate(rows)]


def split_entry(entry: Any, *, where: str) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """The verdict, where there is one, and the question of a public result entry."""
    match entry:
        case [dict(verdict), dict(question), *_]:
            return verdict, question
        case dict(question):
            return None, question
        case _:
            raise EvaluationError(
                f"{where}: expected [verdict, question] or an object, found {str(entry)[:60]!r}"
            )


def _public_row(key: str, entry: Any, *, where: str) -> Row:
    verdict, question = split_entry(entry, where=where)
    answer = question.get("pred", question.get("prediction"))
    if answer is None and verdict is None:
        raise EvaluationError(f"{where}: lacks pred; it has {', '.join(question)}")
    record = Record(
        id=key,
        questions=(str(field_of(question, _PUBLIC["question"], where=where)),),
        gold=question.get("answer", question.get("a")),
    )
    verdicts = {ASPECT: verdict} if verdict is not None else {}
    # where only the verdict was kept, there was an answer to judge
    answers = (str(answer),) if answer is not None else ("(not kept)",)
    return Row(record=record, answers=answers, verdicts=verdicts)


def read_verdict(verdict: Verdict | None) -> tuple[bool | None, float | None]:
    """Yes or no, and the score; None for what is missing or not a number."""
    if verdict is None:
        return None, None
    said = str(verdict.get("pred", "")).lower()
    is_right = True if "yes" in said else False if "no" in said else None
    return is_right, number(verdict.get("score"))


def count(predictions: Predictions, _: Counting) -> Tally:
    """Accuracy yes/(yes+no) and mean integer score, as published; and both stricter."""
    sums, unanswered, unjudged = [], 0, 0
    for row in predictions.rows:
        is_right, score = read_verdict(row.verdicts.get(ASPECT))
        unanswered += not row.is_answered
        unjudged += row.is_answered and (is_right is None or score is None)
        known = score is not None
        value = score if score is not None else 0.0
        sums.append([is_right is True, is_right is False, int(value), value, known, 1])
    return Tally(
        n=len(predictions.rows),
        sums_UC=table(sums, columns=6),
        metrics=_metrics,
        unanswered=unanswered,
        unjudged=unjudged,
        protocol={"accuracy": "yes / (yes + no)", "score": "mean of the score's integer part"},
    )


def _metrics(totals: Floats) -> dict[str, Floats]:
    right, wrong, whole, exact, judged, all_ = np.moveaxis(totals, -1, 0)
    return {
        "accuracy": 100 * ratio(right, right + wrong),
        "score": ratio(whole, judged),
        "score_unrounded": ratio(exact, judged),
        "accuracy_missing_as_wrong": 100 * ratio(right, all_),
        "score_missing_as_zero": ratio(whole, all_),
    }


def judge_questions(row: Row) -> dict[str, dict[str, str]]:
    """One grading of the one answer."""
    fields = {
        "question": row.record.question,
        "gold": str(row.record.gold),
        "answer": row.answer,
    }
    return {ASPECT: fields}


SHORT_ANSWER_JUDGING = Judging(
    questions=judge_questions,
    prompts={ASPECT: SHORT_ANSWER},
    parse=lambda _, reply: parse_yes_no_score(reply),
)
_task = partial(
    Task,
    prompts=lambda record: record.questions,
    count=count,
    read_public=read_public,
    media="video",
    judging=SHORT_ANSWER_JUDGING,
    generation=Generation(max_new_tokens=64),
)

MSVD_QA = _task(
    name="msvd-qa",
    summary="13,157 questions about 520 short clips",
    read=partial(
        read_msvd,
        patterns=("test_qa.json", "*msvd*test*.json", "**/*msvd*test*.json", "*qa*.json"),
        prefix="vid",
    ),
)
MSRVTT_QA = _task(
    name="msrvtt-qa",
    summary="72,821 questions about 2,990 web videos",
    read=partial(
        read_msvd,
        patterns=("test_qa.json", "*msrvtt*.json", "*msrvtt*.csv", "**/*msrvtt*", "*qa*.json"),
        prefix="video",
    ),
)
ACTIVITYNET_QA = _task(
    name="activitynet-qa",
    summary="8,000 questions about 800 long videos",
    read=read_activitynet,
)
