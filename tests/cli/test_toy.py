"""The built-in model through the command line, as a new user meets it."""

from __future__ import annotations

import json
import random

import pytest

from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import Scene, SceneObject


@pytest.fixture
def picture(tmp_path):
    star = SceneObject(shape="star", color="red", size="large", place="center")
    path = tmp_path / "scene.png"
    render(Scene(objects=(star,)), random.Random(5), size=256).save(path)
    return path


@pytest.mark.parametrize("prompt", ["What colour is the star?", "How many things are there?"])
def test_an_answer_as_json(cli, picture, prompt):
    done = cli("chat", "toy", "--image", picture, "--prompt", prompt, "--json")
    assert done.status == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"answer", "tokens", "seconds", "contexts"}
    assert answer["answer"]
    assert answer["contexts"] == []


def test_the_caption_expert_is_built_in(cli, picture):
    done = cli(
        "chat",
        "toy",
        "--image",
        picture,
        "--expert",
        "caption",
        "--prompt",
        "Where is it?",
        "--json",
    )
    assert done.status == 0, done.stderr
    (report,) = json.loads(done.stdout)["contexts"]
    assert report["expert"] == "caption"
    assert report["text"]


def test_info_knows_the_built_in_model(cli):
    done = cli("info", "toy", "--json")
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)


def test_a_folder_that_is_no_adapter_is_called_that(cli, tmp_path):
    refused = cli("chat", tmp_path, "--prompt", "hi")
    assert refused.status == 2
    assert "adapter_config.json is missing" in refused.stderr
