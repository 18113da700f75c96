"""`score`, `eval` and `report` as programs: output, exit status, messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.evaluation.servers import serving

Cli = Callable[..., Any]


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    entry = {"question": "what?", "answer": "dog", "pred": "a dog"}
    path.write_text(json.dumps({str(i): [{"pred": "yes", "score": 4}, entry] for i in range(3)}))
    return path


def test_score_json_is_one_object_with_the_published_names(cli: Cli, predictions: Path) -> None:
    done = cli("score", "msvd-qa", "--predictions", predictions, "--json")
    assert done.status == 0
    found = json.loads(done.stdout)
    assert (found["task"], found["n"], found["unanswered"], found["unparsed"]) == (
        "msvd-qa",
        3,
        0,
        0,
    )
    assert found["metrics"]["accuracy"] == 100
    assert found["intervals"]["accuracy"] == [100, 100]


def test_score_for_people(cli: Cli, predictions: Path) -> None:
    done = cli("score", "msvd-qa", "--predictions", predictions)
    assert "accuracy" in done.stdout
    assert "95% [100.00, 100.00]" in done.stdout


def test_bad_input_is_one_line_and_status_2(cli: Cli, predictions: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("msvd-qa", "--predictions", tmp_path / "gone"), "no such predictions"),
        (("msvd", "--predictions", predictions), "got 'msvd'; did you mean 'msvd-qa'?"),
        (("mme", "--predictions", predictions), "line 1 lacks question_id"),
        (("scienceqa", "--predictions", predictions), "needs the right answers; give --data"),
    ):
        done = cli("score", *arguments, "--json")
        assert (done.status, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_score_needs_neither_torch_nor_a_network() -> None:
    code = (
        "import sys, llama_adapter.evaluation.score\n"
        "print([m for m in ('torch', 'transformers', 'openai', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_eval_with_words_for_a_judge_and_a_report(
    cli: Cli, adapter_dir: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    data = tmp_path / "questions.jsonl"
    data.write_text('{"image": "a.png", "question": "what is it?", "answer": "a star"}\n')
    common = ("eval", "vqa", "--data", data, "--model", adapter_dir, "--max-new-tokens", 2)
    out = tmp_path / "out"
    done = cli(*common, "--out", out, "--judge", "exact-match", "--json")
    assert done.status == 0, done.stderr
    assert set(json.loads(done.stdout)["metrics"]) == {
        "exact-match:accuracy",
        "exact-match:accuracy_missing_as_wrong",
    }
    assert {path.name for path in out.iterdir()} == {
        "manifest.json",
        "predictions.jsonl",
        "judgements.jsonl",
        "score.json",
    }
    assert "exact-match:accuracy" in cli("report", out).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--judge-url", "http://x"), "a judge is named with --judge-model"),
        (("--judge", "gpt"), "--judge must be one of"),
        (("--shard", "3/2"), "shard must be i/n"),
        ((), "--model is needed"),
    ],
)
def test_eval_refuses(cli: Cli, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "what?", "answer": "x"}\n')
    done = cli("eval", "vqa", "--data", data, "--out", tmp_path / "out", *options)
    assert done.status == 2
    assert message in done.stderr


def test_shards_of_an_endpoint_merge_into_the_whole(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    data = tmp_path / "questions.jsonl"
    lines = [{"id": i, "question": f"what is {i}?", "answer": str(i % 3)} for i in range(5)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("eval", "vqa", "--judge", "exact-match", "--json")
    asked = (*common, "--data", data, "--model", "m", "--endpoint")
    with serving(lambda *_: "1") as served:
        whole = cli(*asked, served.url, "--out", tmp_path / "whole")
        for shard in ("1/2", "2/2"):
            done = cli(*asked, served.url, "--out", tmp_path / "parts", "--shard", shard)
            assert done.status == 0, done.stderr
    merged = cli(*common, "--out", tmp_path / "parts", "--merge")
    assert merged.status == 0, merged.stderr
    found, expected = json.loads(merged.stdout), json.loads(whole.stdout)
    assert (found["n"], found["metrics"]) == (expected["n"], expected["metrics"])
    assert found["metrics"]["exact-match:accuracy"] == 40


def test_an_endpoint_that_answers_nothing_ends_the_run(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    data, out = tmp_path / "questions.jsonl", tmp_path / "out"
    data.write_text('{"id": "1", "question": "what?", "answer": "a star"}\n')
    common = ("eval", "vqa", "--data", data, "--out", out, "--model", "m", "--judge", "exact-match")
    works = False
    with serving(lambda *_: "a star" if works else (400, {}, "too much")) as served:
        done = cli(*common, "--endpoint", served.url, "--json")
        assert (done.status, done.stdout) == (2, "")
        assert f"error: {served.url}: none of the 1 records is answered (the first: 1: " in (
            done.stderr
        )
        assert "Run the same command again to ask again" in done.stderr
        works = True
        done = cli(*common, "--endpoint", served.url, "--json")
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["exact-match:accuracy"] == 100


def test_records_that_no_model_could_answer_are_counted(
    cli: Cli, adapter_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openai")
    (tmp_path / "a.png").write_text("not an image")
    data = tmp_path / "questions.jsonl"
    data.write_text('{"image": "a.png", "question": "what is it?", "answer": "a star"}\n')
    common = ("eval", "vqa", "--data", data, "--judge", "exact-match", "--json")
    with serving(lambda *_: "a star") as served:
        for name, whose in (
            ("local", ("--model", adapter_dir)),
            ("endpoint", ("--model", "m", "--endpoint", served.url)),
        ):
            done = cli(*common, *whose, "--out", tmp_path / name)
            assert done.status == 0, done.stderr
            assert json.loads(done.stdout)["unanswered"] == 1
            assert "without an answer: 1" in done.stderr


def test_a_judge_that_never_replies_ends_the_run_and_answers_are_kept(
    cli: Cli, tmp_path: Path
) -> None:
    pytest.importorskip("openai")
    stored, out = tmp_path / "stored.jsonl", tmp_path / "out"
    lines = [
        {"task": "vqa", "id": id_, "questions": ["what?"], "gold": "x", "answers": ["x"]}
        for id_ in ("1", "2")
    ]
    stored.write_text("".join(json.dumps(line) + "\n" for line in lines))
    works = False
    reply = '{"pred": "yes", "score": 5}'
    run = ("eval", "vqa", "--predictions", stored, "--out", out)
    assert cli(*run, "--judge", "exact-match").status == 0
    common = (*run, "--judge-model", "m")
    with serving(lambda *_: reply if works else (200, {}, "not json")) as served:
        done = cli(*common, "--judge-url", served.url, "--json")
        assert (done.status, done.stdout) == (2, "")
        assert f"  1/answer: m at {served.url}: no completion" in done.stderr
        assert f"error: the judge m at {served.url} replied to none of the 2 prompts" in done.stderr
        assert (out / "predictions.jsonl").exists()
        # the numbers are those of what is stored now, not of an earlier judge
        stored_score = json.loads((out / "score.json").read_text())
        found = json.loads(cli("score", "vqa", "--predictions", out, "--json").stdout)
        assert {name: stored_score[name] for name in found} == found
        assert stored_score["judging"]["unavailable"] == ["1/answer", "2/answer"]
        works = True
        done = cli(*common, "--judge-url", served.url, "--json")
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["unjudged"] == 0


def test_eval_asks_for_a_judge_only_where_answers_are_unjudged(
    cli: Cli, adapter_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "what?", "answer": "a star"}\n')
    common = ("eval", "vqa", "--data", data, "--model", adapter_dir, "--max-new-tokens", 2)
    common += ("--out", tmp_path / "out")
    assert "answers are stored, 1 of them not judged" in cli(*common).stderr
    assert cli(*common, "--judge", "exact-match").status == 0
    again = cli(*common)
    assert "0 unjudged" in again.stdout
    assert "not judged" not in again.stderr
