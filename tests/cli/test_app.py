from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_adapter


def test_version(cli: Callable[..., Any]) -> None:
    done = cli("--version")
    assert (done.status, done.stdout) == (0, f"llama-adapter {llama_adapter.__version__}\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_of_a_busy_machine_sleep_before_torch_is_loaded(
    given: dict[str, str], expected: str | None
) -> None:
    program = """
import os, sys
from llama_adapter.cli import main
try:
    main()
except SystemExit:
    assert "torch" not in sys.modules
    print(os.environ.get("GOMP_SPINCOUNT"))
"""
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", program, "--version"]
    done = subprocess.run(
        command, env={**kept, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(expected)


def test_every_command_has_help_with_an_example(cli: Callable[..., Any]) -> None:
    from llama_adapter.cli import app

    names = [command.name for command in app.registered_commands]
    overview = cli("--help").stdout
    for name in names:
        assert f"\n  {name}" in overview
        done = cli(name, "--help")
        assert done.status == 0
        assert f"\n    llama-adapter {name} " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["chat"],
        ["chat", "toy", "--max-new-tokens", "many"],
        ["chat", "toy", "--json"],
        ["info", "toy", "--nonsense"],
    ],
)
def test_bad_usage_ends_with_2_and_leaves_stdout_alone(
    arguments: list[str], cli: Callable[..., Any]
) -> None:
    done = cli(*arguments)
    assert done.status == 2
    assert done.stdout == ""
    assert done.stderr


@pytest.mark.parametrize("command", ["info", "chat"])
def test_a_refusal_is_one_line_and_ends_with_2(command: str, cli: Callable[..., Any]) -> None:
    prompt = ["--prompt", "x"] if command == "chat" else []
    done = cli(command, "no-such-directory", *prompt)
    assert done.status == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no adapter directory 'no-such-directory'")
    assert done.stderr.count("\n") == 1


def test_built_in_models_are_offered_by_shells(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_LLAMA_ADAPTER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "llama-adapter info ")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert cli().stdout.split() == ["toy", "photos"]
    monkeypatch.setenv("COMP_WORDS", "llama-adapter eval vqav2 --model p")
    monkeypatch.setenv("COMP_CWORD", "4")
    assert cli().stdout.split() == ["photos"]


def test_the_photos_model_says_what_it_lacks(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("llama_adapter.photos.bundled.ADAPTER", tmp_path / "adapter")
    refused = cli("chat", "photos", "--prompt", "hi")
    assert (refused.status, refused.stderr.count("\n")) == (2, 1)
    assert "made without the model `photos`: train it with `llama-adapter train" in refused.stderr
