"""Names that mean no model are refused before anything waits for a network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest
import torch
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


class Stored(BaseHTTPRequestHandler):
    """A hub with one repository, `owner/mine`, of two revisions."""

    files: dict[str, dict[str, bytes]]

    def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        self._answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        _, *parts = path.split("/")
        if parts[:4] == ["api", "models", "owner", "mine"]:
            revision = parts[5] if len(parts) > 5 else "main"
            commit = COMMITS.get(revision, revision)
            names = self.files[commit]
            if "tree" in parts:
                self._json(
                    [{"type": "file", "path": n, "size": len(c), "oid": sha1(c).hexdigest()}
                     for n, c in names.items()]
                )  # fmt: skip
                return
            siblings = [{"rfilename": name} for name in names]
            self._json({"id": "owner/mine", "sha": commit, "siblings": siblings})
        elif parts[:3] == ["owner", "mine", "resolve"]:
            commit = COMMITS.get(parts[3], parts[3])
            content = self.files[commit].get("/".join(parts[4:]))
            if content is None:
                self._answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                return
            etag = f'"{sha1(content).hexdigest()}"'
            self._answer(content, X_Repo_Commit=commit, ETag=etag)
        else:
            self._answer(b"", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (theirs)
        pass


COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def test_adapters_load_by_name(
    build: Any, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, dict[str, bytes]] = {}
    models = {"main": build("v2-chat"), "v1": build("v1", prompt_length=3)}
    for revision, model in models.items():
        model.save_pretrained(tmp_path / revision)
        content = {p.name: p.read_bytes() for p in (tmp_path / revision).iterdir()}
        files[COMMITS[revision]] = {**content, **{f"in/{n}": c for n, c in content.items()}}
    handler = type("OwnHub", (Stored,), {"files": files})
    load = LlamaAdapterForConditionalGeneration.from_pretrained
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        options = {"cache_dir": str(tmp_path / "cache"), "language_model": None}
        try:
            for name, given in (
                ("main", {}),
                ("v1", {"revision": "v1"}),
                ("v1", {"revision": "v1", "subfolder": "in", "token": False}),
            ):
                options["language_model"] = base()
                loaded = load("owner/mine", **options, **given)
                own = models[name].adapter.state_dict()
                found = loaded.adapter.state_dict()
                assert found.keys() == own.keys()
                assert all(torch.equal(found[key], tensor) for key, tensor in own.items())
            loaded.load_adapter("owner/mine", "second", cache_dir=str(tmp_path / "cache"))
            with pytest.raises(CheckpointError, match=r"has no none/adapter_config\.json"):
                load("owner/mine", subfolder="none", cache_dir=str(tmp_path / "cache"))
            with pytest.raises(CheckpointError, match="cannot load the adapter 'owner/mistyped'"):
                load("owner/mistyped", cache_dir=str(tmp_path / "cache"))
        finally:
            server.shutdown()
            thread.join()
    options["language_model"] = base()
    again = load("owner/mine", local_files_only=True, **options)
    assert again.adapter_config == models["main"].adapter_config
