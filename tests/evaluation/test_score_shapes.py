"""Result files as the public ones are shaped: right numbers, or none and a word why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.parsing import parse_score_pair
from llama_adapter.evaluation.tasks import TASKS

from .conftest import ours, quick

VIDEO_TASKS = ("msvd-qa", "msrvtt-qa", "activitynet-qa")
IDS = ("v_a_1", "v_b_2", "v_c_3", "v_d_4")
GOLD = ("yes", "a man", "bike", "two")
SAID = ("yes", "man", "bicycle", "blue")


@pytest.fixture
def questions(write: Any) -> dict[str, Path]:
    """The same four questions in the form that each task publishes."""
    asked = [
        {"video_name": i[2], "question_id": i, "question": f"what is {i}?", "answer": a}
        for i, a in zip(IDS, GOLD, strict=True)
    ]
    bare = [{name: item[name] for name in item if name != "answer"} for item in asked]
    right = [{"answer": x["answer"], "type": 1, "question_id": x["question_id"]} for x in asked]
    write("anet/test_q.json", bare)
    write("anet/test_a.json", right)
    path = write("plain/test_qa.json", asked)
    return {"msvd-qa": path, "msrvtt-qa": path, "activitynet-qa": path.parents[1] / "anet"}


ANSWERS: dict[str, Any] = {
    "own.json": [{"question_id": i, "answer": a} for i, a in zip(IDS, SAID, strict=True)],
    "pred.json": [{"question_id": i, "pred": a} for i, a in zip(IDS, SAID, strict=True)],
    "pred.jsonl": [{"question_id": i, "pred": a} for i, a in zip(IDS, SAID, strict=True)],
    "map.json": dict(zip(IDS, SAID, strict=True)),
    "llava.jsonl": [
        {"question_id": i, "prompt": f"what is {i}?\nAnswer in a word.", "text": a, "model_id": "m"}
        for i, a in zip(IDS, SAID, strict=True)
    ],
}


@pytest.mark.parametrize("task", VIDEO_TASKS)
@pytest.mark.parametrize("name", ANSWERS)
def test_stored_answers_are_compared_by_words(
    write: Any, questions: dict[str, Path], task: str, name: str
) -> None:
    path = write(name, ANSWERS[name])
    found = quick(task, path, questions[task])
    assert found.metrics == {
        "exact-match:accuracy": 50,
        "exact-match:accuracy_missing_as_wrong": 50,
        "synonym-match:accuracy": 75,
        "synonym-match:accuracy_missing_as_wrong": 75,
    }
    assert (found.n, found.unanswered, found.unjudged) == (4, 0, 4)
    assert f"llama-adapter eval {task} --predictions" in found.notes[-1]
    alone = quick(task, path)
    assert (alone.metrics, alone.n) == ({}, 4)
    assert "give --data" in alone.notes[0]


def test_two_questions_under_one_id(write: Any) -> None:
    """MovieChat's files give a video's id to all its questions."""
    data = [
        {"id": "1.mp4", "question": "who runs?", "answer": "a dog"},
        {"id": "1.mp4", "question": "where?", "answer": "park"},
        {"id": "2.mp4", "question": "who runs?", "answer": "cat"},
    ]
    said = [{**item, "pred": item["answer"]} for item in data]
    asked = [{**item, "video_id": item["id"]} for item in data]
    path = write("qa.json", asked)
    assert quick("msvd-qa", write("out.json", said)).metrics["exact-match:accuracy"] == 100
    for part in (said, said[::-1], said[1:]):
        found = quick("msvd-qa", write("out.json", part), path)
        assert (found.n, found.unanswered) == (3, 3 - len(part))
        assert found.metrics["exact-match:accuracy"] == 100
    with pytest.raises(EvaluationError, match="has two answers, 'a dog' and 'b'"):
        quick("msvd-qa", write("out.json", [said[0], {**said[0], "pred": "b"}]))


def test_answers_to_other_questions_are_not_compared(write: Any) -> None:
    data = write("qa.json", [{"id": 1, "question": "who?", "answer": "dog", "video_id": "x"}])
    other = write("out.json", [{"id": 1, "question": "where?", "pred": "dog"}])
    with pytest.raises(EvaluationError, match="other questions under them"):
        quick("msvd-qa", other, data)


def entry(verdict: Any) -> list[Any]:
    return [verdict, {"question": "what?", "answer": "dog", "pred": "a dog"}]


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ({"pred": "yes", "Score": 4}, 4),
        ({"Pred": "Yes", "socre": "4"}, 4),
        ({"pred": "yes.", "score": "4/5"}, 4),
        ({"pred": True, "rating": 4}, 4),
        ("{'pred': 'yes', 'score': 4}", 4),
        ({"pred": "yes", "score": 40}, None),
        ({"pred": "yes", "score": -1}, None),
        ({"pred": "yes", "score": "1" * 400}, None),
        ({"pred": "yes", "score": [4]}, None),
    ],
)
def test_verdicts(write: Any, verdict: Any, score: float | None) -> None:
    found = quick(
        "msvd-qa", write("r.json", {"a": entry(verdict), "b": entry({"pred": "no", "score": 2})})
    )
    assert found.metrics["accuracy"] == 50
    assert found.metrics["score"] == (2 if score is None else (score + 2) / 2)
    assert found.unjudged == (score is None)


@pytest.mark.parametrize("said", ["not yes", "Not a yes", "it isn't true", "not 'no'", "yes or no"])
def test_a_verdict_that_is_denied_is_not_read(write: Any, said: str) -> None:
    verdicts = {"a": entry({"pred": said, "score": 4}), "b": entry({"pred": "no, not so"})}
    found = quick("msvd-qa", write("r.json", verdicts))
    assert (found.metrics["accuracy"], found.unjudged) == (0, 2)


@pytest.mark.parametrize(
    ("reference", "said", "accuracy"),
    [("a", "A", 100), ("the", "The.", 100), ("+", "+", 100), ("a", ".", 0), ("+", "-", 0)],
)
def test_what_is_exact_is_a_synonym_too(
    write: Any, reference: str, said: str, accuracy: float
) -> None:
    path = write("out.json", [{"id": 1, "question": "?", "answer": reference, "pred": said}])
    metrics = quick("msvd-qa", path).metrics
    assert metrics["exact-match:accuracy"] == metrics["synonym-match:accuracy"] == accuracy


@pytest.mark.parametrize(
    ("verdict", "names"),
    [
        ({"pred": "yes", "score": "80%"}, {"accuracy", "accuracy_missing_as_wrong"}),
        ({"score": 4}, {"score", "score_unrounded", "score_missing_as_zero"}),
    ],
)
def test_a_measure_that_no_verdict_has_is_not_zero(
    write: Any, verdict: Any, names: set[str]
) -> None:
    found = quick("msvd-qa", write("r.json", {"a": entry(verdict), "b": entry(verdict)}))
    assert set(found.metrics) == names
    assert found.unjudged == 2


def test_several_questions_under_one_video(write: Any) -> None:
    """No question vanishes, and a lone [verdict, question] file is one answer."""
    asked = [
        {"time": 100, "question": "who?", "answer": "dog", "pred": "dog"},
        {"time": 200, "question": "where?", "answer": "park", "pred": "hall"},
    ]
    found = quick("msvd-qa", write("break.json", {"1.mp4": asked, "2.mp4": asked[:1]}))
    assert (found.n, found.unjudged) == (3, 3)
    assert found.metrics["exact-match:accuracy"] == pytest.approx(200 / 3)
    alone = quick("msvd-qa", write("v_1_0.json", entry({"pred": "yes", "score": 4})))
    assert (alone.n, alone.metrics["accuracy"], alone.metrics["score"]) == (1, 100, 4)
    two = [{"question_id": n, "pred": "dog"} for n in (1, 2)]
    assert quick("msvd-qa", write("two.json", two)).n == 2


@pytest.mark.parametrize("task", TASKS)
def test_unjudged_is_not_zero(write: Any, task: str) -> None:
    """No number without judged records, and none without answers, for every task."""
    metadata = {"subtask": "count", "image": "1", "part": "generic", "complexity": "high"}
    given = write("predictions.jsonl", ours(task, [("1", "well")], **metadata))
    if TASKS[task].judging is not None:
        found = quick(task, given)
        published = {name: v for name, v in found.metrics.items() if ":" not in name}
        assert (published, found.unjudged, found.intervals) == ({}, 1, {})
        assert any(f"llama-adapter eval {task} --predictions" in note for note in found.notes)
    blank = write("predictions.jsonl", ours(task, [("1", " ")], **metadata))
    if task == "coco-caption":
        with pytest.raises(EvaluationError, match="none of 1 images has a caption"):
            quick(task, blank)
        return
    found = (
        quick(task, blank) if task != "scienceqa" else quick(task, scienceqa(write), blank.parent)
    )
    assert (found.metrics, found.intervals, found.unanswered) == ({}, {}, found.n)
    assert "is answered, so there is no number" in found.notes[-1]


def scienceqa(write: Any) -> Path:
    problem = {"choices": ["a", "b"], "answer": 0, "question": "?", "split": "test"}
    write("problems.json", {"1": problem})
    path: Path = write("results.json", {"1": None})
    return path


def test_questions_are_not_answers(write: Any, tmp_path: Path) -> None:
    for part, names in {"temporal": ("Q",), "consistency": ("Q1", "Q2")}.items():
        asked = dict.fromkeys(names, "what?")
        write(f"b/{part}_qa.json", [{**asked, "A": "x", "video_name": "v"}] * 1)
    found = quick("videoinstruct", tmp_path / "b")
    assert (found.n, found.unanswered, found.unjudged, found.metrics) == (2, 2, 0, {})
    asked = [{"Question": "why?", "Image path": ["x.png"], "Complexity": "High"}]
    found = quick("infimm-eval", write("q.json", asked))
    assert (found.n, found.unanswered, found.metrics) == (1, 1, {})
    asked = [{"question": "why?", "answer": "so", "id": 1, "video_id": 2}]
    found = quick("msvd-qa", write("test_qa.json", asked))
    assert (found.n, found.unanswered, found.metrics) == (1, 1, {})


def test_videoinstruct_files_of_two_models(write: Any, tmp_path: Path) -> None:
    for aspect, said in {"correctness": "a dog", "detail": "a cat"}.items():
        write(f"o/{aspect}.json", {"1": [{"Score": 3}, {"Q": "what?", "A": "dog", "pred": said}]})
    found = quick("videoinstruct", tmp_path / "o")
    assert (found.metrics["correctness"], found.metrics["detail"]) == (3, 3)
    assert "judge different answers to 1 questions" in found.notes[0]


def mme(folder: Path, image: str, lines: int = 2) -> Path:
    folder.mkdir()
    text = [
        f"{image}\tIs it{i}?\t{reference}\t{reference}" for i, reference in enumerate(("Yes", "No"))
    ]
    (folder / "count.txt").write_text("\n".join(text[:lines]))
    return folder


@pytest.mark.parametrize("image", ["0001.txt", "0001.png", "count/0001.jpg", "0001"])
def test_mme_images_by_another_suffix(tmp_path: Path, image: str) -> None:
    data, results = mme(tmp_path / "data", "0001.jpg"), mme(tmp_path / "results", image)
    found = quick("mme", results, data)
    assert (found.metrics["count"], found.unanswered) == (200, 0)
    assert "the benchmark asks more than is here: 2 of 60 of count" in found.notes
    short = mme(tmp_path / "short", image, lines=1)
    found = quick("mme", short, data)
    assert (found.metrics["count"], found.unanswered) == (50, 1)


@pytest.mark.parametrize(
    ("reply", "pair"),
    [
        ("Assistant 1 gets a score of 8/10, while Assistant 2 gets 9/10.", (8, 9)),
        ("**Assistant 1:** 8\n**Assistant 2:** 9", (8, 9)),
        ("Both are fine. I give scores of (8, 9).", (8, 9)),
        ("Answer 1: 8/10\nAnswer 2: 9/10", (8, 9)),
        ("The point (3, 4) is right.", None),
        ("1. Clear\n2. Short", None),
        ("Fine.\n1 2\n3 4", None),
        ("Answer 1: 5\nAnswer 2: 6", None),
        ("Assistant 1: 3 apples. Assistant 2: 4 apples.", None),
        ("Fine.\n1/2", None),
        ("Assistant 1: 11\nAssistant 2: 4", None),
    ],
)
def test_only_what_has_the_shape_of_a_verdict(reply: str, pair: Any) -> None:
    assert parse_score_pair(reply) == pair


def test_reviews_prefer_what_is_stored_and_say_what_they_rest_on(write: Any) -> None:
    lines = [
        {"question_id": 1, "text": "8 9\nWell.", "score": [9, 8]},
        {"question_id": 2, "text": "8 9\nWell.", "score": [-1, -1]},
        {"question_id": 3, "text": "8 9\nWell.", "score": 7},
        {"question_id": 4, "text": "I refuse.", "score": [-1, -1]},
    ]
    found = quick("vicuna-80", write("review.jsonl", lines))
    assert (found.metrics["total_1"], found.metrics["total_2"]) == (25, 26)
    assert (found.n, found.unparsed, found.unjudged) == (4, 1, 0)
    assert found.notes[0] == "the totals rest on 3 of 4 reviews"
    answers = [{"question_id": i, "text": "1. Plan\n2. Rest", "model_id": "m"} for i in range(80)]
    answers[0]["text"] = "8 9"
    with pytest.raises(EvaluationError, match="only 1 of 80 lines have two scores"):
        quick("vicuna-80", write("answer.jsonl", answers))


@pytest.mark.parametrize("key", ["img_id", "image_id", "imgid", "image_path"])
@pytest.mark.parametrize("value", [5, "5", 5.0, "COCO_val2014_000000000005.jpg"])
def test_captions_by_whatever_names_the_image(write: Any, key: str, value: Any) -> None:
    data = write("references.json", {"5": ["a dog runs fast"]})
    path = write("pred.json", [{key: value, "caption": "a dog runs fast"}])
    assert quick("coco-caption", path, data, tokenizer="simple").metrics["BLEU-4"] > 99


@pytest.mark.parametrize("content", [[{"image_id": 5, "caption": "a dog"}], {"5": "a dog"}])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["pred.json", "pred.jsonl"])
def test_names_of_files_say_little(write: Any, content: Any, indent: int | None, name: str) -> None:
    data = write("references.json", {"5": ["a dog"]})
    path = write(name, json.dumps(content, indent=indent))
    assert quick("coco-caption", path, data, tokenizer="simple").n == 1
    lines = "\n".join(json.dumps({"image_id": i, "caption": "a"}, indent=indent) for i in (5, 6))
    assert quick("coco-caption", write(name, lines), data, tokenizer="simple").n == 1


HOSTILE = {
    "a deep list": "[" * 100_000,
    "a list that is not so deep": "[" * 300 + "]" * 300,
    "a long number": '[{"question_id": ' + "1" * 5000 + "}]",
    "a key twice": '{"a": "yes", "a": "no"}',
    "two arrays": "[1] [2]",
    "latin-1": b'["caf\xe9"]',
    "nothing": " \n",
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_a_line(tmp_path: Path, task: str, kind: str) -> None:
    path = tmp_path / "results.json"
    content = HOSTILE[kind]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError) as caught:
        quick(task, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["results.json", "predictions.jsonl", "table.csv"])
def test_what_never_ends_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for task in TASKS:
        with pytest.raises(EvaluationError, match="it is not a regular file"):
            quick(task, tmp_path / name)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(EvaluationError, match="at most"):
        quick("scienceqa", tmp_path / name)


def test_one_question_at_several_moments(write: Any) -> None:
    """MovieChat's breakpoints ask the same of one video at different frames."""
    asked = [
        {"time": time, "id": "1", "video_id": "1", "question": "who?", "answer": answer}
        for time, answer in ((100, "a dog"), (200, "a cat"))
    ]
    said = [{**item, "pred": item["answer"]} for item in asked]
    data = write("qa.json", asked)
    for part in (said, said[::-1], said[1:]):
        for given in (None, data):
            found = quick("msvd-qa", write("out.json", part), given)
            assert found.metrics["exact-match:accuracy"] == 100
            assert (found.n, found.unanswered) == (
                (len(part), 0) if given is None else (2, 2 - len(part))
            )
    one = write("one.json", asked[:1])
    found = quick("msvd-qa", write("out.json", said), one)
    assert (found.n, found.metrics["exact-match:accuracy"]) == (1, 100)
    with pytest.raises(EvaluationError, match="has two answers, 'a dog' and 'b'"):
        quick("msvd-qa", write("out.json", [said[0], {**said[0], "pred": "b"}]))
    timed = [{**said[0], "time": seconds} for seconds in (0.5, 1.25)]
    assert quick("msvd-qa", write("out.json", timed)).n == 1


