"""Damaged result files, questions and run folders: scored rightly or refused in a line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.fuzzing import Campaign, mutated_bytes, mutated_json_text

from llama_adapter.evaluation.report import find_runs
from llama_adapter.evaluation.report_page import write_report
from llama_adapter.evaluation.score import ScoreReport, score
from llama_adapter.evaluation.tasks import TASKS
from llama_adapter.evaluation.tasks.base import Counting, Inputs

VERDICT = {"pred": "yes", "score": 4}
ASKED = {"question": "what runs?", "answer": "a dog", "pred": "dog"}
PROBLEM = {"choices": ["a dog", "a cat"], "answer": 1, "question": "?", "hint": "", "image": None,
           "split": "test", "subject": "natural science", "grade": "grade1"}  # fmt: skip
QUESTIONS = [{"id": n, "question": "what runs?", "answer": "a dog", "video_id": n} for n in (1, 2)]
LINES = "1.jpg\tIs it?\tYes\tYes\n1.jpg\tIs it not?\tNo\tNo, it is not\n"

JUDGED: list[Any] = [
    {"1": [VERDICT, ASKED], "2": [{"pred": "no", "score": 1}, ASKED]},
    [{"id": n, **ASKED} for n in (1, 2)],
]
RESULTS: dict[str, list[Any]] = {
    "msvd-qa": JUDGED,
    "msrvtt-qa": JUDGED,
    "vqa": JUDGED,
    "vqav2": [[{"question_id": n, "answer": "dog"} for n in (1, 2)]],
    "activitynet-qa": [[{"question_id": n, "answer": "dog"} for n in (1, 2)], {"1": "a dog"}],
    "videoinstruct": [{"1": [{"score": 3}, {"Q": "what?", "A": "dog", "pred": "a dog"}]}],
    "infimm-eval": [
        [{"id": n, "category": "Deductive", "complexity": "High", "score": 0.5, "prediction": "so"}
         for n in (1, 2)]
    ],
    "coco-caption": [
        [{"image_id": n, "caption": "a dog runs"} for n in (1, 2)],
        {"1": ["a dog"], "2": "cats"},
    ],
    "scienceqa": [
        {"results": {"1": 0, "2": 1}, "outputs": {"1": "The answer is A.", "2": "B"}},
        [{"question_id": n, "text": "A"} for n in (1, 2)],
    ],
    "mme": [LINES],
    "vicuna-80": [
        [{"question_id": n, "text": "8 9\nGood.", "score": [8, 9], "answer1_id": "a",
          "answer2_id": "b"} for n in (1, 2)]
    ],
}  # fmt: skip
DATA: dict[str, Any] = {
    "msvd-qa": QUESTIONS,
    "msrvtt-qa": QUESTIONS,
    "vqa": QUESTIONS,
    "vqav2": [
        {"question_id": n, "image": "x.png", "question": "what?", "answers": ["dog"] * 10}
        for n in (1, 2)
    ],
    "activitynet-qa": [{"video_name": "x", "question_id": n, "question": "?"} for n in (1, 2)],
    "videoinstruct": [{"Q": "what?", "A": "dog", "video_name": "v"}] * 2,
    "infimm-eval": [{"Image path": ["x.png"], "Question": "why?", "Answer": "so"}] * 2,
    "coco-caption": {"1": ["a dog runs fast"], "2": ["two cats"]},
    "scienceqa": {"1": PROBLEM, "2": PROBLEM},
    "mme": LINES,
    "vicuna-80": [{"question_id": n, "text": "what?", "category": "math"} for n in (1, 2)],
}
TOPS = {"score": 5, "score_unrounded": 5, "score_missing_as_zero": 5, "mean": 5, "CIDEr": 1000,
        "perception": 2000, "cognition": 800, "relative": 1e6, "first_place_bonus": 10}  # fmt: skip
ASPECTS = ("correctness", "detail", "context", "temporal", "consistency", "mean_unrounded")


def is_right(report: ScoreReport) -> None:
    """Every record is counted once, and every number is on its scale."""
    json.dumps(report.as_json(), allow_nan=False, ensure_ascii=False).encode()
    invalid = (report.unanswered, report.unparsed, report.unjudged)
    assert all(count >= 0 for count in invalid)
    if report.task != "coco-caption":  # there, images without a caption are not scored
        assert sum(invalid) <= report.n
        judging = TASKS[report.task].judging
        if judging is not None and sum(invalid) == report.n and report.task == "infimm-eval":
            assert not report.metrics
    assert not any("\n" in note for note in report.notes)
    for name, value in report.metrics.items():
        top = 5 if name in ASPECTS else TOPS.get(name, 200 if report.task == "mme" else 100)
        if report.task == "vicuna-80" and name not in TOPS:
            top = max(100, 10 * report.n)
        low = -10 if name == "first_place_bonus" else 0
        assert low <= value <= top + 1e-6, (name, value)
        if name in report.intervals:
            assert low <= report.intervals[name][0] <= report.intervals[name][1] <= top + 1e-6


def written(folder: Path, content: Any, rng: random.Random, *, name: str) -> Path:
    """A damaged file of answers or questions, as a document, as lines or as MME's text."""
    folder.mkdir(exist_ok=True)
    is_whole = name != "results" and rng.random() < 0.6
    if isinstance(content, str):
        text = content.encode() if is_whole else mutated_bytes(content.encode(), rng)
        (folder / "count.txt").write_bytes(text)
        return folder
    data = json.dumps(content).encode() if is_whole else mutated_json_text(content, rng)
    if isinstance(content, list) and rng.random() < 0.3 and not is_whole:
        data = b"\n".join(mutated_json_text(row, rng) for row in content)
    path = folder / f"{name}.{rng.choice(('json', 'json', 'jsonl'))}"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("task", TASKS)
