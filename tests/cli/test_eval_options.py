"""No option of `eval` is ignored: each is read by the task, or refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from llama_adapter.cli.app import app
from llama_adapter.evaluation.tasks import TASKS
from llama_adapter.miniature import EVAL_OPTIONS
from llama_adapter.miniature.task import BATCH_SIZE

Cli = Callable[..., Any]
PARAMETERS = {
    parameter.name: parameter
    for parameter in typer.main.get_command(app).commands["eval"].params  # type: ignore[attr-defined]
    if parameter.name not in ("task", "out", "as_json", "help")
}
READ = {name: task.options for name, task in TASKS.items()} | {"miniature": EVAL_OPTIONS}
VALUES = {
    "expert": "ocr",
    "judge": "exact-match",
    "shard": "1/2",
    "expert_timeout": 5,
    "images": "none",
}


def written(name: str) -> tuple[object, ...]:
    """The option as a user writes it."""
    parameter = PARAMETERS[name]
    if parameter.is_flag:
        return (parameter.opts[0],)
    return (parameter.opts[0], VALUES.get(name, 1))


def test_tasks_declare_options_that_exist() -> None:
    for options in READ.values():
        assert options <= PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("task", READ)
def test_an_option_is_read_or_refused(cli: Cli, tmp_path: Path, task: str, name: str) -> None:
    if name == "judge_model":  # it is given with a judge
        more: tuple[object, ...] = ("--judge-url", "http://localhost:1")
    elif name == "judge_url":
        more = ("--judge-model", "m")
    elif name.startswith("judge_price"):
        other = "in" if name.endswith("out") else "out"
        more = (f"--judge-price-{other}", 1, "--judge-url", "http://localhost:1")
        more += ("--judge-model", "m")
    elif name.startswith("judge_"):
        more = ("--judge-url", "http://localhost:1", "--judge-model", "m")
    elif name.startswith("expert_"):
        more = ("--expert", "ocr")
    else:
        more = ()
    out = tmp_path / "out"
    done = cli("eval", task, "--out", out, *written(name), *more)
    assert done.status == 2
    refusals = done.stderr.count("has no effect")
    if name in READ[task]:
        assert refusals == 0, done.stderr
    else:
        assert refusals == 1
        assert done.stderr.count("\n") == 1
        assert f"the task {task} does not read it" in done.stderr
        given = {value for value in (*written(name), *more) if str(value).startswith("--")}
        assert done.stderr.split()[1] in given
    assert not out.exists()


STORED = ("--predictions", "stored.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*STORED, "--temperature", 0), "--temperature has no effect: --predictions are answers"),
        ((*STORED, "--model", "toy"), "--model has no effect: --predictions are answers"),
        ((*STORED, "--merge"), "--merge has no effect: --predictions are answers"),
        ((*STORED, "--device", "cpu"), "--device has no effect: no model runs here"),
        (("--images", "none", "--media", "x"), "--media has no effect: no image is shown"),
        (
            ("--images", "none", "--expert", "caption=x"),
            "--expert has no effect: no image is shown",
        ),
        (("--merge", "--data", "x"), "--data has no effect: --merge only puts answers together"),
        (("--merge", "--limit", 3), "--limit has no effect: --merge only puts answers together"),
        (("--expert-tokens", 9), "--expert-tokens has no effect: it needs --expert"),
        (("--no-expert-cache",), "--no-expert-cache has no effect: it needs --expert"),
        (("--judge-prompts", "x"), "--judge-prompts has no effect: it needs --judge-url or"),
        (("--judge-concurrency", 2), "--judge-concurrency has no effect: it needs --judge-url"),
        (
            ("--endpoint", "http://localhost:1", "--model", "m", "--device", "cpu"),
            "--device has no effect: no model runs here",
        ),
    ],
)
def test_an_option_that_another_one_makes_useless_is_refused(
    cli: Cli, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    done = cli("eval", "vqa", "--out", tmp_path / "out", *options)
    assert done.status == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_comparison_of_words_is_refused_before_a_model_is_asked(cli: Cli, tmp_path: Path) -> None:
    options = ("--judge", "exact-match", "--model", "toy", "--data", tmp_path)
    done = cli("eval", "videoinstruct", "--out", tmp_path / "out", *options)
    assert done.status == 2
    assert "exact-match is for one-word answers; videoinstruct needs a judge" in done.stderr


def test_help_says_what_holds_where_nothing_is_given() -> None:
    def said(option: str) -> str:
        return str(PARAMETERS[option].help).partition("default ")[2]

    usual, _, others = said("max_new_tokens").partition(", but ")
    lengths = dict.fromkeys(TASKS, usual) | dict(re.findall(r"([\w-]+) (\d+)", others))
    assert lengths == {name: str(task.generation.max_new_tokens) for name, task in TASKS.items()}
    for task in TASKS.values():
        assert said("frames") == f"{task.generation.frames}."
        assert said("batch_size") == f"{task.generation.batch_size}, miniature {BATCH_SIZE}."
        assert task.generation.beams == 1
        assert "1 (default): none" in str(PARAMETERS["beams"].help)
        assert task.generation.temperature == 0
        assert "0 (default)" in str(PARAMETERS["temperature"].help)


def test_help_has_sections(cli: Cli) -> None:
    shown = cli("eval", "--help").stdout
    titles = ["Arguments:", "Options:", "Answers:", "Data:", "Generation:", "Experts:", "Judge:"]
    places = [shown.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    for parameter in PARAMETERS.values():
        assert parameter.opts[0] in shown
