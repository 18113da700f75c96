"""Any set of questions in a plain file: `{"image" | "video", "question", "answers"}` a line."""

from __future__ import annotations

from llama_adapter.evaluation.jsonfiles import field_of, find_file, read_objects, unique
from llama_adapter.evaluation.records import Record
from llama_adapter.evaluation.tasks.base import Generation, Inputs, Task
from llama_adapter.evaluation.tasks.video_qa import SHORT_ANSWER_JUDGING, count, read_public


def read(inputs: Inputs) -> list[Record]:
    """Lines of {id, image or images or video, question, answer or answers}."""
    path = find_file(inputs.data, ("*.jsonl", "*.json", "*.csv"), what="the questions")
    items, _ = read_objects(path)
    ids = [str(item.get("id", item.get("question_id", n))) for n, item in enumerate(items)]
    records = []
    for id_, item in zip(unique(ids, where=str(path)), items, strict=True):
        where = f"{path}: {id_}"
        answers = field_of(item, ("answers", "answer"), where=where)
        images = item.get("images") or ([item["image"]] if item.get("image") else [])
        records.append(
            Record(
                id=id_,
                questions=(str(field_of(item, ("question",), where=where)),),
                gold=list(map(str, answers)) if isinstance(answers, list) else str(answers),
                images=tuple(map(str, images)),
                video=item.get("video"),
            )
        )
    return records


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
