"""VQAv2: questions about photographs, each with ten human answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    Item,
    brief,
    find_file,
    id_of,
    items_of,
    read_any,
    text_of,
)
from llama_adapter.evaluation.predictions import Predictions, unique_records
from llama_adapter.evaluation.records import Floats, Record, Tally, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Task
from llama_adapter.evaluation.tasks.video_qa import read_public
from llama_adapter.evaluation.vqa_accuracy import vqa_accuracy

_QUESTIONS = ("*questions*.json", "vqa.json", "*vqa*.json", "*.jsonl", "*.json")
_TYPES = ("yes/no", "number", "other")


def read(inputs: Inputs) -> list[Record]:
    """The official pair of files (questions, annotations), or one list that holds both.

    Of a list whose items name a split, those of `--split` (test where none is given) are read.
    """
    path = find_file(inputs.data, _QUESTIONS, what="the questions")
    content, _ = read_any(path, marks=("question_id",))
    items = content.get("questions") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise EvaluationError(f"{path}: expected questions, found {brief(content)}")
    annotations, prefix = {}, ""
    if isinstance(content, dict):
        annotations = _annotations(path)
        prefix = f"COCO_{content['data_subtype']}_" if content.get("data_subtype") else ""
    records = []
    split = inputs.split or "test"
    for item in items_of(items, f"{path}: item"):
        if item.fields.get("split", split) == split:
            id_ = item.id("question_id", "id")
            whole = Item({**item.fields, **annotations.get(id_, {})}, item.where)
            records.append(_record(id_, whole, prefix))
    if not records:
        raise EvaluationError(f"{path}: holds no questions of split {split!r}")
    return unique_records(records, where=str(path))


def _record(id_: str, item: Item, prefix: str) -> Record:
    answers, where = item.value("answers"), item.where
    if not isinstance(answers, list) or not answers:
        raise EvaluationError(f"{where}: answers must be a list of texts, found {brief(answers)}")
    image = item.fields.get("image", item.fields.get("image_id"))
    if isinstance(image, int):
        image = f"{prefix}{image:012d}.jpg"
    return Record(
        id=id_,
        questions=(item.text("question"),),
        reference=[
            text_of(answer.get("answer") if isinstance(answer, dict) else answer, where=where)
            for answer in answers
        ],
        images=(id_of(image, where=where),),
        metadata={"answer_type": item.fields.get("answer_type") or "other"},
    )


def _annotations(questions: Path) -> dict[str, dict[str, Any]]:
    """Human answers by question id, from the file next to an official file of questions."""
    folder, stem = questions.parent, questions.stem
    name = stem.replace("OpenEnded_", "").replace("questions", "annotations")
    path = find_file(folder, (f"{name}.json", "*annotations*.json"), what="the human answers")
    content, _ = read_any(path)
    listed = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise EvaluationError(f"{path}: expected annotations, found {brief(content)}")
    return {item.id("question_id"): item.fields for item in items_of(listed, f"{path}: annotation")}


def count(predictions: Predictions, _: Counting) -> Tally:
    """VQA's accuracy over all questions, and by type of answer; no answer counts as wrong.

    Intervals resample images, since questions about one image are not independent.
    """
    sums: dict[tuple[str, ...], Floats] = {}
    for row in predictions.rows:
        if row.record.reference is None:
            raise EvaluationError("vqav2 needs the human answers; give --data")
        value = vqa_accuracy(row.answer, row.record.reference) if row.is_answered else 0.0
        is_type = [row.record.metadata.get("answer_type", "other") == name for name in _TYPES]
        parts = np.array([value, 1.0, *(value * one for one in is_type), *is_type])
        image = row.record.images or (row.record.id,)
        sums[image] = sums.get(image, 0.0) + parts
    return Tally(
        n=len(predictions.rows),
        sums_UC=table(list(sums.values()), columns=2 + 2 * len(_TYPES)),
        metrics=_metrics,
        unanswered=sum(not row.is_answered for row in predictions.rows),
        protocol={"accuracy": "VQA's, over the human answers with each left out in turn"},
    )


def _metrics(totals: Floats) -> dict[str, Floats]:
    right, all_, *by_type = np.moveaxis(totals, -1, 0)
    right_by_type, all_by_type = by_type[: len(_TYPES)], by_type[len(_TYPES) :]
    return {"accuracy": 100 * ratio(right, all_)} | {
        name: 100 * ratio(some, of)
        for name, some, of in zip(_TYPES, right_by_type, all_by_type, strict=True)
    }


VQAV2 = Task(
    name="vqav2",
    summary="questions about photographs with ten human answers each",
    read=read,
    prompts=lambda record: record.questions,
    count=count,
    read_public=read_public,
    part=lambda record: str(record.metadata.get("answer_type")),
    media="image",
    inputs=("split",),
    generation=Generation(
        max_new_tokens=16, prompt="{question} Answer the question using a single word or phrase."
    ),
)
