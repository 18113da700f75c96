"""`examples/ray_serve.py` on a Ray of its own: two replicas, streams, health.

Run by `make ray-test`, in an environment with `ray[serve]`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRIVER = """
import sys, time, ray
from ray import serve
from examples.ray_serve import app
ray.init(include_dashboard=False)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(app)
[deployment] = serve.status().applications["default"].deployments.values()
print(dict(deployment.replica_states), flush=True)
time.sleep(1e6)
"""
QUESTION = {"model": "toy", "messages": [{"role": "user", "content": "What color is the star?"}]}


def ask(url: str, body: Any = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    return urlopen(Request(url, content, {"Content-Type": "application/json"}), timeout=120)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of Ray's proxy, once two replicas run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "600",  # where the machine is busy
    }
    log = tmp_path_factory.mktemp("ray") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(port)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    found = next((line for line in process.stdout if line.startswith("{")), "nothing")
    assert "RUNNING: 'RUNNING'>: 2" in found or "'RUNNING': 2" in found, (
        found + log.read_text()[-3000:]
    )
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)


def test_two_replicas_answer(url: str) -> None:
    assert ask(f"{url}/ready").status == 200
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(f"{url}/v1/chat/completions", QUESTION), range(16)))
    bodies = [json.load(answer) for answer in answers]
    assert len({body["choices"][0]["message"]["content"] for body in bodies}) == 1
    assert ask(f"{url}/health").status == 200


def test_a_stream_comes_in_pieces(url: str) -> None:
    whole = json.load(ask(f"{url}/v1/chat/completions", QUESTION))
    with ask(f"{url}/v1/chat/completions", {**QUESTION, "stream": True}) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line.decode().strip() for line in response if line.startswith(b"data: ")]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
    texts = [delta["content"] for delta in deltas if delta.get("content")]
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    assert len(texts) > 1


def test_errors_are_openais(url: str) -> None:
    with pytest.raises(HTTPError) as caught:
        ask(f"{url}/v1/chat/completions", {**QUESTION, "tools": [{}]})
    assert caught.value.code == 400
    assert json.load(caught.value)["error"]["param"] == "tools"
