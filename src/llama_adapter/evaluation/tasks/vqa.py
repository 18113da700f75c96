"""Any set of questions in a plain file: `{"image" | "video", "question", "answers"}` a line."""

from __future__ import annotations

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    brief,
    find_file,
    id_of,
    items_of,
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
    for n, item in enumerate(items_of(items, f"{path}: item")):
        fields, where = item.fields, item.where
        answers = item.value("answers", "answer")
        images = fields.get("images") or ([fields["image"]] if fields.get("image") else [])
        if not isinstance(images, list):
            raise EvaluationError(f"{where}: images must be a list, found {brief(images)}")
        video = fields.get("video")
        records.append(
            Record(
                id=id_of(fields.get("id", fields.get("question_id", n)), where=where),
                questions=(item.text("question"),),
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
