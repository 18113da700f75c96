"""InfiMM-Eval: open questions that need reasoning over one or several images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    Item,
    brief,
    field_of,
    find_file,
    id_of,
    items_of,
    lowered,
    read_json,
    read_objects,
    text_of,
)
from llama_adapter.evaluation.judge_prompts import REASONED_ANSWER
from llama_adapter.evaluation.parsing import parse_score
from llama_adapter.evaluation.predictions import (
    NOT_KEPT,
    Predictions,
    score_of,
    unique_records,
)
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Judging, Task

ASPECT = "answer"
CATEGORIES = ("deductive", "abductive", "analogical")
WEIGHTS = {"moderate": 1, "high": 2}
_GROUPS = (*CATEGORIES, *WEIGHTS, "overall")
# The published files misspell one key and are not of one mind about the case of the others.
_MISSPELLED = {
    "counter-intuitve": "counter-intuitive",
    "catogory": "category",
    "socre": "score",
    "rating": "score",
    "grade": "score",
    "gpt score": "score",
}
_SAID = ("prediction", "pred", "model answer", "model prediction", "response", "output", "text")


def _tidy(item: dict[str, Any]) -> dict[str, Any]:
    spelled = {key.replace("_", " "): value for key, value in lowered(item).items()}
    return {_MISSPELLED.get(key, key): value for key, value in spelled.items()}


def _metadata(item: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "category": str(item.get("category") or "").strip().lower() or None,
        "complexity": str(item.get("complexity") or "").strip().lower() or None,
        "counter_intuitive": item.get("counter-intuitive"),
        "steps": item.get("reasoning steps"),
    }
    return {name: value for name, value in metadata.items() if value is not None}


def read(inputs: Inputs) -> list[Record]:
    """A list of {Image path, Question, Answer, Category, Complexity}; ids by position if none."""
    path = find_file(inputs.data, ("records.json", "*infimm*.json", "*.json"), what="questions")
    content = read_json(path)
    items = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise EvaluationError(f"{path}: expected a list of questions, found {brief(items)}")
    return unique_records(
        [
            _record(Item(_tidy(raw.fields), raw.where), n)
            for n, raw in enumerate(items_of(items, f"{path}: item", first=0))
        ],
        where=str(path),
    )


def _record(item: Item, number: int) -> Record:
    images = item.value("image path", "image", "images")
    return Record(
        id=id_of(item.fields.get("id", number), where=item.where),
        questions=(item.text("question"),),
        reference=item.fields.get("answer"),
        images=tuple(
            id_of(image, where=item.where)
            for image in (images if isinstance(images, list) else [images])
        ),
        metadata=_metadata(item.fields),
    )


def read_public(path: Path) -> Predictions:
    """Graded answers: {id, score or grade, prediction, category, complexity}."""
    objects, is_cut = read_objects(path)
    rows = []
    for n, raw in enumerate(objects):
        where = f"{path}: item {n}"
        item = _tidy(raw)
        answer = next((item[k] for k in _SAID if k in item), None)
        score = item.get("score")
        if answer is None and score is None and "question" not in item:
            field_of(item, ("prediction", "score"), where=where)
        record = Record(
            id=id_of(item.get("id", item.get("question id", n)), where=where),
            questions=(text_of(item.get("question"), where=where),),
            reference=item.get("answer"),
            metadata=_metadata(item),
        )
        answers = () if answer is None else (text_of(answer, where=where),)
        if score is not None and not answers:
            answers = (NOT_KEPT,)  # there was an answer to grade
        verdicts = {} if score is None else {ASPECT: {"score": score}}
        rows.append(Row(record=record, answers=answers, verdicts=verdicts))
    return Predictions.of_file(rows, path, is_cut=is_cut)


def count(predictions: Predictions, _: Counting) -> Tally:
    """S = (Σ moderate + 2 Σ high) / (|moderate| + 2 |high|) × 100, by category and overall."""
    sums, unanswered, unjudged, unweighted, beyond = [], 0, 0, 0, 0
    for row in predictions.rows:
        verdict = row.verdicts.get(ASPECT)
        score = score_of(verdict, low=0, high=1)
        beyond += score is None and score_of(verdict, low=-math.inf, high=math.inf) is not None
        complexity = str(row.record.metadata.get("complexity") or "")
        weight = WEIGHTS.get(complexity, 0)
        unanswered += not row.is_answered
        unjudged += row.is_answered and score is None
        unweighted += weight == 0
        value = score if score is not None else 0.0
        judged = score is not None
        line = np.zeros((len(_GROUPS) + 1, 3))
        for group in (row.record.metadata.get("category"), complexity, "overall"):
            if group in _GROUPS:
                line[_GROUPS.index(group)] = weight * value, weight * judged, weight
        line[-1] = value, judged, 1
        sums.append(line.ravel())
    notes = [f"{beyond} scores are not from 0 to 1 and are left out"] if beyond else []
    if unweighted:
        notes.append(
            f"{unweighted} records name no complexity, so they have no weight: they count only in "
            "overall_unweighted"
        )
    return Tally(
        n=len(predictions.rows),
        sums_UC=table(sums, columns=3 * (len(_GROUPS) + 1)),
        metrics=_metrics,
        unanswered=unanswered,
        unjudged=unjudged,
        judged=sum(sums_[-2] > 0 for sums_ in sums),
        notes=tuple(notes),
        protocol={"weights": WEIGHTS, "scale": "judge's 0 to 1, times 100"},
    )


def _metrics(totals: Floats) -> dict[str, Floats]:
    parts = totals.reshape(*totals.shape[:-1], len(_GROUPS) + 1, 3)
    judged = 100 * ratio(parts[..., 0], parts[..., 1])
    everything = 100 * ratio(parts[..., 0], parts[..., 2])
    metrics = {group: judged[..., i] for i, group in enumerate(_GROUPS)}
    metrics["overall_missing_as_zero"] = everything[..., _GROUPS.index("overall")]
    metrics["overall_unweighted"] = judged[..., -1]
    return metrics


def judge_questions(row: Row) -> dict[str, dict[str, str]]:
    """The answer with the reference answer and, where published, its reasoning steps."""
    given = row.record.metadata.get("steps") or []
    steps = given if isinstance(given, list) else [given]
    fields = {
        "question": row.record.question,
        "gold": str(row.record.reference),
        "steps": "\n".join(f"- {step}" for step in steps) or "- (none given)",
        "answer": row.answer,
    }
    return {ASPECT: fields}


INFIMM_EVAL = Task(
    name="infimm-eval",
    summary="279 questions of deductive, abductive and analogical reasoning",
    read=read,
    prompts=lambda record: record.questions,
    count=count,
    read_public=read_public,
    part=lambda record: str(record.metadata.get("category")),
    media="image",
    judging=Judging(
        questions=judge_questions,
        prompts={ASPECT: REASONED_ANSWER},
        parse=lambda _, reply: parse_score(reply, low=0, high=1),
    ),
    generation=Generation(max_new_tokens=256),
)
