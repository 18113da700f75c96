"""Videos that are made here, whole and damaged: each becomes N frames or a clear refusal."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llama_adapter.conversation import ImageRef
from llama_adapter.errors import VideoError
from llama_adapter.processing.prompts import frames_of
from llama_adapter.processing.video import load_video

av = pytest.importorskip("av")

REAL = Path(__file__).resolve().parents[3] / "shared" / "real" / "video" / "clips"


def shade(index: int, count: int) -> int:
    return 20 + round(200 * index / max(1, count - 1))


def grey_frames(count: int, size: tuple[int, int] = (64, 48)) -> Iterator[np.ndarray]:
    """Frames that grow brighter, so that a frame tells its time."""
    for i in range(count):
        yield np.full((size[1], size[0], 3), shade(i, count), dtype=np.uint8)


def encode(
    path: Path,
    *,
    count: int = 40,
    rate: int = 10,
    codec: str = "mpeg4",
    times: list[int] | None = None,
    size: tuple[int, int] = (64, 48),
    gop: int = 10,
    options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if codec != "gif":
            stream.codec_context.gop_size = gop
        for i, pixels in enumerate(grey_frames(count, size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = times[i] if times else i * 1000 // rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def brightness(frame: Image.Image) -> float:
    return float(np.asarray(frame.convert("L")).mean())


def shades(path: Path, frames: int) -> list[float]:
    return [brightness(frame) for frame in load_video(path, frames=frames).frames]


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "mov"])
def test_frames_come_from_the_middle_of_equal_segments(tmp_path: Path, suffix: str) -> None:
    video = load_video(encode(tmp_path / f"a.{suffix}"), frames=4)
    assert video.seconds == pytest.approx(4, abs=0.11)
    assert video.times == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.11)
    assert [brightness(f) for f in video.frames] == pytest.approx(
        [shade(i, 40) for i in (5, 15, 25, 35)], abs=6
    )
    assert {f.mode for f in video.frames} == {"RGB"}
    assert not video.is_damaged


def test_more_frames_than_the_video_has_repeat(tmp_path: Path) -> None:
    video = load_video(encode(tmp_path / "a.mp4", count=5), frames=20)
    assert len(video.frames) == 20
    assert len(set(video.times)) == 5
    assert not video.is_damaged


def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path) -> None:
    # nine frames in the first second, one for the next three
    times = [*range(0, 900, 100), 1000, 4000]
    path = encode(tmp_path / "a.mkv", count=11, times=times)
    assert load_video(path, frames=4).times == pytest.approx([0.5, 1.0, 1.0, 1.0], abs=0.06)


def test_gif(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    pictures = [Image.fromarray(pixels) for pixels in grey_frames(8)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    found = shades(path, 4)
    assert found == sorted(found)
    assert len(set(found)) == 4


def test_rotation_metadata_is_applied(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    # a quarter turn clockwise, in the header's 16.16 and 2.30 fixed point
    turn = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    content[matrix : matrix + 36] = turn
    assert load_video(path, frames=1).frames[0].size == (64, 48)
    assert load_video(bytes(content), frames=1).frames[0].size == (48, 64)


def test_seeking_and_decoding_on_give_the_same_frames(tmp_path: Path) -> None:
    often, rarely = (encode(tmp_path / f"{gop}.mp4", count=200, gop=gop) for gop in (5, 200))
    for frames in (3, 8, 50):
        assert load_video(often, frames=frames).times == load_video(rarely, frames=frames).times


def test_bytes_and_files_give_the_same(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4")
    from_bytes = load_video(path.read_bytes(), frames=3)
    assert [*map(brightness, from_bytes.frames)] == shades(path, 3)


def test_frames_are_one_image_of_a_conversation(tmp_path: Path) -> None:
    ref = load_video(encode(tmp_path / "a.mp4"), frames=3).as_image_ref()
    assert len(ref.source) == 3
    assert ref.name.endswith("a.mp4")


def test_the_processor_takes_videos(
    tmp_path: Path, toy_tokenizer: Any, image_processor: Any
) -> None:
    from llama_adapter import LlamaAdapterProcessor

    path = encode(tmp_path / "a.mp4")
    processor = LlamaAdapterProcessor(image_processor, toy_tokenizer, template="toy")
    part = {"type": "video", "video": str(path)}
    message = {"role": "user", "content": [part, {"type": "text", "text": "what happens?"}]}
    assert processor([[message]])["pixel_values"].shape == (1, 8, 3, 8, 8)
    three = load_video(path, frames=3).as_image_ref()
    assert processor("what happens?", images=[three])["pixel_values"].shape == (1, 3, 3, 8, 8)


# Damaged and odd files.


def truncated(path: Path) -> bytes:
    """The first half of a file whose header says that all of it is there."""
    encode(path, count=100, options={"movflags": "faststart"})
    return path.read_bytes()[: path.stat().st_size // 2]


def test_truncated_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    video = load_video(truncated(tmp_path / "a.mp4"), frames=8)
    assert video.is_damaged
    assert 0 < video.repeated < 8
    assert len(video.frames) == 8
    assert video.note.startswith(f"{video.repeated} of 8 frames cannot be decoded")
    assert video.as_image_ref().note == video.note


def headless(path: Path) -> bytes:
    encode(path, count=100)
    return path.read_bytes()[: path.stat().st_size // 2]


def audio_only(path: Path) -> bytes:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(20):
            samples = np.zeros((1, 1024), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = 16000, i * 1024, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def playlist(path: Path) -> bytes:
    encode(path.with_name("secret.ts"), count=10)
    return f"#EXTM3U\n#EXTINF:1,\n{path.with_name('secret.ts')}\n#EXT-X-ENDLIST\n".encode()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: b"", "is empty"),
        (headless, "cannot be read as a video"),
        (audio_only, "has no video stream, only audio"),
        (
            lambda _: b"just some words\n" * 50,
            "cannot be read as a video|has no video stream|not a video",
        ),
        (lambda _: bytes(range(256)) * 40, "cannot be read as a video"),
        (playlist, "cannot be read as a video|not a video"),
    ],
    ids=["empty", "no header", "audio only", "text", "noise", "playlist"],
)
def test_refused(tmp_path: Path, make: Callable[[Path], bytes], message: str) -> None:
    content = make(tmp_path / "made.mp4")
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=message) as refusal:
        load_video(path)
    assert "clip.mp4" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_broken_middle_is_skipped(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", count=100, gop=5)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    video = load_video(bytes(content), frames=8)
    assert len(video.frames) == 8


@pytest.mark.parametrize("place", [1500, 2000])
def test_a_frame_in_the_place_of_a_lost_one_is_counted(tmp_path: Path, place: int) -> None:
    path = encode(tmp_path / "a.mp4", count=100, gop=5, options={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    place += content.index(b"mdat")
    content[place : place + 600] = bytes(600)
    whole, damaged = load_video(path), load_video(bytes(content))
    wrong = sum(abs(a - b) > 0.3 for a, b in zip(whole.times, damaged.times, strict=True))
    assert damaged.repeated >= wrong > 0


def test_one_frame(tmp_path: Path) -> None:
    video = load_video(encode(tmp_path / "a.mp4", count=1), frames=8)
    assert len(video.frames) == 8
    assert len(set(video.times)) == 1


def test_wrong_extension_goes_by_content(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv")
    assert shades(path.rename(tmp_path / "a.txt"), 3) == sorted(shades(tmp_path / "a.txt", 3))
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 0, 0)).save(buffer, "JPEG")
    assert len(load_video(buffer.getvalue(), frames=2).frames) == 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"gone\.mp4: cannot be opened"):
        load_video(tmp_path / "gone.mp4")


def test_limits(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="lasts 4 s, the limit is 3 s"):
        load_video(path, max_seconds=3)
    with pytest.raises(VideoError, match="64x48 pixels, limit 1000"):
        load_video(path, max_pixels=1000)
    with pytest.raises(VideoError, match="frames must be from 1"):
        load_video(path, frames=0)


def test_ten_minutes_hold_little_memory(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", count=6000, size=(128, 96), gop=50)
    tracemalloc.start()
    started = time.process_time()
    video = load_video(path)
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert video.seconds == pytest.approx(600, abs=1)
    assert seconds < 3
    assert peak < 10_000_000


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the clips in ../shared/real")
def test_real_clips() -> None:
    clips = [p for p in sorted(REAL.iterdir()) if p.suffix in {".mp4", ".avi"}]
    assert len(clips) == 6
    for clip in clips:
        video = load_video(clip)
        assert len(set(video.times)) == 8
        assert not video.is_damaged


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match=r"pipe\.mp4: cannot be opened .it is not a regular file"):
        load_video(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match=r"zero: cannot be opened .it is not a regular file"):
        load_video("/dev/zero")


def test_zeros_without_end_are_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with path.open("wb") as file:
        file.truncate(6 << 30)
    with pytest.raises(VideoError, match="cannot be read as a video"):
        load_video(path)


def test_all_frames_together_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4")
    monkeypatch.setattr("llama_adapter.processing.video.MAX_VIDEO_PIXELS", 5 * 64 * 48)
    assert len(load_video(path, frames=5).frames) == 5
    with pytest.raises(VideoError, match="6 frames of 64x48 have 18432 pixels; at most 15360"):
        load_video(path, frames=6)


def test_a_processor_says_that_a_video_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "half.mp4"
    path.write_bytes(truncated(tmp_path / "a.mp4"))
    with pytest.warns(UserWarning, match=r"half\.mp4: \d of 8 frames cannot be decoded"):
        assert len(frames_of(ImageRef.of(path))) == 8
