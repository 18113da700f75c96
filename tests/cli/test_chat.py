from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Cli = Callable[..., Any]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.new("RGB", (16, 12), (200, 30, 30)).save(path)
    return path


def test_json_is_one_object_and_nothing_else(cli: Cli, adapter_dir: Path, picture: Path) -> None:
    arguments = ["--prompt", "what is this?", "--image", picture, "--max-new-tokens", 4, "--json"]
    done = cli("chat", adapter_dir, *arguments)
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"answer", "tokens", "seconds", "contexts"}
    assert 1 <= result["tokens"] <= 4
    assert result["contexts"] == []
    again = json.loads(cli("chat", adapter_dir, *arguments).stdout)
    assert again["answer"] == result["answer"]


def test_an_answer_in_words_is_the_same(cli: Cli, adapter_dir: Path) -> None:
    arguments = ["chat", adapter_dir, "--prompt", "who?", "--max-new-tokens", 3]
    answer = json.loads(cli(*arguments, "--json").stdout)["answer"]
    assert cli(*arguments).stdout.strip() == answer


def test_samples_repeat_with_their_seed(cli: Cli, adapter_dir: Path) -> None:
    def answer(seed: int) -> str:
        options = ["--temperature", 2.0, "--seed", seed, "--max-new-tokens", 12, "--json"]
        return json.loads(cli("chat", adapter_dir, "--prompt", "who?", *options).stdout)["answer"]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_the_caption_expert_is_heard_and_shown(cli: Cli, adapter_dir: Path, picture: Path) -> None:
    options = ["--expert", f"caption={adapter_dir}", "--max-new-tokens", 2]
    done = cli("chat", adapter_dir, "--prompt", "who?", "--image", picture, *options, "--json")
    [report] = json.loads(done.stdout)["contexts"]
    assert report["expert"] == "caption"
    assert report["findings"][0]["kind"] == "caption"


def test_a_conversation_goes_on_after_a_mistake(cli: Cli, adapter_dir: Path, picture: Path) -> None:
    typed = (
        f"who?\n/image {picture}\nand this?\n/image nothing.png\n/reset\n/what\n\nwho?\n/quit\nlost"
    )
    done = cli("chat", adapter_dir, "--max-new-tokens", 2, stdin=typed)
    assert done.status == 0
    assert done.stdout.count("\n") == 3
    assert "error: cannot read image nothing.png" in done.stderr
    assert "unknown command /what" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompt", "  "], "--prompt is empty"),
        (["--prompt", "x", "--image", "nothing.png"], "cannot read image nothing.png"),
        (["--prompt", "x", "--expert", "oracle"], "unknown expert 'oracle'"),
        (["--prompt", "x", "--expert", "caption"], "--expert caption=DIR"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0"),
        (["--prompt", "x", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--prompt", "star " * 2000], "the context holds 1024"),
        (["--prompt", "x", "--frames", "3"], "--frames has no effect: it needs --video"),
        (["--prompt", "x", "--expert-tokens", "9"], "--expert-tokens has no effect: it needs"),
        (["--prompt", "x", "--no-expert-cache"], "--no-expert-cache has no effect: it needs"),
        (["--prompt", "x", "--url", "http://x", "--device", "cpu"], "--device has no effect: a"),
        (["--prompt", "x", "--url", "http://x", "--frames", "3"], "--frames has no effect: a"),
        (["--prompt", "x", "--image", "~nobody-here/a.png"], "cannot read image ~nobody-here"),
        (["--prompt", "x", "--seed", str(2**63)], "seed must be"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], complaint: str, cli: Cli, adapter_dir: Path
) -> None:
    done = cli("chat", adapter_dir, *arguments, "--json")
    assert (done.status, done.stdout) == (2, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert complaint in last


@pytest.mark.parametrize("server", [[], ["--url", "http://127.0.0.1:9"]])
def test_an_image_that_is_too_large_is_refused_in_our_words_alone(
    server: list[str], cli: Cli, adapter_dir: Path, tmp_path: Path
) -> None:
    """PIL warns of it, too, which is an error in these tests."""
    Image.new("1", (12_000, 8_000)).save(tmp_path / "huge.png")
    done = cli("chat", adapter_dir, "--prompt", "x", "--image", tmp_path / "huge.png", *server)
    assert done.status == 2
    assert "has 12000x8000 = 96000000 pixels; at most 89000000 are read\n" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_image_is_refused_where_the_adapter_is_damaged(
    cli: Cli, adapter_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter_dir, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    done = cli("chat", broken, "--prompt", "x")
    assert done.status == 2
    assert "adapter_model.safetensors is damaged" in done.stderr


def test_a_video_is_one_picture_of_several_frames(
    cli: Cli, adapter_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    clip = tmp_path / "clip.gif"
    frames = [Image.new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=100)
    asked = ("--prompt", "what?", "--max-new-tokens", "2", "--json")
    done = cli("chat", adapter_dir, "--video", clip, "--frames", "3", *asked)
    assert done.status == 0
    assert set(json.loads(done.stdout)) == {"answer", "tokens", "seconds", "contexts"}
    refused = cli("chat", adapter_dir, "--video", tmp_path / "gone.mp4", *asked)
    assert (refused.status, refused.stdout) == (2, "")
    assert "gone.mp4: cannot be opened" in refused.stderr


def test_a_damaged_video_is_said(cli: Cli, adapter_dir: Path, tmp_path: Path) -> None:
    clip = damaged_clip(tmp_path)
    asked = ("--video", clip, "--prompt", "what?", "--max-new-tokens", "2")
    complaint = re.compile(r"half\.mp4: \d of 8 frames cannot be decoded")
    done = cli("chat", adapter_dir, *asked)
    assert done.status == 0
    assert complaint.search(done.stderr)
    [note] = json.loads(cli("chat", adapter_dir, *asked, "--json").stdout)["notes"]
    assert complaint.search(note)


def damaged_clip(folder: Path) -> Path:
    """A video whose second half is missing."""
    av = pytest.importorskip("av")
    whole = folder / "whole.mp4"
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(100):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (2 * i, 0, 0)))
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    half = folder / "half.mp4"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return half