@pytest.mark.parametrize("answer", ["b", "(b)", "b.", " b\n"])
def test_a_lower_case_letter_alone_names_a_choice(write: Any, answer: str) -> None:
    problem = {"choices": ["dog", "cat"], "answer": 1, "question": "?", "split": "test"}
    data = write("problems.json", {"1": problem})
    found = quick("scienceqa", write("out.jsonl", [{"question_id": 1, "text": answer}]), data)
    assert (found.metrics["accuracy_any_form"], found.unparsed) == (100, 1)
    stored = write("stored.json", {"results": {"1": answer.strip(" (.)\n")}, "outputs": {"1": "x"}})
    assert quick("scienceqa", stored, data).metrics["accuracy"] == 100


@pytest.mark.parametrize("name", ["{}.json", "{}_results.json", "gpt-{}.json"])
def test_videoinstruct_files_by_abbreviation(write: Any, tmp_path: Path, name: str) -> None:
    short = ("CI", "DO", "CU", "TU", "CO")
    for score, aspect in enumerate(short, start=1):
        asked = {"Q": "what?", "A": "dog", "pred": "a dog"}
        write(f"o/{name.format(aspect)}", {"1": [{"score": score}, asked]})
    found = quick("videoinstruct", tmp_path / "o").metrics
    aspects = ("correctness", "detail", "context", "temporal", "consistency")
    assert [found[aspect] for aspect in aspects] == [1, 2, 3, 4, 5]


