"""Counting, on answers made so that the result is known."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.bootstrap import bootstrap_intervals
from llama_adapter.evaluation.score import score
from llama_adapter.evaluation.tasks.base import Inputs

from .conftest import ours, quick


def video_chatgpt(verdicts: list[Any]) -> dict[str, Any]:
    return {
        f"v{i}": [verdict, {"question": "what?", "answer": "dog", "pred": "a dog"}]
        for i, verdict in enumerate(verdicts)
    }


def test_video_qa_counts_yes_over_yes_and_no_and_cuts_scores(write: Any) -> None:
    verdicts = [
        {"pred": "yes", "score": 4.8},
        {"pred": "no", "score": 1},
        {"pred": "Yes", "score": "5"},
    ]
    found = quick("msvd-qa", write("results.json", video_chatgpt(verdicts)))
    assert found.metrics["accuracy"] == pytest.approx(200 / 3)
    assert found.metrics["score"] == pytest.approx(10 / 3)
    assert found.metrics["score_unrounded"] == pytest.approx(10.8 / 3)


def test_unreadable_verdicts_are_unjudged_and_shown_both_ways(write: Any) -> None:
    verdicts = [
        {"pred": "yes", "score": 4},
        {"pred": "no", "score": math.nan},
        {"pred": "perhaps", "score": 3},
        {},
    ]
    found = quick("msrvtt-qa", write("results.json", video_chatgpt(verdicts)))
    assert (found.n, found.unjudged, found.unanswered) == (4, 3, 0)
    assert found.metrics["accuracy"] == 50
    assert found.metrics["accuracy_missing_as_wrong"] == 25
    assert found.metrics["score"] == 3.5
    json.dumps(found.as_json(), allow_nan=False)


def test_a_folder_of_single_verdicts(tmp_path: Path, write: Any) -> None:
    for key, entry in video_chatgpt([{"pred": "yes", "score": 4}] * 3).items():
        write(f"out/{key}.json", entry)
    assert quick("activitynet-qa", tmp_path / "out").metrics["accuracy"] == 100


def test_videoinstruct_five_files(tmp_path: Path, write: Any) -> None:
    scores = {"correctness": 2.9, "detail": 3, "context": 4, "temporal": 1, "consistency": 0}
    for aspect, value in scores.items():
        asked = {"Q": "what?", "A": "dog", "pred": "a dog"}
        if aspect == "consistency":
            asked = {"Q1": "what?", "Q2": "who?", "A": "dog", "pred1": "a dog", "pred2": "dog"}
        write(f"out/{aspect}_results.json", {"a": [{"score": value}, asked], "b": [{}, asked]})
    found = quick("videoinstruct", tmp_path / "out")
    assert [found.metrics[aspect] for aspect in scores] == [2, 3, 4, 1, 0]
    assert found.metrics["mean"] == 2
    assert found.metrics["mean_unrounded"] == pytest.approx(10.9 / 5)
    assert (found.n, found.unjudged) == (10, 5)


def test_infimm_weighs_hard_questions_double(write: Any) -> None:
    graded = [
        ("Deductive", "Moderate", 1.0),
        ("Deductive", "High", 0.5),
        ("Abductive", "High", 0.0),
        ("Analogical", "Moderate", 1.0),
        (None, None, 1.0),
    ]
    lines = [
        {"id": i, "Category": c, "Complexity": x, "score": s, "prediction": "so"}
        for i, (c, x, s) in enumerate(graded)
    ]
    found = quick("infimm-eval", write("graded.jsonl", lines))
    assert found.metrics["deductive"] == pytest.approx(100 * 2 / 3)
    assert (found.metrics["abductive"], found.metrics["analogical"]) == (0, 100)
    assert found.metrics["overall"] == pytest.approx(100 * 3 / 6)
    assert found.metrics["overall_unweighted"] == pytest.approx(70)
    assert "1 records name no complexity" in found.notes[0]


def test_infimm_leaderboard_categories_are_of_one_formula(real: Path) -> None:
    """The published overall is the weighted mean of the published categories."""
    board = json.loads((real / "infimm_eval" / "leaderboard.json").read_text())
    weights = {k: c["Moderate"] + 2 * c["High"] for k, c in board["counts"].items()}
    for row in board["rows"]:
        mean = sum(row[k.lower()] * w for k, w in weights.items()) / sum(weights.values())
        # a published row is off by as much as one answer's weight of 279
        assert mean == pytest.approx(row["overall"], abs=0.05)


def scienceqa_problems() -> dict[str, Any]:
    base = {"choices": ["a", "b", "c"], "question": "?", "split": "test", "hint": ""}
    return {
        "1": {
            **base,
            "answer": 0,
            "image": "image.png",
            "subject": "natural science",
            "grade": "grade3",
        },
        "2": {**base, "answer": 1, "image": None, "subject": "social science", "grade": "grade7"},
        "3": {
            **base,
            "answer": 2,
            "image": None,
            "subject": "language science",
            "grade": "grade6",
            "hint": "h",
        },
        "4": {
            **base,
            "answer": 2,
            "image": None,
            "subject": "language science",
            "grade": "grade12",
        },
    }


def test_scienceqa_by_subset(write: Any) -> None:
    data = write("sqa/problems.json", scienceqa_problems()).parent
    answers = [("1", "A"), ("2", "The answer is B. BECAUSE: so"), ("3", "C. c"), ("4", "Well, C")]
    lines = [{"question_id": id_, "text": text} for id_, text in answers]
    found = quick("scienceqa", write("answers.jsonl", lines), data)
    assert found.metrics["accuracy"] == 75
    subsets = {"NAT": 100, "SOC": 100, "LAN": 50, "TXT": 100, "IMG": 100, "NO": 50}
    assert {name: found.metrics[name] for name in subsets} == subsets
    assert (found.metrics["G1-6"], found.metrics["G7-12"]) == (100, 50)
    assert (found.n, found.unparsed, found.unanswered) == (4, 1, 0)


def test_scienceqa_unanswered_are_counted_and_shown_both_ways(write: Any) -> None:
    data = write("sqa/problems.json", scienceqa_problems()).parent
    lines = [{"question_id": "1", "text": "A"}, {"question_id": "2", "text": " "}]
    found = quick("scienceqa", write("answers.jsonl", lines), data)
    assert found.unanswered == 3
    assert found.metrics["accuracy"] == 25
    assert found.metrics["accuracy_answered_only"] == 100


def test_vicuna_takes_the_mean_of_both_orders(write: Any) -> None:
    def line(id_: str, given: tuple[int, int], swapped: tuple[int, int]) -> dict[str, Any]:
        pairs = {"as_given:general": given, "swapped:general": swapped}
        verdicts = {a: {"score_1": p[0], "score_2": p[1]} for a, p in pairs.items()}
        return {**ours("vicuna-80", [(id_, "text")])[0], "verdicts": verdicts}

    lines = [line("1", (9, 7), (7, 9)), line("2", (5, 8), (6, 9))]
    found = quick("vicuna-80", write("predictions.jsonl", lines))
    assert (found.metrics["total_1"], found.metrics["total_2"]) == (13.5, 16.5)
    assert [found.metrics[k] for k in ("win_1", "tie", "win_2")] == [0, 1, 1]
    assert found.metrics["flips"] == 50
    # first place gets 9 + 5 as given, and 9 + 9 where the second model stood first
    assert found.metrics["first_place_bonus"] == pytest.approx((9 + 5 + 9 + 9 - 30) / 2)


def test_captions_match_images_by_number_or_name(write: Any) -> None:
    references = [
        {"image_id": 5, "image_name": "COCO_val2014_000000000005.jpg", "captions": ["a dog runs"]},
        {"image_id": 77, "image_name": "boat.jpg", "captions": ["a boat at sea"]},
    ]
    data = write("references.json", references)
    given = [{"image_id": 5, "caption": "a dog runs"}, {"image_id": 77, "caption": "a boat at sea"}]
    found = quick("coco-caption", write("pred.json", given), data, tokenizer="simple")
    assert found.metrics["BLEU-1"] == pytest.approx(100)
    assert found.protocol["approximate"]
    assert "APPROXIMATION" in found.notes[-1]


@pytest.mark.parametrize("kind", ["karpathy", "annotations", "map"])
def test_reference_files_of_all_kinds(write: Any, kind: str) -> None:
    name = "COCO_val2014_000000000005.jpg"
    content: Any = {name: ["a dog runs fast"]}
    if kind == "karpathy":
        sentences = [{"raw": "a dog runs fast"}]
        content = {"images": [{"filename": name, "split": "test", "sentences": sentences}]}
    elif kind == "annotations":
        content = {
            "images": [{"id": 5, "file_name": name}],
            "annotations": [{"image_id": 5, "caption": "a dog runs fast"}],
        }
    data = write("captions.json", content)
    found = quick(
        "coco-caption", write("pred.json", {"5": "a dog runs fast"}), data, tokenizer="simple"
    )
    assert found.metrics["BLEU-4"] == pytest.approx(100)


def test_half_a_line_at_the_end_is_noted_and_elsewhere_refused(write: Any) -> None:
    whole = [json.dumps(line) for line in ours("vqa", [("1", "a"), ("2", "b")])]
    found = quick("vqa", write("predictions.jsonl", "\n".join([*whole, whole[0][:30]])))
    assert found.n == 2
    assert "cut short" in found.notes[0]
    with pytest.raises(EvaluationError, match=r"not valid JSON.*line 1"):
        quick("vqa", write("predictions.jsonl", "\n".join([whole[0][:30], *whole])))


def test_predictions_of_another_task_are_refused(write: Any) -> None:
    path = write("predictions.jsonl", ours("vqa", [("1", "a")]))
    with pytest.raises(EvaluationError, match="line 1 is of task 'vqa', expected 'mme'"):
        quick("mme", path)


def test_repeats_are_counted_once_and_contradictions_refused(write: Any) -> None:
    same = write("predictions.jsonl", ours("vqa", [("1", "a"), ("1", "a"), ("2", "b")]))
    assert quick("vqa", same).n == 2
    other = write("predictions.jsonl", ours("vqa", [("1", "a"), ("1", "b")]))
    with pytest.raises(EvaluationError, match="id '1' has two answers, 'a' and 'b'"):
        quick("vqa", other)


def test_unknown_ids_are_noted_and_all_unknown_refused(write: Any) -> None:
    questions = [{"id": i, "question": "?", "answer": "x"} for i in (1, 2)]
    data = write("questions.jsonl", questions)
    found = quick("vqa", write("predictions.jsonl", ours("vqa", [("1", "a"), ("9", "b")])), data)
    assert (found.n, found.unanswered) == (2, 1)
    assert found.notes[0] == "1 answers to ids that the data does not have: 9"
    with pytest.raises(EvaluationError, match="knows none of the 1 answered ids, such as '9'"):
        quick("vqa", write("predictions.jsonl", ours("vqa", [("9", "b")])), data)


def test_empty_answers_are_unanswered(write: Any) -> None:
    found = quick("vqa", write("predictions.jsonl", ours("vqa", [("1", " "), ("2", "b")])))
    assert (found.unanswered, found.unjudged) == (1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"a": 1}', "expected \\[verdict, question\\]"),
        ("[1]", "must be an object"),
    ],
)
def test_files_of_no_known_format(write: Any, content: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        quick("msvd-qa", write("predictions.json", content))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such predictions"):
        quick("vqa", tmp_path / "nothing.jsonl")
    with pytest.raises(EvaluationError, match="task must be one of"):
        quick("vqa2", tmp_path)


def test_72821_records_take_seconds(write: Any) -> None:
    rng = np.random.default_rng(0)
    said = [{"pred": ("yes", "no")[int(x)], "score": int(x)} for x in rng.integers(0, 2, 72_821)]
    path = write("results.json", video_chatgpt(said))
    # processor time: a busy machine takes the rest
    started = time.process_time()
    found = score("msrvtt-qa", path)
    assert time.process_time() - started < 10
    low, high = found.intervals["accuracy"]
    # the interval of a proportion near one half
    assert high - low == pytest.approx(2 * 1.96 * 100 * 0.5 / math.sqrt(72_821), rel=0.15)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    from llama_adapter.evaluation.records import Tally

    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        values = rng.normal(size=(60, 1))
        sums = np.concatenate([values, np.ones_like(values)], axis=1)
        tally = Tally(n=60, sums_UC=sums, metrics=lambda t: {"mean": t[..., 0] / t[..., 1]})
        low, high = bootstrap_intervals(tally, resamples=400, seed=seed)["mean"]
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_activitynet_files_are_aligned(real: Path, write: Any) -> None:
    folder = real / "video" / "activitynet_qa"
    lines = ours("activitynet-qa", [("v_1QIUV7WYKXg_3", "no")])
    path = write("predictions.jsonl", lines)
    found = score("activitynet-qa", path, inputs=Inputs(data=folder), resamples=0)
    assert (found.n, found.unanswered, found.unjudged) == (8000, 7999, 1)
