"""Talking to a server: an answer that breaks off is not taken for a whole one."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from llama_adapter.chat.remote import RemoteSession
from llama_adapter.errors import ServingError

PIECE = b'data: {"choices": [{"delta": {"content": "the star"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\n\r\n"


@contextmanager
def server_of(sent: bytes) -> Iterator[str]:
    """The address of a server that sends these bytes and hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(sent)

        log_message: Callable[..., Any] = lambda *_: None

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.timeout = 60
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        thread.join()


@contextmanager
def session_with(sent: bytes) -> Iterator[RemoteSession]:
    """A session with such a server."""
    with server_of(sent) as url:
        yield RemoteSession(url, "toy")


@pytest.mark.parametrize(
    "sent",
    [
        CHUNKED + b"%x\r\n%s\r\n" % (len(PIECE), PIECE),
        CHUNKED + b"%x\r\n%s" % (len(PIECE) + 9, PIECE),
        PLAIN + PIECE,
    ],
)
def test_an_answer_that_breaks_off_is_an_error(sent: bytes) -> None:
    with session_with(sent) as session:
        answer = session.stream("What is it?")
        assert next(answer) == "the star"
        with pytest.raises(ServingError, match=r"127\.0\.0\.1.*"):
            list(answer)
        assert session.last_answer is None


def test_an_answer_ends_where_the_server_says_so() -> None:
    with session_with(PLAIN + PIECE + DONE) as session:
        assert session.ask("What is it?").text == "the star"


def test_a_key_that_is_missing_is_asked_for_by_its_variable() -> None:
    refusal = b'{"error": {"message": "a valid API key is needed"}}'
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\n" % len(refusal)
    with (
        session_with(head + refusal) as session,
        pytest.raises(ServingError, match=r"key is needed; .* variable LLAMA_ADAPTER_API_KEY"),
    ):
        session.ask("What is it?")


def test_an_address_where_no_server_listens_is_told_as_that() -> None:
    with socket.socket() as bound:  # nobody else is given the port, and nobody listens there
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(ServingError, match=f"{url}.*: no server listens there"):
            RemoteSession(url, "toy").ask("What is it?")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_talking_to_a_server_needs_no_torch(options: list[str]) -> None:
    code = (
        "import sys\n"
        "from llama_adapter.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    with server_of(PLAIN + PIECE + DONE) as url:
        asked = ["chat", "toy", "--url", url, "--prompt", "What is it?", *options]
        done = subprocess.run(
            [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=True
        )
    assert "the star" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
