"""Terminals and pipes of every kind: encodings, bytes that are no text, closed and full streams."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.cli.output import json_only, one_line

Cli = Callable[..., Any]


def program(
    *arguments: str | bytes | Path, shell: str = "", encoding: str = "utf-8", **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run the program in a process of its own, its streams redirected as `shell` says."""
    command = [sys.executable, "-m", "llama_adapter.cli", *arguments]
    if shell:
        command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *command]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(
        command, check=False, capture_output=True, timeout=120, env=environment, **options
    )


def test_a_conversation_goes_on_after_bytes_that_are_no_text(adapter_dir: Path) -> None:
    typed = b"who \xff?\n/image nothing-\xff.png\n/wh\xe9t\nwho?\n"
    done = program("chat", adapter_dir, "--max-new-tokens", "2", input=typed, encoding="ascii")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stderr.decode("ascii").splitlines()[-3:]
    assert first.startswith("error: message text is not valid Unicode: character 5 is")
    assert second.startswith(r"error: cannot read image nothing-\udcff.png: No such file")
    assert third.startswith(r"unknown command /wh\udce9t.")
    assert done.stdout.decode("ascii").count("\n") == 1


def test_arguments_that_are_no_text_are_refused_in_one_line(cli: Cli, adapter_dir: Path) -> None:
    done = cli("chat", adapter_dir, "--prompt", "who \udcff?", "--json")
    assert (done.status, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: message text is not valid Unicode: character 5 is")


@pytest.mark.parametrize(
    ("shell", "complaint"),
    [
        ("> /dev/full", b"error: No space left on device\n"),
        (">&-", b"error: standard output is closed\n"),
    ],
)
def test_output_that_cannot_be_written_is_said_in_one_line(shell: str, complaint: bytes) -> None:
    done = program("--version", shell=shell)
    assert (done.returncode, done.stderr) == (2, complaint)


def test_a_reader_that_has_gone_ends_quietly() -> None:
    assert program("--help", shell="| true").stderr == b""


def test_a_closed_input_is_an_empty_one(
    adapter_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama_adapter.cli import main

    monkeypatch.setattr(sys, "argv", ["llama-adapter", "chat", str(adapter_dir)])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "error: No space left on device: runs/x\n"),
        (errno.EROFS, "error: Read-only file system: runs/x\n"),
        (errno.EIO, "error: Input/output error: runs/x\n"),
        (errno.EMFILE, "error: Too many open files: runs/x\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    number: int, line: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> None:
        raise OSError(number, os.strerror(number), "runs/x")

    monkeypatch.setattr("llama_adapter.cli.models.adapter_directory", refuse)
    done = cli("chat", "toy", "--prompt", "x")
    assert (done.status, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_json_is_valid_in_every_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"answer": "é – \U0001f600 \u2605", "file": "lone \udcff"}
    path = tmp_path / "out"
    with path.open("w", encoding=encoding, errors="backslashreplace") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with json_only(True) as emit:
            emit(result)
    assert json.loads(path.read_text(encoding)) == result


def test_messages_cannot_steer_a_terminal() -> None:
    assert one_line("a\n b\x1b[2J\udcff é") == r"a b\x1b[2J\udcff é"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e99", "9" * 40])
@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "toy", "--prompt", "x", "--temperature"],
        ["chat", "toy", "--prompt", "x", "--max-new-tokens"],
        ["chat", "toy", "--prompt", "x", "--frames"],
        ["chat", "toy", "--prompt", "x", "--expert", "caption", "--expert-timeout"],
        ["demo", "--minutes"],
        ["demo", "--seed"],
        ["import", "x", "--base", "y", "--out", "z", "--prompt-length"],
        ["eval", "mme", "--out", "z", "--limit"],
        ["eval", "mme", "--out", "z", "--seed"],
        ["eval", "mme", "--out", "z", "--frames"],
        ["eval", "mme", "--out", "z", "--temperature"],
        ["eval", "mme", "--out", "z", "--batch-size"],
        ["eval", "mme", "--out", "z", "--max-new-tokens"],
        ["eval", "mme", "--out", "z", "--judge-concurrency"],
        ["eval", "mme", "--out", "z", "--judge-price-in"],
        ["eval", "mme", "--out", "z", "--expert-timeout"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_numbers_out_of_range_are_refused(arguments: list[str], value: str, cli: Cli) -> None:
    name = arguments[-1]
    done = cli(*arguments[:-1], f"{name}={value}")
    assert (done.status, done.stdout) == (2, "")
    assert name.strip("-").replace("-", "_") in done.stderr.replace("-", "_")
    assert re.search(r"got|valid integer", done.stderr)


def test_a_frame_limit_is_the_readers() -> None:
    from llama_adapter.cli import numbers
    from llama_adapter.processing import video

    assert numbers.MAX_FRAMES == video.MAX_FRAMES
