"""`--expert` in chat and eval, as users call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_ADAPTER_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "experts.sqlite"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.new("RGB", (16, 12), (200, 30, 30)).save(path)
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "stars.md").write_text("The star was bought in spring.\n")
    return folder


def test_findings_stand_under_contexts_and_are_remembered(
    cli: Cli, adapter_dir: Path, picture: Path, own_cache: Path
) -> None:
    arguments = ["--image", picture, "--prompt", "who?", "--max-new-tokens", 2, "--json"]
    options = ["--expert", f"caption={adapter_dir},max_new_tokens=3"]
    [first] = json.loads(cli("chat", adapter_dir, *arguments, *options).stdout)["contexts"]
    [again] = json.loads(cli("chat", adapter_dir, *arguments, *options).stdout)["contexts"]
    keys = {"expert", "text", "findings", "notes", "problem", "seconds", "cached"}
    assert set(first) == keys
    assert (first["cached"], again["cached"]) == (False, True)
    assert first["findings"] == again["findings"]
    own_cache.unlink()
    cli("chat", adapter_dir, *arguments, *options, "--no-expert-cache")
    assert not own_cache.exists()


def test_documents_answer_without_a_picture(cli: Cli, adapter_dir: Path, notes: Path) -> None:
    pytest.importorskip("bm25s")
    options = ["--expert", f"search={notes}", "--max-new-tokens", 2]
    done = cli("chat", adapter_dir, "--prompt", "When was the star bought?", *options)
    assert done.status == 0, done.stderr
    assert '[search] From the user\'s documents: "The star was bought in spring."' in done.stderr
    assert "note: index brought up to date: 1 of 1 files read" in done.stderr


def test_auto_shows_its_decision(cli: Cli, adapter_dir: Path, picture: Path) -> None:
    options = ["--expert", "auto", "--expert", f"caption={adapter_dir}", "--max-new-tokens", 2]
    done = cli("chat", adapter_dir, "--prompt", "who?", "--image", picture, *options, "--json")
    auto, caption = json.loads(done.stdout)["contexts"]
    assert "caption, since there is an image" in auto["notes"]
    assert caption["expert"] == "caption"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--expert", "oracle"], "unknown expert 'oracle'"),
        (["--expert", "search"], "needs a folder of texts"),
        (["--expert", "auto", "--expert-timeout", "0"], "--expert-timeout must be above 0"),
        (["--expert", "auto", "--expert-tokens", "0"], "--expert-tokens must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    arguments: list[str], complaint: str, cli: Cli, tmp_path: Path
) -> None:
    done = cli("chat", tmp_path / "no-model", "--prompt", "x", *arguments)
    assert done.status == 2
    assert complaint in done.stderr


def test_a_benchmark_runs_with_and_without_experts(
    cli: Cli, adapter_dir: Path, picture: Path, tmp_path: Path
) -> None:
    record = {"id": "1", "image": picture.name, "question": "who?", "answer": "a star"}
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps(record) + "\n")
    arguments = ["--model", adapter_dir, "--data", data, "--max-new-tokens", 2]
    judged = ["--judge", "exact-match", "--json"]
    plain, helped = tmp_path / "plain", tmp_path / "helped"
    done = cli("eval", "vqa", *arguments, "--out", plain, *judged)
    assert done.status == 0, done.stderr
    options = ["--expert", f"caption={adapter_dir},max_new_tokens=3"]
    done = cli("eval", "vqa", *arguments, "--out", helped, *judged, *options)
    assert done.status == 0, done.stderr
    assert "contexts" not in json.loads((plain / "predictions.jsonl").read_text())
    [[report]] = json.loads((helped / "predictions.jsonl").read_text())["contexts"]
    assert report["expert"] == "caption"
    manifest = json.loads((helped / "manifest.json").read_text())
    assert manifest["model"]["experts"]["named"] == [options[1]]
    assert manifest["model"]["experts"]["versions"]["caption"]
    refused = cli("eval", "vqa", *arguments, "--out", plain, *judged, *options)
    assert refused.status == 2
    assert "holds another run" in refused.stderr