def test_mme_questions_with_tabs(tmp_path: Path) -> None:
    data, results = tmp_path / "data" / "count", tmp_path / "results"
    data.mkdir(parents=True)
    results.mkdir()
    (data / "1.txt").write_text("Is it\tone?\t\tYes\nIs it two?\tNo\t\n")
    lines = ["1.jpg\tIs it\tone?\t\tYes\tYes\tit is", "1.jpg\tIs it two?\tNo\tyes"]
    (results / "count.txt").write_text("\n".join(lines))
    for given in (None, tmp_path / "data"):
        found = quick("mme", results, given)
        assert (found.n, found.unanswered, found.metrics["count"]) == (2, 0, 50)


def sample(number: int, said: Any, target: Any, **doc: Any) -> dict[str, Any]:
    """A line as lmms-eval's --log_samples writes it."""
    kept = {"doc_id": number, "doc": doc, "target": target, "resps": [[said]]}
    return {**kept, "filtered_resps": [said], "doc_hash": "x"}


@pytest.mark.parametrize("n", [1, 2])
def test_samples_of_lmms_eval(write: Any, n: int) -> None:
    asked = [("v_a_1", "who?", "dog"), ("v_b_2", "where?", "park")][:n]
    lines = [
        sample(
            i, said, reference, question_id=id_, question=question, answer=reference, video_name="a"
        )
        for i, ((id_, question, reference), said) in enumerate(
            zip(asked, ("dog", "hall"), strict=False)
        )
    ]
    path = write("m_samples_activitynetqa.jsonl", lines)
    found = quick("activitynet-qa", path)
    assert (found.n, found.metrics["exact-match:accuracy"]) == (n, 100 / n)
    lines = [
        sample(0, "dog", ["dog", "cat"], question_id=7, question="?", answers=["dog", "cat"]),
        sample(1, "two", ["two"], question_id=8, question="?", answers=["one"]),
    ][:n]
    data = write("d.json", [{"id": 7, "image": "x.jpg", "question": "?", "answers": ["dog"]}])
    assert quick("vqa", write("s.jsonl", lines), data).metrics["exact-match:accuracy"] == 100


