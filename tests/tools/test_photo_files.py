"""The data files of the photographs, made of files in the shape of the original downloads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import photo_files
from tests.data.files import open_source

from llama_adapter.evaluation.tasks import find_task
from llama_adapter.evaluation.tasks.base import Inputs

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(photo_files, "IDS", tmp_path / "ids.json")
    ids = {
        "flickr8k": {"test": ["c.jpg"]},
        "coco_captions": {"train": [9], "test": [12]},
        "vqav2": {"test": [9000], "train": [12001]},
        "vqav2_unseen": {"test": [12001]},
    }
    (tmp_path / "ids.json").write_text(json.dumps(ids))

    def run(*arguments: Any) -> Any:
        monkeypatch.setattr(sys, "argv", ["photo_files", *map(str, arguments)])
        photo_files.main()

    return run


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_flickr8k(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{name}.jpg#{n}\tA {name} , {n} ." for name in "abcd" for n in range(2)]
    tokens = write(tmp_path / "tokens", "\n".join(lines))
    lists = ("--train", write(tmp_path / "train", "a.jpg\n"))
    lists += ("--val", write(tmp_path / "val", "b.jpg\n"))
    make("flickr8k", tokens, *lists, "--out", tmp_path / "out")
    path = tmp_path / "out" / "captions.json"
    assert capsys.readouterr().out == f"{path}\n"
    records = json.loads(path.read_text())
    assert [(r["image"], r["split"]) for r in records] == [
        ("images/a.jpg", "train"), ("images/b.jpg", "val"), ("images/c.jpg", "test"),
    ]  # fmt: skip
    assert records[2]["captions"] == ["A c , 0 .", "A c , 1 ."]
    assert len(open_source("caption_questions", "instruction", path=path, split="train")) == 5


def test_coco_and_vqav2(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image_id": n, "caption": f"{n} things."} for n in (9, 9, 12, 30)]
    first = write(tmp_path / "1.json", {"annotations": rows[:2]})
    second = write(tmp_path / "2.json", {"annotations": rows[2:]})
    photos = [tmp_path / "train2014", tmp_path / "val2014"]
    for folder, number in zip(photos, (9, 12), strict=True):
        folder.mkdir()
        write(folder / f"COCO_{folder.name}_{number:012d}.jpg", str(number))
    with pytest.raises(SystemExit):
        make("coco", first, second, "--out", tmp_path, "--photos", photos[0])
    told = "1 of 2 photos lack, first images/000000000012.jpg"
    assert told in capsys.readouterr().err
    make("coco", first, second, "--out", tmp_path, "--photos", *photos)
    assert [path.read_text() for path in sorted((tmp_path / "images").iterdir())] == ["9", "12"]
    assert json.loads((tmp_path / "captions.json").read_text()) == [
        {"image": "images/000000000009.jpg", "captions": ["9 things."] * 2, "split": "train"},
        {"image": "images/000000000012.jpg", "captions": ["12 things."], "split": "test"},
    ]
    numbers = (9000, 12001, 30000)
    questions = [{"question_id": n, "question": f"What is {n}?"} for n in numbers]
    annotations = [
        {
            "question_id": n,
            "image_id": n // 1000,
            "answer_type": "other",
            "question_type": "what is",
            "multiple_choice_answer": "dog",
            "answers": [{"answer": "dog", "answer_id": i} for i in range(10)],
        }
        for n in numbers
    ]
    asked = write(tmp_path / "q.json", {"questions": questions})
    answered = write(tmp_path / "a.json", {"annotations": annotations})
    make("vqav2", "--questions", asked, "--annotations", answered, "--out", tmp_path)
    [record] = find_task("vqav2").read(Inputs(data=tmp_path / "vqa.json"))
    assert record.questions[0].startswith("What is 9000?")
    assert record.images == ("images/000000000009.jpg",)
    [record] = find_task("vqav2").read(Inputs(data=tmp_path / "unseen.json"))
    assert record.questions[0].startswith("What is 12001?")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "expected an object with a list 'annotations'"),
        ('{"annotations": [{"image_id": 9}]}', "annotations[0] lacks caption"),
        ('{"annotations": [3]}', "annotations[0] is 3, expected an object"),
        (
            '{"annotations": [{"image_id": "9", "caption": "x"}]}',
            "annotations[0]: image_id is '9', expected int",
        ),
        ('{"annotations": [{"image', "is not valid JSON"),
        ('{"annotations": [{"image_id": 9, "caption": "x"}]}', "would lack 1 of those in ids.json"),
    ],
)
def test_what_is_not_as_the_download_is_one_line(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        make("coco", write(tmp_path / "c.json", content), "--out", tmp_path)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "captions.json").exists()


@pytest.mark.parametrize("answers", [["yes"], [{"answer": 3}], [{}]])
def test_an_answer_without_a_text_is_one_line(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], answers: list[Any]
) -> None:
    rows = [{"question_id": n, "image_id": n, "question": "?"} for n in (9000, 12001)]
    asked = write(tmp_path / "q.json", {"questions": rows})
    answered = [row | {"answers": answers} for row in rows]
    path = write(tmp_path / "a.json", {"annotations": answered})
    with pytest.raises(SystemExit) as ended:
        make("vqav2", "--questions", asked, "--annotations", path, "--out", tmp_path)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("error: question 9000: an answer is ")
    assert told.count("\n") == 1


def test_a_list_of_photos_without_captions_is_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = write(tmp_path / "tokens", "c.jpg#0\tA cat .")
    lists = (
        "--train",
        write(tmp_path / "train", "000009.jpg\n"),
        "--val",
        write(tmp_path / "val", ""),
    )
    with pytest.raises(SystemExit):
        make("flickr8k", tokens, *lists, "--out", tmp_path / "out")
    told = capsys.readouterr().err
    assert "train: 1 of 1 photos have no caption" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"image,caption\na.jpg,A dog.\n", b"a.jpg#0\tCaf\xe9"])
def test_tokens_of_another_copy_are_one_line(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "tokens").write_bytes(content)
    lists = [write(tmp_path / name, "") for name in ("train", "val")]
    with pytest.raises(SystemExit):
        make("flickr8k", tmp_path / "tokens", "--train", lists[0], "--val", lists[1],
             "--out", tmp_path)  # fmt: skip
    told = capsys.readouterr().err
    assert "Flickr8k.token.txt" in told or "not UTF-8" in told
    assert told.count("\n") == 1


def test_the_ids_are_told_apart_by_photo() -> None:
    ids = json.loads(photo_files.IDS.read_text())
    assert [len(ids["flickr8k"]["test"]), len(ids["vqav2"]["test"])] == [483, 454]
    asked = {number // 1000 for number in ids["vqav2"]["test"]}
    trained = {number // 1000 for number in ids["vqav2"]["train"]}
    assert asked.isdisjoint(trained | set(ids["coco_captions"]["train"]))
    unseen = ids["vqav2_unseen"]["test"]
    assert len(unseen) == 892
    assert set(unseen) <= set(ids["vqav2"]["train"])
    assert {n // 1000 for n in unseen}.isdisjoint(ids["coco_captions"]["train"])
