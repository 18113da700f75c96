"""Names that mean no model are refused before anything waits for a network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from llama_adapter import LlamaAdapterForConditionalGeneration
from llama_adapter.errors import CheckpointError


def refusal(name: str) -> str:
    began = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        LlamaAdapterForConditionalGeneration.from_base(name)
    assert time.perf_counter() - began < 20, "transformers alone tries for a minute"
    message = str(caught.value)
    assert message.startswith(f"cannot load the base {name!r}: there is no such directory")
    assert "\n" not in message
    return message


class Hub(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (theirs)
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub that holds nothing, and what it was asked for."""
    handler = type("OwnHub", (Hub,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield handler.asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["/no/such/base", "./base", "runs/my/adapter", "a..b", "~/base"])
def test_what_can_be_no_name_is_refused_without_asking(hub: list[str], name: str) -> None:
    assert "names are owner/name" in refusal(name)
    assert not hub


def test_offline_nothing_is_asked(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("owner/mistyped", "mistyped"):
        assert "HF_HUB_OFFLINE forbids to ask the hub" in refusal(name)
    assert not hub


def test_the_hub_is_asked_once(hub: list[str]) -> None:
    assert f"no such model for you on {constants.ENDPOINT}" in refusal("owner/mistyped")
    assert [path for path in hub if "mistyped" in path] == ["/api/models/owner/mistyped"]


def test_a_hub_that_does_not_answer(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in refusal("owner/mistyped")
    assert not hub
