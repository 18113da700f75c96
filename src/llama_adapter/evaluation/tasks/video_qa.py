"""MSVD-QA, MSRVTT-QA and ActivityNet-QA: a short answer about a video, graded by a judge."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    brief,
    find_file,
    id_of,
    items_of,
    keys_of,
    lowered,
    read_any,
    read_json,
    read_objects,
    text_of,
)
from llama_adapter.evaluation.judge_prompts import SHORT_ANSWER
from llama_adapter.evaluation.judges import WORD_JUDGES
from llama_adapter.evaluation.parsing import parse_yes_no_score
from llama_adapter.evaluation.predictions import (
    NOT_KEPT,
    Predictions,
    moment_of,
    score_of,
    unique_records,
)
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, Verdict, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Judging, Task

ASPECT = "answer"
TOP = 5
"""The best score; the worst is 0."""
_IDS = ("question_id", "id", "qid", "question id", "sample_id", "key")
_VIDEO = ("video_name", "video", "video_id")
_ASKED = ("question", "q", "prompt")
_GOLD = ("answer", "a", "gt", "ground_truth", "gt_answer")
_SAID = (
    "pred", "prediction", "predicted_answer", "model_answer", "response", "output", "text",
)  # fmt: skip
_JUDGED_AS = ("correctness", "correct", "acc", "verdict", "judge", "judgement", "judgment")


def read_msvd(inputs: Inputs, *, patterns: Sequence[str], prefix: str = "") -> list[Record]:
    """A JSON or CSV list of {answer, id, question, video_id} or {…, video_name}."""
    path = find_file(inputs.data, patterns, what="the question file")
    rows, _ = read_objects(path)
    records = []
    for n, item in enumerate(items_of(rows, f"{path}: item", first=0)):
        row = item.fields
        given = next((row[name] for name in ("question_id", "id") if row.get(name)), n)
        video = item.id(*_VIDEO)
        records.append(
            Record(
                id=id_of(given, where=item.where),
                questions=(item.text("question"),),
                reference=item.text("answer"),
                video=f"{prefix}{video}" if video.isdigit() else video,
                metadata=moment_of(row),
            )
        )
    return unique_records(records, where=str(path))


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
    for question, answer in zip(
        items_of(questions, f"{questions_path}: item", first=0),
        items_of(answers, f"{answers_path}: item", first=0),
        strict=True,
    ):
        id_, answered = question.value("question_id"), answer.value("question_id")
        if id_ != answered:
            raise EvaluationError(
                f"{answer.where} is for {brief(answered)}, the question is {brief(id_)}"
            )
        records.append(
            Record(
                id=question.id("question_id"),
                questions=(question.text("question"),),
                reference=answer.text("answer"),
                video="v_" + question.id("video_name").removeprefix("v_"),
                metadata={"type": answer.fields.get("type")},
            )
        )
    return unique_records(records, where=str(questions_path))


def read_public(path: Path) -> Predictions:
    """Judged results as Video-ChatGPT's scripts store them: `{key: [verdict, question]}`.

    A folder holds one such file, or one `[verdict, question]` file for each answer. Lists, lines
    or maps of {id, question, answer, pred}, and of {question_id, answer} as ActivityNet-QA's own
    evaluation takes them, are read as answers that nobody judged yet.
    """
    entries, is_cut = public_entries(path)
    rows = [_public_row(key, entry, where=f"{path}: {brief(key)}") for key, entry in entries]
    return Predictions.of_file(rows, path, is_cut=is_cut)


def public_entries(path: Path) -> tuple[list[tuple[str, Any]], bool]:
    """Keys and entries of a result file, or of a folder of them; whether the last is cut short."""
    if path.is_dir():
        files = sorted((*path.glob("*.json"), *path.glob("*.jsonl")))
        if not files:
            raise EvaluationError(f"{path}: holds no JSON result files")
        if len(files) == 1:
            return public_entries(files[0])
        return [(file.stem, _single(file)) for file in files], False
    content, is_cut = read_any(path, marks=(*_IDS, *_ASKED, *_SAID))
    if isinstance(content, dict):
        inner = next((content[k] for k in ("results", "predictions", "data") if k in content), None)
        content = inner if isinstance(inner, list | dict) else content
    if isinstance(content, dict):
        return [part for item in content.items() for part in _opened(*item)], is_cut
    if _is_pair(content):  # one of a folder's files, which hold an answer each
        return [(path.stem, content)], is_cut
    if not isinstance(content, list):
        raise EvaluationError(f"{path}: expected answers by id, found {brief(content)}")
    return [_listed(n, row, where=f"{path}: item {n + 1}") for n, row in enumerate(content)], is_cut


def _opened(key: str, entry: Any) -> list[tuple[str, Any]]:
    """The entries of one key: a video's several questions, as MovieChat's files hold them."""
    if isinstance(entry, list) and entry and all(map(_is_question, entry)):
        return [(key, question) for question in entry]
    return [(key, entry)]


def _is_question(item: Any) -> bool:
    return isinstance(item, dict) and bool(lowered(item).keys() & {*_ASKED})


def _single(file: Path) -> Any:
    """The one entry of a file of a folder that holds a file for each answer."""
    content = read_json(file)
    is_map = isinstance(content, dict) and not lowered(content).keys() & {*_ASKED, *_SAID}
    if is_map or (isinstance(content, list) and not _is_pair(content)):
        raise EvaluationError(
            f"{file.parent}: holds several result files, such as {file.name}; name one of them"
        )
    return content


def _is_pair(entry: Any) -> bool:
    """Whether a list is a verdict and its question, rather than several records."""
    match entry:
        case [dict() | str() as verdict, dict(question), *_]:
            is_record = isinstance(verdict, dict) and lowered(verdict).keys() & {*_ASKED, *_IDS}
            return bool(lowered(question).keys() & {*_ASKED, "q1", *_SAID}) and not is_record
        case _:
            return False


def _listed(place: int, row: Any, *, where: str) -> tuple[str, Any]:
    """The key and entry of an item of a list."""
    question = row[1] if _is_pair(row) else row
    if not isinstance(question, dict):
        raise EvaluationError(f"{where} must be an object, found {brief(question)}")
    given = next((question[name] for name in _IDS if question.get(name) is not None), place)
    return id_of(given, where=where), row


def split_entry(entry: Any, *, where: str) -> tuple[Any, dict[str, Any]]:
    """The verdict, where there is one, and the question of a public result entry."""
    match entry:
        case [dict() | str() as verdict, dict(question), *_]:
            return verdict, question
        case dict(question):
            return None, question
        case str(answer):
            return None, {"pred": answer}
        case _:
            raise EvaluationError(
                f"{where}: expected [verdict, question] or an object, found {brief(entry)}"
            )


def _public_row(key: str, entry: Any, *, where: str) -> Row:
    verdict, question = split_entry(entry, where=where)
    item = lowered(question)
    if verdict is None:
        verdict = _verdict_within(item)
    elif isinstance(verdict, str):  # a reply that a script kept as it came
        verdict = parse_yes_no_score(verdict) or {}
    said = next((name for name in _SAID if name in item), None)
    asked = next((item[name] for name in _ASKED if name in item), None)
    if said is None and verdict is None and asked is None:
        # ActivityNet-QA's own format: `answer` with nothing but ids is the model's
        said = "answer" if "answer" in item else None
        if said is None:
            raise EvaluationError(f"{where}: lacks pred or answer; it has {keys_of(question)}")
    reference = next((item[name] for name in _GOLD if name in item and name != said), None)
    record = Record(
        id=key,
        questions=(text_of(asked, where=where),),
        reference=None if reference is None else text_of(reference, where=where),
        metadata=moment_of(item),
    )
    answers = (text_of(item[said], where=where),) if said is not None else ()
    if verdict is not None and not answers:
        answers = (NOT_KEPT,)  # there was an answer to judge
    return Row(
        record=record, answers=answers, verdicts={} if verdict is None else {ASPECT: verdict}
    )


def _verdict_within(item: Mapping[str, Any]) -> Verdict | None:
    """A verdict whose parts are in the record itself, as {acc: yes, score: 4}."""
    name = next((name for name in _JUDGED_AS if name in item), None)
    if name is None or score_of(item, low=-math.inf, high=math.inf) is None:
        return None
    return {**item, "pred": item[name]}


def read_verdict(verdict: Verdict | None) -> tuple[bool | None, float | None]:
    """Yes or no, and the score from 0 to 5; None for what is missing or not to be read."""
    if verdict is None:
        return None, None
    said = str(lowered(verdict).get("pred", "")).lower()
    words = {_YES_NO[word] for word in re.findall(r"\w+", said) if word in _YES_NO}
    is_clear = len(words) == 1 and not _DENIED.search(said)
    return words.pop() if is_clear else None, score_of(verdict, low=0, high=TOP)


_YES_NO = {"yes": True, "no": False, "true": True, "false": False}
_DENIED = re.compile(
    r"\b(?:not|never|neither|cannot|\w+n['’]t)\s+(?:\w+\s+)?[\W_]*(?:yes|no|true|false)\b"
)


def count(predictions: Predictions, _: Counting) -> Tally:
    """Accuracy yes/(yes+no) and mean integer score, as published; and both stricter.

    Answers that nobody judged, or not readably, have no part in these. Where none is judged, the
    answers are compared with the right ones by their words.
    """
    sums, unanswered, unjudged, judged = [], 0, 0, 0
    graded = scored = False
    for row in predictions.rows:
        is_right, score = read_verdict(row.verdicts.get(ASPECT))
        graded, scored = graded or is_right is not None, scored or score is not None
        judged += is_right is not None or score is not None
        unanswered += not row.is_answered
        unjudged += row.is_answered and (is_right is None or score is None)
        value = score if score is not None else 0.0
        known = score is not None
        sums.append([is_right is True, is_right is False, int(value), value, known, 1])
    if not judged and not any(row.verdicts for row in predictions.rows):
        return _by_words(predictions, unanswered)
    return Tally(
        n=len(predictions.rows),
        sums_UC=table(sums, columns=6),
        metrics=partial(_metrics, graded=graded, scored=scored),
        judged=judged,
        unanswered=unanswered,
        unjudged=unjudged,
        protocol={"accuracy": "yes / (yes + no)", "score": "mean of the score's integer part"},
    )


def _by_words(predictions: Predictions, unanswered: int) -> Tally:
    """Other measures, named apart from the published one: they need no judge."""
    n = len(predictions.rows)
    known = [row for row in predictions.rows if row.record.reference is not None]
    rows = [
        [*(is_right(row) for is_right in WORD_MEASURES.values()), row.is_answered, 1]
        for row in known
    ]
    lacking = n - len(known)
    notes = [f"{lacking} records have no right answer at hand; give --data"] if lacking else []
    return Tally(
        n=n,
        sums_UC=table(rows, columns=len(WORD_MEASURES) + 2),
        metrics=_word_metrics,
        judged=0,
        compared=sum(row.is_answered for row in known),
        unanswered=unanswered,
        unjudged=n - unanswered,
        notes=tuple(notes),
    )


def _is_right_by(judge: Callable[[Row], Verdict]) -> Callable[[Row], bool]:
    return lambda row: row.is_answered and judge(row)["pred"] == "yes"


WORD_MEASURES = {name: _is_right_by(judge) for name, judge in WORD_JUDGES.items()}


def _word_metrics(totals: Floats) -> dict[str, Floats]:
    *right, answered, all_ = np.moveaxis(totals, -1, 0)
    metrics = {}
    for name, value in zip(WORD_MEASURES, right, strict=True):
        metrics[f"{name}:accuracy"] = 100 * ratio(value, answered)
        metrics[f"{name}:accuracy_missing_as_wrong"] = 100 * ratio(value, all_)
    return metrics


def _metrics(totals: Floats, *, graded: bool, scored: bool) -> dict[str, Floats]:
    right, wrong, whole, exact, judged, all_ = np.moveaxis(totals, -1, 0)
    metrics = {}
    if graded:
        metrics["accuracy"] = 100 * ratio(right, right + wrong)
    if scored:
        metrics |= {"score": ratio(whole, judged), "score_unrounded": ratio(exact, judged)}
    # next to a measure that no verdict has, zero would be an invention
    if graded:
        metrics["accuracy_missing_as_wrong"] = 100 * ratio(right, all_)
    if scored:
        metrics["score_missing_as_zero"] = ratio(whole, all_)
    return metrics


def judge_questions(row: Row) -> dict[str, dict[str, str]]:
    """One grading of the one answer."""
    fields = {
        "question": row.record.question,
        "gold": str(row.record.reference),
        "answer": row.answer,
    }
    return {ASPECT: fields}


SHORT_ANSWER_JUDGING = Judging(
    questions=judge_questions,
    prompts={ASPECT: SHORT_ANSWER},
    parse=lambda _, reply: parse_yes_no_score(reply),
    is_one_word=True,
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
    inputs=("split",),
)
