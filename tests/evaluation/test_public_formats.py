"""Public result files in all the shapes they come in: each scores, or is refused in one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_adapter.errors import LlamaAdapterError
from llama_adapter.evaluation.tasks import TASKS

from .conftest import quick

NAME = "COCO_val2014_000000000005.jpg"
CAPTION = "a dog runs fast"
REFERENCES: dict[str, Any] = {
    "annotations": {
        "images": [{"id": 5, "file_name": NAME}, {"id": 9, "file_name": "x.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 5, "caption": CAPTION},
            {"id": 2, "image_id": 5, "caption": "a dog"},
            {"id": 3, "image_id": 9, "caption": "nobody captions this"},
        ],
    },
    "annotations without images": {"annotations": [{"image_id": 5, "caption": CAPTION}]},
    "karpathy": {
        "images": [
            {"filename": NAME, "cocoid": 5, "split": "test", "sentences": [{"raw": CAPTION}]},
            {"filename": "x.jpg", "cocoid": 9, "split": "train", "sentences": []},
        ]
    },
    "list": [{"image_id": 5, "image_name": NAME, "captions": [CAPTION, "a dog"]}],
    "map": {"5": [CAPTION]},
    "map of objects": {NAME: [{"caption": CAPTION}]},
}
PREDICTIONS: dict[str, Any] = {
    "number": [{"image_id": 5, "caption": CAPTION}],
    "text": [{"image_id": "5", "caption": CAPTION}],
    "padded text": [{"image_id": "000000000005", "caption": CAPTION}],
    "with ids of captions": [{"id": 77, "image_id": 5, "caption": CAPTION}],
    "file name": [{"image_id": NAME, "caption": CAPTION}],
    "path": [{"image": f"val2014/{NAME}", "caption": CAPTION}],
    "name": [{"image_name": NAME, "prediction": CAPTION}],
    "map": {"5": CAPTION},
    "map of lists": {"5": [CAPTION]},
    "pycocoevalcap": {"5": [{"image_id": 5, "caption": CAPTION}]},
    "wrapped": {"info": {}, "annotations": [{"image_id": 5, "caption": CAPTION}]},
    "in order": [CAPTION],
}


@pytest.mark.parametrize("references", REFERENCES)
@pytest.mark.parametrize("predictions", PREDICTIONS)
def test_captions(write: Any, references: str, predictions: str) -> None:
    data = write("references.json", REFERENCES[references])
    path = write("pred.json", PREDICTIONS[predictions])
    if predictions == "in order" and references != "list":
        with pytest.raises(LlamaAdapterError, match=r"knows none|answers without ids"):
            quick("coco-caption", path, data, tokenizer="simple")
        return
    found = quick("coco-caption", path, data, tokenizer="simple")
    assert found.metrics["BLEU-4"] == pytest.approx(100)
    assert found.n == 1


def test_captions_on_lines_and_in_a_table(write: Any) -> None:
    data = write("references.jsonl", REFERENCES["list"])
    lines = write("pred.json", "".join(json.dumps(x) + "\n" for x in [*PREDICTIONS["number"]] * 2))
    found = quick("coco-caption", lines, data, tokenizer="simple")
    assert found.metrics["BLEU-4"] == pytest.approx(100)
    assert "1 repeated answers are counted once" in found.notes
    table = write("pred.csv", f"image_id,caption\n5,{CAPTION}\n")
    assert quick("coco-caption", table, data, tokenizer="simple").n == 1


def test_texts_in_order_of_lists_of_references(write: Any) -> None:
    data = write("references.json", [["a dog runs fast", "a dog"], ["a boat at the sea"]])
    path = write("pred.json", ["a dog runs fast", "a boat at the sea"])
    assert quick("coco-caption", path, data, tokenizer="simple").metrics["BLEU-4"] > 99.9
    with pytest.raises(LlamaAdapterError, match="answers without ids"):
        quick("coco-caption", write("pred.json", ["a dog"]), data, tokenizer="simple")


def test_a_number_of_an_image_is_not_taken_for_the_place_of_another(write: Any) -> None:
    images = [
        {"filename": f"COCO_val2014_{n:012}.jpg", "cocoid": n, "imgid": place}
        for place, n in enumerate((40, 1, 0))
    ]
    texts = ("one dog here now", "two cats here now", "a red bus stops")
    for item, text in zip(images, texts, strict=True):
        item |= {"split": "test", "sentences": [{"raw": text}]}
    data = write("dataset_coco.json", {"images": images})
    given_ = [
        {"image_id": 0, "caption": "a red bus stops"},
        {"image_id": 1, "caption": "two cats here now"},
    ]
    found = quick("coco-caption", write("pred.json", given_), data, tokenizer="simple")
    assert found.metrics["BLEU-4"] == pytest.approx(100)
    assert (found.n, found.unanswered) == (2, 1)


def mme(folder: Path, lines: str, name: str = "existence.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(lines.encode())
    return folder


LINES = "1.jpg\tIs it? Please answer yes or no.\tYes\t{}\n1.jpg\tIs it not?\tNo\t{}"


@pytest.mark.parametrize(
    ("lines", "score"),
    [
        (LINES.format("Yes", "No"), 200),
        (LINES.format("Yes", "No").replace("\n", "\r\n") + "\r\n\r\n", 200),
        ("\ufeff" + LINES.format("yes, it is", "NO."), 200),
        (LINES.format("Yes\tindeed", "No\tnever"), 200),
        (LINES.format("Yes\nIt is there.\n", "No"), 200),
        (LINES.format("Yes", "").rstrip("\t"), 50),
        (LINES.format("The answer is yes", "No"), 50),
        (LINES.format("Yes", "No").replace("\tYes", "\t yes ").replace("\tNo", "\tno"), 200),
        (LINES.format("No", "Yes"), 0),
    ],
)
def test_mme_lines(tmp_path: Path, lines: str, score: float) -> None:
    found = quick("mme", mme(tmp_path / "results", lines))
    assert found.metrics["existence"] == score
    assert found.n == 2


def test_mme_folders(tmp_path: Path) -> None:
    lines = LINES.format("Yes", "No")
    mme(tmp_path / "tool" / "LaVIN", lines)
    mme(tmp_path / "tool" / "LaVIN", lines, name="ocr.txt")
    mme(tmp_path / "tool" / "LaVIN", "calculation.py: not a result", name="readme.txt")
    found = quick("mme", tmp_path / "tool")
    assert (found.metrics["existence"], found.metrics["OCR"]) == (200, 200)
    mme(tmp_path / "tool" / "Other", lines)
    with pytest.raises(LlamaAdapterError, match="several results, LaVIN, Other; name one"):
        quick("mme", tmp_path / "tool")


def test_mme_questions_may_come_in_another_order_than_the_benchmark(tmp_path: Path) -> None:
    yes, no = LINES.format("Yes", "No").split("\n")
    template = mme(tmp_path / "template", f"{yes.removesuffix('Yes')}\n{no.removesuffix('No')}")
    results = mme(tmp_path / "results", f"{no}\n{yes}")
    assert quick("mme", results, template).metrics["existence"] == 200


def test_mme_pairs_follow_each_other_where_images_share_a_name(tmp_path: Path) -> None:
    lines = LINES.format("Yes", "No") + "\n" + LINES.format("Yes", "Yes")
    # three of four right, one of two images
    assert quick("mme", mme(tmp_path / "results", lines)).metrics["existence"] == 75 + 50


def test_mme_tells_where_a_line_is_odd(tmp_path: Path) -> None:
    with pytest.raises(LlamaAdapterError, match="line 1 must be image, question, Yes or No"):
        quick("mme", mme(tmp_path / "results", "1.jpg Is it? Yes Yes"))
    with pytest.raises(LlamaAdapterError, match="holds none of MME's result files"):
        quick("mme", mme(tmp_path / "empty", "", name="notes.md"))


PROBLEM = {"choices": ["a dog", "a cat", "2"], "question": "?", "hint": "", "image": None}
PROBLEMS = {
    str(i): {**PROBLEM, "answer": i % 3, "subject": "natural science", "grade": "grade1"}
    for i in range(4)
}
RESULTS: dict[str, Any] = {
    "official": {
        "acc": 75.0,
        "correct": 3,
        "count": 4,
        "results": {"0": 0, "1": 1, "2": 2, "3": 1},
        "outputs": {str(i): f"The answer is {x}." for i, x in enumerate("ABCB")},
    },
    "without outputs": {"results": {"0": 0, "1": 1, "2": 2, "3": -1}},
    "places as text": {"results": {"0": "0", "1": "1", "2": "2", "3": "1"}},
    "letters": {"0": "A", "1": "B", "2": "C", "3": "B"},
    "results of letters": {"results": {"0": "A", "1": "B", "2": "C", "3": "B"}},
    "places": {"0": 0, "1": 1.0, "2": 2, "3": None},
    "objects": {str(i): {"answer": x} for i, x in enumerate("ABCB")},
    "list": [{"question_id": i, "text": x} for i, x in enumerate("ABCB")],
    "results as a list": {"results": [{"id": i, "pred": i % 3 if i < 3 else 1} for i in range(4)]},
    "in order": {"scores": {}, "preds": [f"The answer is ({x})." for x in "ABCB"]},
}


@pytest.mark.parametrize("kind", RESULTS)
def test_scienceqa(write: Any, kind: str) -> None:
    data = write("sqa/problems.json", PROBLEMS).parent
    found = quick("scienceqa", write("results.json", RESULTS[kind]), data)
    assert found.metrics["accuracy"] == 75
    assert (found.n, found.metrics["NAT"]) == (4, 75)


def test_scienceqa_other_forms_are_shown_apart(write: Any) -> None:
    data = write("repository/data/scienceqa/problems.json", PROBLEMS).parents[2]
    path = write("results.json", {"0": "A dog.", "1": "(B)", "2": "C", "3": "I am not sure"})
    found = quick("scienceqa", path, data)
    assert (found.metrics["accuracy"], found.metrics["accuracy_any_form"]) == (25, 75)
    assert found.unparsed == 3
    assert any("2 answers name a choice in another form" in note for note in found.notes)


def test_scienceqa_lists_must_fit_the_split(write: Any) -> None:
    data = write("sqa/problems.json", PROBLEMS).parent
    with pytest.raises(LlamaAdapterError, match="4 records; 2 answers without ids"):
        quick("scienceqa", write("results.json", {"preds": ["A", "B"]}), data)


REVIEWS = {
    "first line": "8 9\nBoth are good.",
    "comma": "8, 9\nBoth are good.",
    "tab": "8\t9",
    "decimals": "8.0 9.0.",
    "brackets": "(8, 9)",
    "bold": "**8 9**",
    "named": "Assistant 1: 8, Assistant 2: 9",
    "out of ten": "Scores: 8/10 9/10",
    "below": "Let me see.\n\nAssistant 1: 8/10 - fine\nAssistant 2: 9/10 - better",
    "later line": "I shall compare them.\n8 9",
}


@pytest.mark.parametrize("kind", REVIEWS)
def test_reviews(write: Any, kind: str) -> None:
    path = write("review.jsonl", [{"question_id": 1, "text": REVIEWS[kind]}])
    found = quick("vicuna-80", path)
    assert (found.metrics["total_1"], found.metrics["total_2"]) == (8, 9)


@pytest.mark.parametrize(
    ("line", "unparsed"),
    [
        ({"text": "", "score": [8, 9]}, 0),
        ({"text": None, "score": [8, 9]}, 0),
        ({"content": "Hm.", "tuple": [8, 9]}, 0),
        ({"text": "8/10", "score": [-1, -1]}, 1),
        ({"text": "Both are good."}, 1),
        ({"text": ""}, 1),
        ({"text": None}, 1),
    ],
)
def test_reviews_with_scores_next_to_the_text(write: Any, line: Any, unparsed: int) -> None:
    lines = [{"question_id": "a", "text": "8 9"}, {"question_id": "b", **line}]
    found = quick("vicuna-80", write("review.jsonl", lines))
    assert (found.n, found.unparsed, found.unjudged) == (2, unparsed, 0)
    assert found.metrics["total_2"] == 9 * (2 - unparsed)


def test_reviews_in_both_orders_and_reviews_that_contradict(write: Any) -> None:
    one = {"question_id": 1, "answer1_id": "x", "answer2_id": "y", "text": "8 9"}
    other = {"question_id": 1, "answer1_id": "y", "answer2_id": "x", "text": "7 6"}
    found = quick("vicuna-80", write("review.jsonl", [one, other]))
    assert (found.metrics["total_1"], found.metrics["total_2"]) == (7, 8)
    assert found.notes == ()
    with pytest.raises(LlamaAdapterError, match="line 2: question 1 is reviewed twice"):
        quick("vicuna-80", write("review.jsonl", [one, {**one, "text": "1 1"}]))


# Whatever a file holds, it is scored or refused.

scalars = st.none() | st.booleans() | st.integers(-2, 30) | st.floats() | st.sampled_from(
    ["", "A", "yes", "8 9", "The answer is B.", "é", "1", NAME]
)  # fmt: skip
keys = st.sampled_from(
    ["id", "question_id", "image_id", "caption", "text", "score", "pred", "results", "outputs", "5",
     "annotations", "images", "question", "answer", "category", "complexity", "task", "answers",
     "verdicts", "facts", "gold", "choices", "file_name", "sentences", "preds", "questions"]
)  # fmt: skip
documents = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=5), max_leaves=12
)


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(predictions=documents, data=documents, names=st.tuples(*[st.booleans()] * 3))
def test_nothing_but_refusals(
    tmp_path: Path, task: str, predictions: Any, data: Any, names: tuple[bool, bool, bool]
) -> None:
    lines, has_data, is_ours = names
    path = tmp_path / ("predictions.jsonl" if lines else "results.json")
    if is_ours and isinstance(predictions, dict):
        predictions = {"answers": [], **predictions, "task": task}
    path.write_text(json.dumps(predictions))
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(data))
    with contextlib.suppress(LlamaAdapterError):
        quick(task, path, folder / "problems.json" if has_data else None, tokenizer="simple")
