"""The program itself: the guide's lines, a terminal that talks to it, and how it ends."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.training.workers import free_port

from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import Scene, SceneObject

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs/serving.md"
ADAPTERS = ROOT / "src/llama_adapter/miniature/adapters"


class Process:
    """`llama-adapter serve toy` in a process of its own."""

    def __init__(self, *options: object, port: int = 0) -> None:
        command = [sys.executable, "-m", "llama_adapter.cli", "serve", "toy", "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, *map(str, options)], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.lines = iter(self.process.stderr)
        self.url = next(e["url"] for e in self._events() if e["event"] == "serving")
        self.port = int(self.url.rpartition(":")[2])
        until = time.monotonic() + 120
        while httpx2.get(f"{self.url}/ready", timeout=60).status_code != 200:
            assert time.monotonic() < until, "never ready"
            time.sleep(0.05)

    def _events(self) -> Iterator[dict[str, Any]]:
        return (json.loads(line) for line in self.lines if line.startswith("{"))

    def ask(self, tokens: int) -> httpx2.Response:
        asked = {"model": "toy-base", "prompt": "the star is", "max_tokens": tokens}
        return httpx2.post(f"{self.url}/v1/completions", json=asked, timeout=120)

    def end(self, number: int) -> tuple[int, list[dict[str, Any]]]:
        """Its exit status after a signal, and what it logged since it began to serve."""
        self.process.send_signal(number)
        events = list(self._events())
        return self.process.wait(60), events


@contextmanager
def process(*options: object, port: int = 0) -> Iterator[Process]:
    running = Process(*options, port=port)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        running.process.stderr.close()


def examples() -> list[str]:
    """The guide's console blocks that ask a server, in order."""
    blocks = re.findall(r"```console\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return [block for block in blocks if "curl " in block]


def test_the_guide_a_terminal_and_the_end(tmp_path: Path, cli: Any) -> None:
    star = SceneObject(shape="star", color="red", size="large", place="center")
    scene = tmp_path / "docs/experts/scene.png"  # as the guide names it
    scene.parent.mkdir(parents=True)
    render(Scene(objects=(star,)), random.Random(5), size=256).save(scene)
    shutil.copytree(ADAPTERS / "v2", tmp_path / "birds-2026-11")
    admin = "admin-key-0123456789"
    (tmp_path / "admins").write_text(admin)
    options = ("--admin-keys", tmp_path / "admins", "--adapter-folder", tmp_path)
    with process(*options, "--drain-seconds", "20") as running:
        for block in examples():
            done = subprocess.run(
                ["bash", "-ec", block.replace("http://127.0.0.1:8000", running.url)],
                capture_output=True,
                text=True,
                timeout=120,
                cwd=tmp_path,
                env={**os.environ, "ADMIN_KEY": admin},
                check=True,
            )
            assert '"error":{' not in done.stdout, (block, done.stdout)
            assert "scene.png" not in block or "red" in done.stdout
        question = ("--prompt", "What colour is the star?", "--image", scene)
        told = cli("chat", "toy", "--url", running.url, *question, "--json")
        assert told.status == 0, told.stderr
        assert json.loads(told.stdout)["answer"] == "the star is red."
        talk = cli("chat", "toy", "--url", running.url, stdin="Hello\n/reset\nHello\n/quit\n")
        assert talk.status == 0, talk.stderr
        first, second = talk.stdout.splitlines()
        assert first == second
        refused = cli("chat", "gpt", "--url", running.url, "--prompt", "Hello")
        assert refused.status == 2
        assert "no model 'gpt'; there are: toy" in refused.stderr
        _ends_with_everything_answered(running)


def _ends_with_everything_answered(running: Process) -> None:
    """SIGTERM while requests are under way: each is answered, new ones are told, then 0."""
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(running.ask, 60) for _ in range(6)]
        until = time.monotonic() + 60
        while "under_way 6.0" not in httpx2.get(f"{running.url}/metrics", timeout=60).text:
            if time.monotonic() > until or all(one.done() for one in asked):
                break
        running.process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert any(answer.status_code == 200 for answer in answers)
    events = list(running._events())
    assert running.process.wait(60) == 0
    last = [event["event"] for event in events if event["event"] != "request"][-2:]
    assert last == ["draining", "stopped"]


def test_what_is_killed_leaves_nothing_in_the_way() -> None:
    with process(port=free_port()) as first:  # one that nobody is given before the second has it
        assert first.ask(1).status_code == 200
        status, _ = first.end(signal.SIGKILL)
        assert status == -signal.SIGKILL
        with process(port=first.port) as second:
            assert second.ask(1).status_code == 200
            assert second.end(signal.SIGINT)[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "can be reached by other machines"),
        (("--adapter", "x"), "--adapter must be NAME=DIR"),
        (("--expert", "none"), "unknown expert 'none'"),
        (("--media-folder", "/none"), "'/none' is not a folder"),
        (("--cors-origin", "*"), "'*' must be a scheme and a host"),
        (("--cors-origin", "https://example.org/"), "must be a scheme and a host"),
        (("--api-keys", "/none"), "cannot read /none"),
        (("--adapter-folder", "."), "--adapter-folder has no effect: it needs --admin-keys"),
        (("--log-level", "loud"), "--log-level must be"),
        (("--max-tokens", "0"), "max_tokens must be at least 1"),
        (("--request-seconds", "nan"), "request_seconds must be at least"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(cli, options, words) -> None:
    refused = cli("serve", "toy", *options)
    assert refused.status == 2
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_an_engine_whose_expert_cannot_be_opened_is_ended(cli, tmp_path) -> None:
    """Python aborts where it leaves while the engine's thread computes."""
    running = {thread for thread in threading.enumerate() if thread.name == "engine"}
    refused = cli("serve", "toy", "--port", 0, "--expert", f"search={tmp_path / 'none'}")
    assert refused.status == 2
    assert "does not exist" in refused.stderr
    assert {thread for thread in threading.enumerate() if thread.name == "engine"} <= running


def test_a_port_in_use_is_named(cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = cli("serve", "toy", "--port", port)
    assert refused.status == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in refused.stderr