@pytest.mark.parametrize("n", [1, 2])
def test_samples_of_captions_and_choices(write: Any, n: int) -> None:
    names = [f"COCO_val2014_{i:012}.jpg" for i in (5, 6)]
    lines = [
        sample(i, "a dog", ["a cat"], file_name=name, caption=["a cat"], answer=["a cat"], id=i)
        for i, name in enumerate(names)
    ][:n]
    data = write("references.json", {"5": ["a dog"], "6": ["a dog"]})
    found = quick("coco-caption", write("s.jsonl", lines), data, tokenizer="simple")
    assert (found.n, found.metrics["BLEU-1"]) == (n, pytest.approx(100))
    asked = [{"question": f"what is {i}?", "choices": ["a", "b"], "answer": i} for i in range(n)]
    data = write("problems.json", {str(i): {**p, "split": "test"} for i, p in enumerate(asked)})
    lines = [sample(i, "B", "AB"[p["answer"]], **p) for i, p in enumerate(asked)]
    found = quick("scienceqa", write("s.jsonl", lines[::-1]), data)
    assert (found.n, found.metrics["accuracy"]) == (n, 50 if n == 2 else 0)
    for line in lines:
        line["doc_id"] = n - 1 - line["doc_id"]
        line["doc"]["question"] = "other?"
    with pytest.raises(EvaluationError, match="has other questions under them"):
        quick("scienceqa", write("s.jsonl", lines), data)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({**sample(0, "a", "b"), "doc": None}, "lacks doc, the benchmark's own record"),
        (sample(0, [-1.5, True], "b", question="?"), "filtered_resps .* must hold a text"),
    ],
)
def test_samples_without_records_or_texts(write: Any, line: Any, problem: str) -> None:
    for task in ("msvd-qa", "scienceqa", "coco-caption"):
        with pytest.raises(EvaluationError, match=problem):
            quick(task, write("s.jsonl", [line]))


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("request_", ["", " Please answer yes or no."])
def test_mme_answers_by_line(write: Any, tmp_path: Path, request_: str, is_reversed: bool) -> None:
    """LLaVA's answers name subtask and image; which of the two questions, the prompt tells."""
    data = tmp_path / "data" / "count"
    data.mkdir(parents=True)
    asked = [("Is it a dog?", "Yes"), ("Is it a dog house?", "No")]
    text = "\n".join(
        f"{question}  Please answer yes or no.\t{reference}" for question, reference in asked
    )
    for image in ("1", "2"):
        (data / f"{image}.jpg").touch()
        (data / f"{image}.txt").write_text(text)
    more = request_ + "\nAnswer the question using a single word or phrase."
    lines = [
        {"question_id": f"count/{image}.png", "prompt": question + more, "text": said}
        for image, given in (("1", ("Yes", "No")), ("2", ("No", "No")))
        for (question, _), said in zip(asked, given, strict=True)
    ]
    path = write("r/answers.jsonl", lines[::-1] if is_reversed else lines)
    for given in (path, path.parent):
        found = quick("mme", given, data.parent)
        assert (found.n, found.unanswered, found.metrics["count"]) == (4, 0, 125)
    found = quick("mme", write("r/answers.jsonl", lines[:1]), data.parent)
    assert (found.unanswered, found.metrics["count"]) == (3, 25)
    with pytest.raises(EvaluationError, match="mme needs the right answers; give --data"):
        quick("mme", path)
    with pytest.raises(EvaluationError, match="line 1: 'cats' is not a subtask of MME"):
        quick("mme", write("odd.jsonl", [{**lines[0], "question_id": "cats/1.png"}]))
    samples = [
        sample(i, said, reference, question_id="count/1.png", question=question, category="count")
        for i, ((question, reference), said) in enumerate(zip(asked, ("Yes", "Yes"), strict=True))
    ]
    for given_data in (None, data.parent):
        found = quick("mme", write("samples.jsonl", samples), given_data)
        assert found.metrics["count"] == (50 if given_data is None else 25)
