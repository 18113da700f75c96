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
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parents[1]
RAY = [str(Path(sys.executable).with_name("serve"))]
QUESTION = {"model": "toy", "messages": [{"role": "user", "content": "What color is the star?"}]}


def ask(url: str, body: Any = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    return urlopen(Request(url, content, {"Content-Type": "application/json"}), timeout=120)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("ray")
    application = {"name": "chat", "route_prefix": "/", "import_path": "examples.ray_serve:app"}
    config = {"http_options": {"port": port}, "applications": [application]}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*RAY, "run", "--app-dir", str(ROOT), str(folder / "config.yaml")],
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        )
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 1200
        while time.monotonic() < until and process.poll() is None:
            try:
                ask(f"{address}/ready")
                break
            except OSError:  # nobody listens, or a 503
                time.sleep(1)
        else:
            pytest.fail((folder / "log").read_text()[-5000:])
        yield address
        process.send_signal(signal.SIGINT)
        process.wait(120)


def test_two_replicas_answer(url: str) -> None:
    until, found = time.monotonic() + 600, ""
    while "RUNNING: 2" not in found:
        assert time.monotonic() < until, found
        found = subprocess.run([*RAY, "status"], capture_output=True, text=True, check=True).stdout
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