def test_result_files(tmp_path: Path, task: str) -> None:
    campaign = Campaign(f"evaluation {task}", inputs=40)
    for number, rng in enumerate(campaign):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = written(folder / "r", rng.choice(RESULTS[task]), rng, name="results")
        if task == "videoinstruct":
            path = path.rename(path.with_stem("correctness"))
        inputs = None
        if rng.random() < 0.7:
            name = {"videoinstruct": "generic_qa", "activitynet-qa": "test_q"}.get(task, "problems")
            inputs = Inputs(data=written(folder / "d", DATA[task], rng, name=name))
            right = [{"answer": "dog", "type": 1, "question_id": n} for n in (1, 2)]
            (folder / "d" / "test_a.json").write_text(json.dumps(right))
        campaign.attempt(
            lambda path=path, inputs=inputs: score(
                task, path, inputs=inputs, counting=Counting(tokenizer="simple"), resamples=20
            ),
            accepted=is_right,
        )


def test_run_folders(tmp_path: Path) -> None:
    """Predictions, judgements and manifest of a run, each damaged now and then; with a report."""
    line = {"task": "vqa", "id": "1", "questions": ["what?"], "answers": ["a dog"], "gold": "dog",
            "images": ["x.png"], "facts": {"aliases": ["one"]}, "seconds": 0.1}  # fmt: skip
    verdict = {"task": "vqa", "id": "1", "aspect": "answer", "judge": "m", "version": "1",
               "reply": "Yes, score: 4", "verdict": VERDICT, "prompt_hash": "0"}  # fmt: skip
    manifest = {"task": "vqa", "model": {"kind": "local", "directory": "m"}, "data": "d",
                "records": 2, "generation": {}, "frames": {"rule": "mean"}}  # fmt: skip
    other = {**line, "id": "2", "task": "vqa"}
    campaign = Campaign("evaluation run folders", inputs=60)
    for number, rng in enumerate(campaign):
        run = tmp_path / str(number) / "run"
        run.mkdir(parents=True)
        parts: dict[str, list[Any]] = {
            "predictions.jsonl": [line, other],
            "judgements.jsonl": [verdict, {**verdict, "id": "2"}],
            "manifest.json": [manifest],
        }
        for name, rows in parts.items():
            damaged = rng.random() < 0.5
            texts = [mutated_json_text(x, rng) if damaged else json.dumps(x).encode() for x in rows]
            (run / name).write_bytes(b"\n".join(texts) + b"\n" * rng.randrange(2))

        def read(run: Path = run) -> list[ScoreReport]:
            found = find_runs([run], resamples=20)
            assert all(path.stat().st_size for path in write_report(found, run / "report"))
            return [one.report for one in found]

        campaign.attempt(read, accepted=lambda reports: [is_right(one) for one in reports] and None)
