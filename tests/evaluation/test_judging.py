"""Judging against a real server that misbehaves on purpose."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.costs import judge_usage
from llama_adapter.evaluation.judges import (
    EndpointJudge,
    exact_verdict,
    synonym_verdict,
)
from llama_adapter.evaluation.judging import (
    JudgeReport,
    compare_words,
    judge_rows,
    read_judge_prompts,
)
from llama_adapter.evaluation.records import Record, Row
from llama_adapter.evaluation.tasks import TASKS, find_task

from .conftest import ours, quick
from .servers import Behaviour, serving

pytest.importorskip("openai")
GOOD = '{"pred": "yes", "score": 4}'


def rows(count: int) -> list[Row]:
    return [
        Row(
            record=Record(id=str(i), questions=(f"question {i}?",), reference="dog"),
            answers=("a dog",),
        )
        for i in range(count)
    ]


@contextmanager
def a_judge(url: str, **options: Any) -> Iterator[EndpointJudge]:
    options = {"retries": 2, "timeout": 60.0, "concurrency": 4, **options}
    judge = EndpointJudge(url=url, model="grader", **options)
    try:
        yield judge
    finally:
        judge.close()


def judged(
    behave: Behaviour, folder: Path, *, count: int = 3, **options: Any
) -> tuple[JudgeReport, list[dict[str, Any]]]:
    with serving(behave) as served, a_judge(served.url, **options) as judge:
        report = judge_rows(find_task("msvd-qa"), rows(count), judge, folder)
    lines = (folder / "judgements.jsonl").read_text().splitlines()
    return report, [json.loads(line) for line in lines]


def test_every_reply_is_kept_with_its_prompt_hash_and_cost(tmp_path: Path) -> None:
    report, lines = judged(lambda *_: GOOD, tmp_path)
    assert (report.asked, report.prompt_tokens, report.completion_tokens) == (3, 30, 9)
    assert {line["reply"] for line in lines} == {GOOD}
    assert len({line["prompt_hash"] for line in lines}) == 3
    assert lines[0]["judge"].startswith("grader at http://127.0.0.1")


def test_numbers_are_had_again_without_asking(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.jsonl"
    lines = ours("msvd-qa", [(str(i), "a dog") for i in range(3)])
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged(lambda prompt, _: GOOD if "question 1" in prompt else "No, score: 1", tmp_path)
    found = quick("msvd-qa", predictions)
    assert found.metrics["accuracy"] == pytest.approx(100 / 3)
    assert found.metrics["score"] == 2
    assert found.protocol["judge"].startswith("grader at")


def test_stored_verdicts_are_not_asked_for_again(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD) as served, a_judge(served.url) as judge:
        task = find_task("msvd-qa")
        judge_rows(task, rows(2), judge, tmp_path)
        with (tmp_path / "judgements.jsonl").open("a") as file:
            file.write('{"task": "msvd-qa", "id": "2", "repl')
        report = judge_rows(task, rows(4), judge, tmp_path)
    assert (report.kept, report.asked) == (2, 2)
    assert set(served.asked.values()) == {1}


def test_busy_and_broken_servers_are_asked_again(tmp_path: Path) -> None:
    def behave(_: str, before: int) -> Any:
        if before == 0:
            return 429, {"Retry-After": "0"}, '{"error": {"message": "slow down"}}'
        if before == 1:
            return 500, {}, "oops"
        return GOOD

    report, lines = judged(behave, tmp_path, count=2)
    assert not report.unavailable
    assert len(lines) == 2


def test_a_server_that_stays_busy_leaves_answers_unjudged(tmp_path: Path) -> None:
    def behave(prompt: str, _: int) -> Any:
        return (429, {"Retry-After": "0"}, "{}") if "question 1" in prompt else GOOD

    report, lines = judged(behave, tmp_path, retries=1)
    assert report.unavailable == ("1/answer",)
    failed = next(line for line in lines if line["id"] == "1")
    assert failed["verdict"] is None
    assert "429" in failed["error"]


def test_timeouts_leave_answers_unjudged(tmp_path: Path) -> None:
    over = threading.Event()

    def behave(prompt: str, _: int) -> Any:
        if "question 1" in prompt:
            over.wait(60)
        return GOOD

    with serving(behave) as served, a_judge(served.url, retries=0, timeout=4) as judge:
        report = judge_rows(find_task("msvd-qa"), rows(2), judge, tmp_path)
        over.set()
    assert report.unavailable == ("1/answer",)


@pytest.mark.parametrize(
    "reply",
    ["It is a fine answer, I would say.", "", '{"pred": "yes", "score": NaN}', "yes, score: 9"],
)
def test_prose_is_asked_for_twice_more_and_then_listed(tmp_path: Path, reply: str) -> None:
    def behave(prompt: str, _: int) -> Any:
        return reply if "question 1" in prompt else GOOD

    report, lines = judged(behave, tmp_path)
    assert report.unreadable == ("1/answer",)
    assert [line["attempt"] for line in lines if line["id"] == "1"] == [0, 1, 2]


def test_prose_once_is_no_harm(tmp_path: Path) -> None:
    report, _ = judged(lambda _, before: GOOD if before else "Hm.", tmp_path)
    assert not report.unreadable


@pytest.mark.parametrize("body", ["not json", "{}", '{"choices": []}', "[1, 2]"])
def test_replies_that_are_no_completion(tmp_path: Path, body: str) -> None:
    report, _ = judged(lambda *_: (200, {}, body), tmp_path, count=1)
    assert report.unavailable == ("0/answer",)


@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_a_wrong_key_or_model_stops_the_run(tmp_path: Path, status: int) -> None:
    with pytest.raises(EvaluationError, match=f"judge grader at .* refuses: .*{status}"):
        judged(lambda *_: (status, {}, '{"error": {"message": "no"}}'), tmp_path, count=20)


def test_no_more_prompts_at_once_than_allowed(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD, seconds=0.05) as served, a_judge(served.url) as judge:
        judge_rows(find_task("msvd-qa"), rows(20), judge, tmp_path)
    assert 2 <= served.most_at_once <= 4


def test_nobody_there(tmp_path: Path) -> None:
    with a_judge("http://127.0.0.1:9/v1", retries=0) as judge:
        report = judge_rows(find_task("msvd-qa"), rows(1), judge, tmp_path)
        assert report.unavailable == ("0/answer",)
        same = judge_rows(find_task("msvd-qa"), rows(1) * 2, judge, tmp_path)
    assert report.is_without_reply
    assert same.is_without_reply  # though both prompts bear one name
    assert same.unavailable == ("0/answer", "0/answer")


def test_prompts_show_question_gold_and_answer_as_they_are(tmp_path: Path) -> None:
    odd = Row(
        record=Record(id="1", questions=("what is {gold}?",), reference="{answer} & {x}"),
        answers=("{0} {question}",),
    )
    with serving(lambda *_: GOOD) as served, a_judge(served.url) as judge:
        judge_rows(find_task("msvd-qa"), [odd], judge, tmp_path)
    prompt = next(iter(served.asked))
    for text in ("what is {gold}?", "{answer} & {x}", "{0} {question}", '{"pred": "yes", "score"'):
        assert text in prompt


def test_published_prompts_may_replace_ours(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"answer": "Q {question} {'pred': 'yes'}", "system": "Grade."}))
    judging = read_judge_prompts(find_task("msvd-qa"), path)
    with serving(lambda *_: GOOD) as served, a_judge(served.url) as judge:
        judge_rows(find_task("msvd-qa"), rows(1), judge, tmp_path, judging=judging)
    assert served.bodies[0]["messages"][0]["content"] == "Grade."
    assert list(served.asked) == ["Q question 0? {'pred': 'yes'}"]
    path.write_text("{}")
    with pytest.raises(EvaluationError, match="lacks the prompt for answer"):
        read_judge_prompts(find_task("msvd-qa"), path)


def test_what_is_asked_for_again_counts_though_other_verdicts_came_since(tmp_path: Path) -> None:
    predictions, prompts = tmp_path / "predictions.jsonl", tmp_path / "prompts.json"
    lines = ours("msvd-qa", [(str(i), "a dog") for i in range(2)])
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts.write_text(json.dumps({"answer": "Q {question}"}))
    task = find_task("msvd-qa")
    strict = read_judge_prompts(task, prompts)

    def behave(prompt: str, _: int) -> str:
        return "no, score: 1" if prompt.startswith("Q ") else GOOD

    with serving(behave) as served:

        def accuracy(model: str, judging: Any = None, asked: int = 0) -> float:
            judge = EndpointJudge(url=served.url, model=model, retries=0, timeout=60.0)
            report = judge_rows(task, rows(2), judge, tmp_path, judging=judging)
            judge.close()
            assert (report.asked, report.kept) == (asked, 2 - asked)
            usage = judge_usage(tmp_path)
            assert usage is not None
            replies.append(usage["replies"])
            return quick("msvd-qa", predictions).metrics["accuracy"]

        replies: list[int] = []
        assert accuracy("grader", asked=2) == 100
        assert accuracy("grader", strict, asked=2) == 0
        assert accuracy("grader") == 100
        assert accuracy("grader", strict) == 0
        assert accuracy("other", asked=2) == 100
        assert accuracy("grader", strict) == 0
        size = predictions.with_name("judgements.jsonl").stat().st_size
        assert accuracy("grader", strict) == 0  # what counts already is not written again
        assert predictions.with_name("judgements.jsonl").stat().st_size == size
    assert replies == [2, 4, 4, 4, 2, 4, 4]


def test_both_orders_are_judged_and_put_back(tmp_path: Path) -> None:
    metadata = {"category": "math", "baseline": "BASE"}
    row = Row(record=Record(id="1", questions=("?",), metadata=metadata), answers=("MINE",))

    def behave(prompt: str, _: int) -> str:
        return "8 3\nBecause." if prompt.index("BASE") < prompt.index("MINE") else "5 9\nSo."

    with serving(behave) as served, a_judge(served.url) as judge:
        judge_rows(find_task("vicuna-80"), [row], judge, tmp_path)
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text(json.dumps(ours("vicuna-80", [("1", "MINE")], **metadata)[0]) + "\n")
    found = quick("vicuna-80", predictions)
    assert len(served.asked) == 2
    assert (found.metrics["total_1"], found.metrics["total_2"]) == (8.5, 4)
    assert found.metrics["flips"] == 0


def test_word_judges_are_named_as_another_measure(tmp_path: Path) -> None:
    lines = ours("msvd-qa", [("1", "A X."), ("2", "an x-ray")])
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answered = [
        Row(record=Record(id=x["id"], questions=("?",), reference="x"), answers=tuple(x["answers"]))
        for x in lines
    ]
    compare_words(find_task("msvd-qa"), answered, "exact-match", tmp_path)
    found = quick("msvd-qa", predictions)
    assert found.metrics["exact-match:accuracy"] == 50
    assert "accuracy" not in found.metrics
    with pytest.raises(EvaluationError, match="for one-word answers; videoinstruct"):
        compare_words(find_task("videoinstruct"), answered, "exact-match", tmp_path)


@pytest.mark.parametrize(
    ("reference", "answer", "exact", "synonym"),
    [
        ("man", "A man.", True, True),
        ("man", "a guy is running", False, True),
        ("run", "The dog is running", False, True),
        ("2", "two", False, True),
        ("bicycle", "bikes", False, True),
        ("woman", "man", False, False),
        ("cat", "category", False, False),
    ],
)
def test_word_judges(reference: str, answer: str, exact: bool, synonym: bool) -> None:
    row = Row(record=Record(id="1", questions=("?",), reference=reference), answers=(answer,))
    assert exact_verdict(row)["pred"] == ("yes" if exact else "no")
    assert synonym_verdict(row)["pred"] == ("yes" if synonym else "no")


def test_every_judged_task_fills_its_prompts() -> None:
    for task in TASKS.values():
        for prompt in task.judging.prompts.values() if task.judging else ():
            assert "{question}" in prompt
            assert "{{" not in prompt
