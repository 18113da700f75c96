"""A judge on this machine: a real two-layer model that has learnt one reply by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.judges import LocalJudge
from llama_adapter.evaluation.judging import judge_rows
from llama_adapter.evaluation.records import Record, Row
from llama_adapter.evaluation.tasks import find_task

from .byheart import fresh, learn

GOOD = "Yes, score: 4"
ROWS = [
    Row(record=Record(id=str(i), questions=("who?",), reference="a"), answers=("a",))
    for i in (0, 1)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    return learn(bytes_tokenizer, folder, after="<|im_start|>assistant\n", say=GOOD)


def test_it_judges_through_its_chat_template(directory: Path, tmp_path: Path) -> None:
    judge = LocalJudge(str(directory))
    reply = judge.ask("anything", system="Grade.", attempt=0)
    assert reply.text == GOOD
    report = judge_rows(find_task("msvd-qa"), ROWS, judge, tmp_path)
    assert (report.asked, report.unreadable, report.unavailable) == (2, (), ())
    assert report.prompt_tokens > 2 * report.completion_tokens > 0
    lines = [json.loads(x) for x in (tmp_path / "judgements.jsonl").read_text().splitlines()]
    assert {line["judge"] for line in lines} == {f"local:{directory}"}
    assert [line["verdict"] for line in lines] == [{"pred": "yes", "score": 4}] * 2


def test_what_a_judge_without_a_clue_says_is_listed(bytes_tokenizer: Any, tmp_path: Path) -> None:
    fresh(bytes_tokenizer, tmp_path / "judge").save_pretrained(tmp_path / "judge")
    judge = LocalJudge(str(tmp_path / "judge"), max_tokens=4)
    report = judge_rows(find_task("msvd-qa"), ROWS[:1], judge, tmp_path)
    assert report.unreadable == ("0/answer",)
    lines = (tmp_path / "judgements.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [0, 1, 2]


def test_samples_leave_the_random_state_of_others_alone(directory: Path) -> None:
    judge = LocalJudge(str(directory), max_tokens=4)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    judge.ask("anything", system="Grade.", attempt=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"judge .* cannot be loaded"):
        LocalJudge(str(tmp_path / "nothing"))


def test_on_the_command_line(
    cli: Any, write: Any, directory: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    data = write("questions.jsonl", [{"question": "what?", "answer": "x"}])
    asked = ("eval", "vqa", "--data", data, "--model", adapter_dir, "--max-new-tokens", 2)
    judged = ("--judge", "local", "--judge-model", directory, "--device", "cpu", "--json")
    done = cli(*asked, *judged, "--out", tmp_path / "out")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["metrics"]["accuracy"], found["metrics"]["score"]) == (100, 4)
    assert found["judging"]["judge"] == f"local:{directory}"
