"""Frames of a video: seeking to eight moments against decoding all of it, and odd files.

python -m benchmarks.video                        # speed and the table of damaged files
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from benchmarks.measuring import report
from llama_adapter.errors import VideoError
from llama_adapter.processing.video import load_video


def make(
    path: Path,
    *,
    seconds: float,
    size: tuple[int, int],
    rate: int = 30,
    codec: str = "libx264",
    gop: int | None = None,
    faststart: bool = False,
) -> Path:
    """A clip of moving noise that compresses like film: a drifting gradient with grain."""
    options = {"movflags": "faststart"} if faststart else {}
    rng = np.random.default_rng(0)
    width, height = size
    grain = rng.integers(0, 24, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 200, width, dtype=np.uint8)[None, :, None]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", **({} if gop is None else {"g": str(gop)})}
        for i in range(max(1, round(seconds * rate))):
            pixels = np.roll(ramp, 3 * i, axis=1) + np.roll(grain, i, axis=0)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def describe(path: Path) -> str:
    """Length, size, codec and how far apart key frames are."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        keys = sum(packet.is_keyframe for packet in container.demux(stream) if packet.size)
        seconds = float(stream.duration * stream.time_base)
        return (
            f"{seconds:.0f} s, {context.width}x{context.height}, {context.name}, a key frame every "
            f"{seconds / max(1, keys):.1f} s"
        )


def decode_all(path: Path) -> int:
    """Decode every frame, as reading without seeking does."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        return sum(1 for _ in container.decode(video=0))


def decode_way(path: Path, *, frames: int = 8) -> int:
    """Decode what leads from a key frame to each moment and nothing more: the least there is to do.

    Returns how many frames that is.
    """
    count = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        base, seconds = stream.time_base, float(stream.duration * stream.time_base)
        for moment in (seconds * (i + 0.5) / frames for i in range(frames)):
            container.seek(int(moment / base), stream=stream)
            for frame in container.decode(stream):
                count += 1
                if frame.time >= moment:
                    frame.to_image()
                    break
    return count


def timed(action: Callable[[], object], *, times: int) -> dict[str, float]:
    """The median of several runs, in seconds: by the clock, and of processor time.

    Processor time does not count what other processes of a busy machine took.
    """
    walls, cpus = [], []
    for _ in range(times):
        started, spent = time.perf_counter(), time.process_time()
        action()
        walls.append(time.perf_counter() - started)
        cpus.append(time.process_time() - spent)
    return {
        "wall_s": round(statistics.median(walls), 3),
        "cpu_s": round(statistics.median(cpus), 3),
    }


def speed(clip: Path, *, times: int) -> dict[str, object]:
    """Seconds for one clip, and how they relate."""
    seek = timed(lambda: load_video(clip, frames=8), times=times)
    way = timed(lambda: decode_way(clip), times=times)
    whole = timed(lambda: decode_all(clip), times=1)
    return {
        "clip": describe(clip),
        "seek_8_frames": seek,
        "frames_on_the_way": decode_way(clip),
        "bare_decoding_of_the_way": way,
        "decode_all": whole,
        "seek_over_bare_decoding": round(seek["cpu_s"] / way["cpu_s"], 2),
        "seek_over_decode_all": round(seek["cpu_s"] / whole["cpu_s"], 3),
    }


def odd_files(folder: Path) -> dict[str, Path]:
    """Damaged and unusual files by what is odd about them."""
    small = (160, 120)
    whole = make(folder / "whole.mp4", seconds=10, size=small, faststart=True).read_bytes()
    plain = make(folder / "plain.mp4", seconds=10, size=small).read_bytes()
    contents = {
        "truncated, header first": ("half.mp4", whole[: len(whole) // 2]),
        "truncated, header last": ("headless.mp4", plain[: len(plain) // 2]),
        "empty": ("empty.mp4", b""),
        "text": ("text.mp4", b"these are only words\n" * 100),
        "zeros in the middle": (
            "holes.mp4",
            whole[: len(whole) // 2] + bytes(3000) + whole[len(whole) // 2 + 3000 :],
        ),
        "wrong extension (mp4 named .avi)": ("renamed.avi", whole),
    }
    files = {}
    for what, (name, content) in contents.items():
        files[what] = folder / name
        files[what].write_bytes(content)
    files["audio only"] = _audio(folder / "audio.mp4")
    files["one frame"] = make(folder / "one.mp4", seconds=0.01, size=small)
    files["animated GIF"] = _gif(folder / "moving.gif")
    files["10 minutes"] = make(folder / "long.mp4", seconds=600, size=small, rate=10)
    files["missing"] = folder / "gone.mp4"
    return files


def _audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(50):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
            )
            frame.rate, frame.pts, frame.time_base = 16000, i * 1024, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _gif(path: Path) -> Path:
    images = [Image.new("RGB", (64, 64), (20 * i, 0, 0)) for i in range(10)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    return path


def behavior(path: Path) -> str:
    """What happens to a file, in a few words."""
    started = time.perf_counter()
    try:
        video = load_video(path)
    except VideoError as error:
        return f"refused: {str(error).replace(str(path.parent) + '/', '')}"
    stand_ins = f", {video.repeated} of 8 stand in for what is missing" if video.is_damaged else ""
    distinct = len(set(video.times))
    return (
        f"read: 8 frames, {distinct} distinct, of {video.seconds:.1f} s{stand_ins} "
        f"({time.perf_counter() - started:.2f} s)"
    )


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the 720p clip")
    parser.add_argument(
        "--clip", type=Path, action="append", help="measure these instead of making two"
    )
    parser.add_argument("--times", type=int, default=5, help="runs to take the median of")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds, size = arguments.seconds, (1280, 720)
        clips = arguments.clip or [
            make(folder / f"{gop}.mp4", seconds=seconds, size=size, gop=gop) for gop in (30, 250)
        ]
        result: dict[str, object] = {
            "speed": [speed(clip, times=arguments.times) for clip in clips],
            "odd_files": {what: behavior(path) for what, path in odd_files(folder).items()},
        }
        arguments.clip = [clip.name for clip in clips]
    report("video", result, targets={}, options=arguments)


if __name__ == "__main__":
    main()
