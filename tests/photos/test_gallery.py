"""MODEL `photos` and its photographs, on a tiny base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter.cli.models import load
from llama_adapter.home import home
from llama_adapter.photos.gallery import EXAMPLES, is_right, photographs
from llama_adapter.processing.images import load_image


def test_the_photographs_are_small_and_credited() -> None:
    found = photographs()
    assert len(found) == 8
    assert {one.path for one in found} == set(EXAMPLES.glob("*.jpg"))
    for one in found:
        assert one.path.stat().st_size <= 25_000
        assert min(load_image(one.path).size) <= 256
        assert all((one.title, one.photographer, one.license, one.source))
        assert 2 <= len(one.questions) <= 3


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        ("A cat.", ("cat",), True),
        ("Several cats", ("cat",), False),
        ("Yes, it is.", ("yes",), True),
        ("It says yes", ("yes",), False),
        ("No.", ("no",), True),
        ("there are no people", ("zero", "no people"), True),
        ("", ("no",), False),
    ],
)
def test_an_answer_is_right_when_it_says_the_word(
    said: str, expected: tuple[str, ...], right: bool
) -> None:
    assert is_right(said, expected) is right


def test_photos_is_a_model(cli: Callable[..., Any], photos_model: Path) -> None:
    image = EXAMPLES / "cat.jpg"
    arguments = ("--image", image, "--prompt", "What animal is this?", "--max-new-tokens", 4)
    done = cli("chat", "photos", *arguments, "--json")
    assert done.status == 0, done.stderr
    with_caption = cli("chat", "photos", *arguments, "--expert", "caption", "--json")
    [report] = json.loads(with_caption.stdout)["contexts"]
    assert (report["expert"], report["problem"]) == ("caption", None)
    assert cli("info", "photos", "--json").status == 0


def test_half_precision_is_stored_and_not_computed_with(photos_model: Path) -> None:
    loaded, _ = load("photos", device="cpu")
    assert loaded.language_model.dtype == torch.float32
    stored = json.loads((home() / "photos/base/config.json").read_text())["dtype"]
    assert stored == "float16"


def test_without_its_base_one_line_names_the_command(
    cli: Callable[..., Any], photos_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_ADAPTER_HOME", str(tmp_path))
    refused = cli("chat", "photos", "--prompt", "hi")
    assert (refused.status, refused.stderr.count("\n")) == (2, 1)
    assert "run: llama-adapter get photos" in refused.stderr


def test_the_page_of_photographs_holds_all_it_shows(
    cli: Callable[..., Any], photos_model: Path, tmp_path: Path
) -> None:
    done = cli("demo", "--photos-only", "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.stderr
    cards = json.loads(done.stdout)["photographs"]["cards"]
    assert [card["photograph"]["path"] for card in cards] == [p.path.name for p in photographs()]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8
    assert not re.search(r'(src|href)="(?!data:|https://(flic|www\.flickr)\.)', page)
    for card in cards:
        assert f"Photograph: {card['photograph']['photographer']}" in page
        for answer in card["answers"]:
            assert answer["is_right"] == is_right(answer["answer"], tuple(answer["expected"]))
    assert "miniature world" not in page


def test_what_keeps_photographs_from_being_shown_is_one_line(
    cli: Callable[..., Any], photos_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_ADAPTER_HOME", str(tmp_path))
    refused = cli("demo", "--photos-only", "--out", tmp_path / "out")
    assert (refused.status, refused.stderr.count("\n")) == (2, 1)
    assert "no photographs can be shown" in refused.stderr
    assert "llama-adapter get photos" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_miniature_world_is_shown_without_them(
    cli: Callable[..., Any], photos_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_ADAPTER_HOME", str(tmp_path))
    shown: dict[str, Any] = {}

    def run_demo(out: Path, *_: Any, **given: Any) -> dict[str, Any]:
        shown.update(given)
        return {}

    monkeypatch.setattr("llama_adapter.miniature.demo.run_demo", run_demo)
    done = cli("demo", "--quick", "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.stderr
    assert "photographs are left out" in done.stderr
    assert "llama-adapter get photos" in shown["photographs"].missing
