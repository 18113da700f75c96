"""Names that mean no model are refused before anything waits for a network."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from transformers import AutoTokenizer

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor
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
    created: list[Any]

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
            if commit not in self.files:
                self._answer(b"", 404, X_Error_Code="RevisionNotFound")
                return
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
            if commit not in self.files:
                self._answer(b"", 404, X_Error_Code="RevisionNotFound")
                return
            content = self.files[commit].get("/".join(parts[4:]))
            if content is None:
                self._answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                return
            etag = f'"{sha1(content).hexdigest()}"'
            self._answer(content, X_Repo_Commit=commit, ETag=etag)
        else:
            self._answer(b"", 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._json({"url": f"{constants.ENDPOINT}/owner/mine"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path.startswith("/api/models/owner/mine/preupload/main"):
            wanted = [file["path"] for file in json.loads(body)["files"]]
            self._json(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False}
                           for path in wanted]}
            )  # fmt: skip
        else:
            assert self.path.startswith("/api/models/owner/mine/commit/main"), self.path
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    content = b64decode(entry["value"]["content"])
                    self.files[COMMITS["main"]][entry["value"]["path"]] = content
            commit = COMMITS["main"]
            url = f"{constants.ENDPOINT}/owner/mine/commit/{commit}"
            self._json({"commitUrl": url, "commitOid": commit, "success": True})

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (theirs)
        pass


COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The hub of `Stored`, whose `files` a test fills."""
    handler = type(
        "OwnHub", (Stored,), {"files": {commit: {} for commit in COMMITS.values()}, "created": []}
    )
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
        try:
            yield handler
        finally:
            server.shutdown()
            thread.join()


def test_an_adapter_is_pushed_whole(build: Any, base: Any, stored: Any, tmp_path: Path) -> None:
    model = build("v2-chat")
    model.config.base["name_or_path"] = "owner/base"
    ids = torch.tensor([[5, 6, 7]])
    address = model.push_to_hub("owner/mine", private=True, tags=["birds: many"])
    assert address.startswith(f"{constants.ENDPOINT}/owner/mine")
    assert [(e["organization"], e["name"], e["visibility"]) for e in stored.created] == [
        ("owner", "mine", "private")
    ]
    files = stored.files[COMMITS["main"]]
    assert sorted(files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    ]
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("owner/mine")' in card.text
    assert card.data.to_dict() == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "llama-adapter",
        "pipeline_tag": "text-generation",
        "tags": ["llama-adapter", "birds: many"],
    }
    loaded = LlamaAdapterForConditionalGeneration.from_pretrained(
        "owner/mine", language_model=base(), cache_dir=str(tmp_path)
    )
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    # a card that somebody wrote stays
    own = b"---\nlicense: other\n---\n\n# Birds\n"
    files["README.md"] = own
    model.push_to_hub("owner/mine")
    assert files["README.md"] == own
    # and what is made from it has its terms
    loaded = LlamaAdapterForConditionalGeneration.from_pretrained(
        "owner/mine", language_model=base(), cache_dir=str(tmp_path / "licensed")
    )
    del files["README.md"]
    loaded.push_to_hub("owner/mine")
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "other"
    assert "Made from `Birds`" in card.text


def test_a_processor_is_pushed_without_paths_of_this_machine(
    toy_tokenizer: Any, image_processor: Any, stored: Any, tmp_path: Path
) -> None:
    toy_tokenizer.save_pretrained(tmp_path / "private")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "private")
    processor = LlamaAdapterProcessor(image_processor, tokenizer, template="toy")
    processor.push_to_hub("owner/mine", token="none")
    files = stored.files[COMMITS["main"]]
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert "README.md" not in files
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    again = LlamaAdapterProcessor.from_pretrained("owner/mine", cache_dir=str(tmp_path / "cache"))
    assert again.to_dict() == processor.to_dict()
    assert (
        again("a red star")["input_ids"].tolist() == processor("a red star")["input_ids"].tolist()
    )


def test_adapters_load_by_name(
    build: Any, base: Any, stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = stored.files
    models = {"main": build("v2-chat"), "v1": build("v1", prompt_length=3)}
    for revision, model in models.items():
        model.save_pretrained(tmp_path / revision)
        content = {p.name: p.read_bytes() for p in (tmp_path / revision).iterdir()}
        files[COMMITS[revision]] = {**content, **{f"in/{n}": c for n, c in content.items()}}
    load = LlamaAdapterForConditionalGeneration.from_pretrained
    options = {"cache_dir": str(tmp_path / "cache"), "language_model": None}
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
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    options["language_model"] = base()
    again = load("owner/mine", local_files_only=True, **options)
    assert again.adapter_config == models["main"].adapter_config


def test_the_base_is_loaded_at_the_revision_that_was_recorded(
    base: Any, stored: Any, stir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for seed, revision in enumerate(COMMITS):
        base(seed=seed).save_pretrained(tmp_path / revision)
        for path in (tmp_path / revision).iterdir():
            stored.files[COMMITS[revision]][path.name] = path.read_bytes()
    with monkeypatch.context() as then:
        then.setitem(COMMITS, "main", COMMITS["v1"])
        model = LlamaAdapterForConditionalGeneration.from_base("owner/mine").eval()
    stir(model)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    stated = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base"]
    assert (stated["name_or_path"], stated["revision"]) == ("owner/mine", COMMITS["v1"])
    # present files of the name are on this machine, too, and are others
    assert Path(snapshot_download("owner/mine")).name == COMMITS["main"]
    load = LlamaAdapterForConditionalGeneration.from_pretrained
    assert torch.equal(load(tmp_path / "adapter")(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(input_ids=ids).logits, expected)
    model.config.base["name_or_path"] = "/no/such/base"
    model.save_pretrained(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="cannot load the base '/no/such/base'"):
        load(tmp_path / "gone")
    # a revision that is gone: the present files are tried, and told by their fingerprint
    del stored.files[COMMITS["v1"]]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="another base of the same shape"):
        load(tmp_path / "adapter")
