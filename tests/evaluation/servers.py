"""A real OpenAI-compatible server on a free port that behaves as a test tells it to."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[str, int], Any]
"""From a prompt and how often it came before to a reply: text, or (status, headers, body)."""


def grade(prompt: str, _: int) -> str:
    """A judge without a mind but with a memory: the same prompt always gets the same grade."""
    value = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
    if "from 0 to 1" in prompt:
        return json.dumps({"score": value % 5 / 4})
    return json.dumps({"pred": "yes" if value % 2 else "no", "score": value % 6})


class Served:
    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()


def _prompt_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # a client that was killed leaves half a request, or none
        if not isinstance(sys.exception(), ConnectionError | json.JSONDecodeError):
            super().handle_error(request, client_address)


def _completion(text: str, *, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
    }


@contextmanager
def serving(behave: Behaviour, *, seconds: float = 0.0) -> Iterator[Served]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = _prompt_of(body)
            with served.lock:
                before = served.asked[prompt]
                served.asked[prompt] += 1
                served.bodies.append(body)
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            time.sleep(seconds)
            reply = behave(prompt, before)
            with served.lock:
                served.at_once -= 1
            if isinstance(reply, str):
                reply = 200, {}, json.dumps(_completion(reply, model=body["model"]))
            self._send(*reply)

        def _send(self, status: int, headers: dict[str, str], text: str) -> None:
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
