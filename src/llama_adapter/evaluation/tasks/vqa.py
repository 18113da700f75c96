"""Any set of questions in a plain file: `{"image" | "video", "question", "answers"}` a line."""

from __future__ import annotations

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    brief,
    field_of,
    find_file,
    id_of,
    read_objects,
    text_of,
)
from llama_adapter.evaluation.predictions import unique_records
from llama_adapter.evaluation.records import Record
from llama_adapter.evaluation.tasks.base import Generation, Inputs, Task
from llama_adapter.evaluation.tasks.video_qa import SHORT_ANSWER_JUDGING, count, read_public


def read(inputs: Inputs) -> list[Record]:
    """Lines of {id, image or images or video, question, answer or answers}."""
    path = find_file(inputs.data, ("*.jsonl", "*.json", "*.csv"), what="the questions")
    items, _ = read_objects(path)
    records = []
    for n, item in enumerate(items):
        given = item.get("id", item.get("question_id", n))
        where = f"{path}: item {n + 1}"
        answers = field_of(item, ("answers", "answer"), where=where)
        images = item.get("images") or ([item["image"]] if item.get("image") else [])
        if not isinstance(images, list):
            raise EvaluationError(f"{where}: images must be a list, found {brief(images)}")
        video = item.get("video")
        records.append(
            Record(
                id=id_of(given, where=where),
                questions=(text_of(field_of(item, ("question",), where=where), where=where),),
                reference=[text_of(answer, where=where) for answer in answers]
                if isinstance(answers, list)
                else text_of(answers, where=where),
                images=tuple(id_of(image, where=where) for image in images),
                video=None if video is None else id_of(video, where=where),
            )
        )
    return unique_records(records, where=str(path))


VQA = Task(
    name="vqa",
    summary="your own questions about images or videos",
    read=read,
    prompts=lambda record: record.questions,
    count=count,
    read_public=read_public,
    media="any",
    judging=SHORT_ANSWER_JUDGING,
    generation=Generation(max_new_tokens=64),
)
