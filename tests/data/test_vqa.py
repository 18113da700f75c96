"""Questions about images: VQAv2's two files, and records that hold both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.files import open_source, write_pictures

from llama_adapter.data import Source
from llama_adapter.errors import DataError


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def said(source: Source) -> list[tuple[str, str] | str]:
    found: list[tuple[str, str] | str] = []
    for index in range(len(source)):
        try:
            question, answer = source[index].conversation.turns
            found.append((question.text, answer.text))
        except DataError as error:
            found.append(str(error).removeprefix(f"{source.where(index)}: "))
    return found


def test_vqav2s_questions_and_annotations(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    (tmp_path / name).rename(tmp_path / "COCO_train2014_000000000009.jpg")
    questions = [{"image_id": 9, "question": f"q{n}?", "question_id": n} for n in range(4)]
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": 1} for a in ("x", "y", "y")]
    annotations = [
        {"question_id": 0, "image_id": 9, "multiple_choice_answer": "net", "answers": answers},
        {"question_id": 1, "image_id": 9, "answers": answers, "question_type": "what"},
        {"question_id": 2, "image_id": 8, "answers": answers},
        {"question_id": 7, "image_id": 9, "answers": answers},
        None,
    ]
    path = write(tmp_path / "q.json", {"data_subtype": "train2014", "questions": questions})
    answered = write(tmp_path / "a.json", {"info": {}, "annotations": annotations})
    source = open_source("vqa", "instruction", path=path, annotations=answered, images=tmp_path)
    unasked = f"is an answer to no question of {path}"
    assert said(source) == [
        ("q0?", "net"), ("q1?", "y"), "its annotation is of another image",
        "question_id 3 has no annotation", unasked, unasked,
    ]  # fmt: skip
    assert source.groups().tolist() == [0, 0, 0, 0, 1, 2]
    with pytest.raises(DataError, match="name the file of answers by `annotations`"):
        open_source("vqa", "instruction", path=path, images=tmp_path)


def test_records_of_question_and_answer(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    records = [
        {"image": name, "question": "a?", "answer": "x", "answers": ["y"], "split": "train"},
        {"image": name, "question": "b?", "answers": ["x", "y", "y"], "split": "train"},
        {"image": name, "question": "c?", "answer": "x", "hint": "look", "split": "train"},
        {"image": name, "question": "d?", "split": "train"},
        {"image": name, "question": "e?", "answer": "z", "split": "test"},
        7,
    ]
    path = write(tmp_path / "v.json", records)
    source = open_source("vqa", "instruction", path=path, images=tmp_path, split="train")
    found = said(source)
    assert found[:2] == [("a?", "x"), ("b?", "y")]
    assert "key 'hint' is not read" in found[2]
    assert "'answer' must be text or 'answers' a list of it" in found[3]
    assert found[4] == "expected an object, found int"
    assert len(found) == 5
    assert len(open_source("vqa", "instruction", path=path, images=tmp_path)) == 6
    with pytest.raises(DataError, match="holds no questions"):
        open_source("vqa", "instruction", path=write(path, records[:1]), images=tmp_path, split="x")
