"""Damaged videos: as many frames as were asked for, or one line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tests.fuzzing import Campaign, mutated_bytes

from llama_adapter.errors import VideoError
from llama_adapter.processing.video import Video, load_video

av = pytest.importorskip("av")

KINDS = {"mp4": "mpeg4", "avi": "mpeg4", "mkv": "libx264", "webm": "libvpx", "ts": "mpeg4"}


def clip(path: Path, codec: str) -> bytes:
    from PIL import Image

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 5
        for i in range(30):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (8 * i, 99, 0)))
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path.read_bytes()


def test_damaged_videos(tmp_path: Path) -> None:
    whole = [clip(tmp_path / f"a.{kind}", codec) for kind, codec in KINDS.items()]

    def is_sound(video: Video) -> None:
        assert len(video.frames) == len(video.times) == 4
        assert 0 <= video.repeated <= 4
        assert bool(video.note) == video.is_damaged
        assert all(frame.mode == "RGB" for frame in video.frames)

    campaign = Campaign("videos", inputs=60)
    for number, rng in enumerate(campaign):
        content = mutated_bytes(whole[number % len(whole)], rng)
        read = partial(load_video, content, frames=4)
        campaign.attempt(read, accepted=is_sound, refusals=VideoError)
    assert campaign.counts["accepted"] > 5
