"""VQAv2's accuracy, and answers about no image or another record's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llama_adapter.conversation import Conversation
from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.answering import Prediction
from llama_adapter.evaluation.running import run
from llama_adapter.evaluation.score import score
from llama_adapter.evaluation.tasks import find_task
from llama_adapter.evaluation.tasks.base import Generation, Inputs
from llama_adapter.evaluation.vqa_accuracy import normalized, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Two.", "2"),
        ("the red   one", "red 1"),
        ("1,000 people", "1000 people"),
        ("black/white", "black white"),
        ("couldnt've", "couldn't've"),
        ("3.5", "3.5"),
        ("A", ""),
        ("none", "0"),
        ("yes,", "yes"),
    ],
)
def test_answers_are_normalized_as_by_the_challenge(answer: str, expected: str) -> None:
    assert normalized(answer) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_leaves_each_person_out_in_turn(agreeing: int, expected: float) -> None:
    human = ["cat"] * agreeing + ["dog"] * (10 - agreeing)
    assert vqa_accuracy("Cat.", human) == pytest.approx(expected)


class Parrot:
    """Says which images it is shown."""

    def answer(
        self, conversations: list[Conversation], generation: Generation, *, seed: int
    ) -> list[Prediction]:
        names = [[Path(image.name).name for image in c.images] for c in conversations]
        return [Prediction(text=" ".join(several) or "?") for several in names]

    def describe(self) -> dict[str, Any]:
        return {"kind": "parrot"}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Three photos with two questions each, and one of another split."""
    items = []
    for n in range(7):
        image = f"photo{n // 2}.png"
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / image)
        kind = ("yes/no", "number", "other")[n % 3]
        items.append({
            "question_id": n, "image": image, "question": "which?", "answer_type": kind,
            "answers": [image.replace(".", "")] * 10,
            "split": "test" if n < 6 else "train",
        })  # fmt: skip
    path = tmp_path / "vqa.json"
    path.write_text(json.dumps(items))
    return path


def shown(questions: Path, out: Path, **choices: Any) -> list[str]:
    task = find_task("vqav2")
    run(task, Parrot(), Inputs(data=questions), out, generation=Generation(**choices))  # type: ignore[arg-type]
    lines = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    return [line["answers"][0] for line in sorted(lines, key=lambda line: int(line["id"]))]


def test_each_record_is_shown_its_own_none_or_another_image(
    questions: Path, tmp_path: Path
) -> None:
    own = shown(questions, tmp_path / "own")
    assert own == [f"photo{n // 2}.png" for n in range(6)]
    assert shown(questions, tmp_path / "none", images="none") == ["?"] * 6
    others = shown(questions, tmp_path / "shuffled", images="shuffled")
    assert all(a != b for a, b in zip(own, others, strict=True))
    assert sorted(others) == sorted(own)
    again = [shown(questions, tmp_path / f"{s}", images="shuffled", seed=s) for s in range(4)]
    assert len(set(map(tuple, again))) > 1


def test_images_cannot_be_exchanged_where_most_share_one(questions: Path, tmp_path: Path) -> None:
    items = json.loads(questions.read_text())
    for item in items:
        item["image"] = "photo0.png"
    questions.write_text(json.dumps(items))
    with pytest.raises(EvaluationError, match="6 of 6 records have the same images"):
        shown(questions, tmp_path / "out", images="shuffled")


def test_accuracy_is_counted_over_all_and_by_type(questions: Path, tmp_path: Path) -> None:
    shown(questions, tmp_path / "own")
    shown(questions, tmp_path / "none", images="none")
    inputs = Inputs(data=questions)
    right = score("vqav2", tmp_path / "own", inputs=inputs)
    assert right.metrics == {"accuracy": 100, "yes/no": 100, "number": 100, "other": 100}
    assert score("vqav2", tmp_path / "none", inputs=inputs).metrics["accuracy"] == 0


def test_the_official_pair_of_files_is_read(tmp_path: Path) -> None:
    asked = {"image_id": 42, "question": "Is it red?", "question_id": 42001}
    answers = [{"answer": "yes", "answer_id": n} for n in range(10)]
    told = {"question_id": 42001, "answer_type": "yes/no", "answers": answers}
    asked_path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked_path.write_text(json.dumps({"data_subtype": "val2014", "questions": [asked]}))
    told_path = tmp_path / "v2_mscoco_val2014_annotations.json"
    told_path.write_text(json.dumps({"annotations": [told]}))
    (record,) = find_task("vqav2").read(Inputs(data=asked_path))
    assert record.images == ("COCO_val2014_000000000042.jpg",)
    assert record.reference == ["yes"] * 10
    assert record.metadata == {"answer_type": "yes/no"}
    told_path.unlink()
    with pytest.raises(EvaluationError, match="lacks the human answers"):
        find_task("vqav2").read(Inputs(data=asked_path))


def test_captions_in_a_list_are_read_by_their_split(tmp_path: Path) -> None:
    items = [{"image": f"{s}.jpg", "captions": [s], "split": s} for s in ("train", "test")]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(items))
    for split, expected in ((None, ["test"]), ("train", ["train"])):
        records = find_task("coco-caption").read(Inputs(data=path, split=split))
        assert [record.id for record in records] == expected
