"""Reading videos: N frames from the middle of N equal segments, found by seeking.

At most one undecoded stretch of the file and the N frames are held at a time. Limits are checked
on the header. What is damaged is read as far as it can be, and the result says so.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from llama_adapter.conversation import ImageRef
from llama_adapter.errors import MissingDependencyError, VideoError
from llama_adapter.files import open_regular
from llama_adapter.processing.images import MAX_PIXELS

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DEFAULT_FRAMES = 8
"""Frames that a model gets of a video; the published evaluations took up to 100."""
MAX_FRAMES = 512
MAX_SECONDS = 4 * 3600.0
"""Longer videos are refused."""
MAX_VIDEO_PIXELS = 2_000_000_000
"""Pixels of all frames together, 6 GB; for more, fewer frames must be taken."""
VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()  # noqa: SIM905
)
"""What to look for on disk; reading goes by content."""

_SLACK = 0.5  # seconds by which a last frame may be shown longer than it says
_NEAR = 1.0  # seconds before a wanted moment from which every frame is decoded
# Not videos but lists of other files, or text drawn as images.
_REFUSED_FORMATS = frozenset(("hls", "dash", "concat", "concatf", "imf", "tty", "webvtt"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Frames of a video, and where they come from."""

    frames: tuple[Image.Image, ...]
    """RGB, upright, as many as were asked for."""
    times: tuple[float, ...]
    """Seconds from the start at which each frame is shown."""
    seconds: float
    """Length of the video."""
    name: str
    repeated: int = 0
    """Frames that replace a moment that could not be decoded."""

    @property
    def is_damaged(self) -> bool:
        """Whether some moment could not be decoded."""
        return self.repeated > 0

    @property
    def note(self) -> str:
        """What a reader of an answer should know; nothing where all could be decoded."""
        if not self.is_damaged:
            return ""
        return (
            f"{self.repeated} of {len(self.frames)} frames cannot be decoded; others replace them"
        )

    def as_image_ref(self) -> ImageRef:
        """All frames as one set of visual prompts, for a conversation."""
        return ImageRef(source=self.frames, name=self.name, note=self.note)


def load_video(
    source: Path | str | bytes,
    *,
    frames: int = DEFAULT_FRAMES,
    name: str | None = None,
    max_seconds: float = MAX_SECONDS,
    max_pixels: int = MAX_PIXELS,
    until: Callable[[], float] = lambda: math.inf,
) -> Video:
    """`frames` images from a file or encoded bytes, in any container that FFmpeg reads.

    Each is the frame on show in the middle of one of as many equal segments, so variable frame
    rates are sampled by time; rotation metadata is applied. A video with fewer frames repeats
    them. Raises `VideoError` naming the file for what cannot be read, is over a limit, or is not
    decoded by `until`, in the time of `time.monotonic`: asked all the while, for it may change.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise VideoError(f"frames must be from 1 to {MAX_FRAMES}, got {frames}")
    av = import_av()
    label = name or (f"{len(source)} bytes of video" if isinstance(source, bytes) else str(source))
    try:
        with _open_file(source, label) as file, _open_container(av, file, label) as container:
            stream = _video_stream(container, label, max_pixels=max_pixels, frames=frames)
            seconds = _length(av, container, stream)
            if seconds > max_seconds:
                raise VideoError(
                    f"{label}: lasts {seconds:.0f} s, the limit is {max_seconds:.0f} s"
                )
            targets = [seconds * (i + 0.5) / frames for i in range(frames)]
            reader = _Reader(av, container, stream, label, until=until)
            return _sample(reader, targets, seconds=seconds, name=label, max_pixels=max_pixels)
    except av.error.FFmpegError as error:
        raise VideoError(f"{label}: cannot be read as a video ({error.strerror})") from error
    except (MemoryError, OverflowError, ValueError) as error:
        raise VideoError(f"{label}: cannot be read as a video ({error})") from error


def is_video(source: object) -> bool:
    """Whether a path is a video's by its name; a GIF in an image's place is an image."""
    return isinstance(source, Path) and source.suffix.lower() in VIDEO_SUFFIXES - {".gif"}


def import_av() -> Any:
    """PyAV, or a message that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("av", extra="video", purpose="reading videos") from error
    # FFmpeg's own complaints about a damaged file would go to stderr one by one
    av.logging.set_level(av.logging.PANIC)
    return av


def _open_file(source: Path | str | bytes, label: str) -> Any:
    if isinstance(source, bytes):
        if not source:
            raise VideoError(f"{label}: is empty")
        return io.BytesIO(source)
    try:
        file = open_regular(Path(source), error=VideoError, name=label)
    except VideoError as error:
        reason = str(error).removeprefix(f"cannot read {label}: ")
        raise VideoError(f"{label}: cannot be opened ({reason})") from error
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise VideoError(f"{label}: is empty")
    return file


def _open_container(av: Any, file: Any, label: str) -> InputContainer:
    # A playlist in disguise must reach neither the network nor other files.
    container: InputContainer = av.open(file, options={"protocol_whitelist": "none"})
    kinds = set(container.format.name.split(","))
    if kinds & _REFUSED_FORMATS:
        container.close()
        raise VideoError(f"{label}: is of format {container.format.name}, not a video")
    return container


def _video_stream(
    container: InputContainer, label: str, *, max_pixels: int, frames: int
) -> VideoStream:
    # a cover image in a music file is a video stream to FFmpeg
    streams = [s for s in container.streams.video if not _is_cover(s)]
    if not streams:
        found = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise VideoError(f"{label}: has no video stream, only {found}")
    stream = streams[0]
    if stream.codec_context is None:  # whatever PyAV's types say
        raise VideoError(f"{label}: is of a codec that is not known here")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not width or not height:
        raise VideoError(f"{label}: does not say how large its frames are")
    if width * height > max_pixels:
        raise VideoError(f"{label}: frames have {width}x{height} pixels, limit {max_pixels}")
    if frames * width * height > MAX_VIDEO_PIXELS:
        raise VideoError(
            f"{label}: {frames} frames of {width}x{height} have {frames * width * height} pixels; "
            f"at most {MAX_VIDEO_PIXELS} are held, take fewer frames"
        )
    stream.thread_type = "AUTO"
    return stream


def _is_cover(stream: VideoStream) -> bool:
    return "attached_pic" in str(stream.disposition)


def _length(av: Any, container: InputContainer, stream: VideoStream) -> float:
    """Seconds, from the stream, the container or, where neither says, the packets."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return float(container.duration / av.time_base)
    if not stream.time_base:
        return 0.0
    last = first = None
    try:
        for packet in container.demux(stream):
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                end = packet.pts + (packet.duration or 0)
                last = end if last is None else max(last, end)
    except av.error.FFmpegError:
        pass  # as far as it can be read
    if first is None or last is None:
        return 0.0
    return float((last - first) * stream.time_base)


class _Reader:
    """Frames at given times, decoding on where the next one is near and seeking where it is far."""

    def __init__(
        self,
        av: Any,
        container: InputContainer,
        stream: VideoStream,
        label: str,
        *,
        until: Callable[[], float],
    ) -> None:
        self._label, self._until = label, until
        self._av = av
        self._container = container
        self._stream = stream
        self._start = float((stream.start_time or 0) * (stream.time_base or 0))
        self._frames: Iterator[VideoFrame] = iter(())
        self._shown: VideoFrame | None = None
        self._next: VideoFrame | None = None
        self._reach = 0.0  # farthest that decoding from a key frame had to go
        self._wanted = 0.0
        self._lost: set[float] = set()  # moments of packets not decoded since the last seek

    def at(self, seconds: float) -> tuple[VideoFrame | None, bool]:
        """The frame on show at that time, and whether it replaces one that is missing."""
        self._wanted = seconds
        if self._next is None or seconds - self.time(self._next) > max(self._reach, 1.0):
            self._seek(seconds)
        while self._next is not None and self.time(self._next) <= seconds:
            self._shown, self._next = self._next, self._decode()
        shown = self._shown or self._next
        if shown is None:
            return None, True
        is_past_the_end = self._next is None and seconds > self._end(shown) + _SLACK
        since = -math.inf if self._shown is None else self.time(shown)
        is_stale = any(since < lost <= seconds for lost in self._lost)
        return shown, is_past_the_end or is_stale or shown.is_corrupt

    def _seek(self, seconds: float) -> None:
        stream = self._stream
        self._shown = None
        self._lost.clear()
        base = float(stream.time_base or 0)
        try:
            if base:
                offset = math.floor((seconds + self._start) / base)
                self._container.seek(offset, stream=stream, backward=True)
        except self._av.error.FFmpegError:
            pass  # some formats cannot seek: decoding goes on from where it is
        self._frames = self._decoded()
        self._next = self._decode()
        if self._next is not None:
            self._reach = max(self._reach, seconds - self.time(self._next))

    def _decode(self) -> VideoFrame | None:
        return next(self._frames, None)

    def _decoded(self) -> Iterator[VideoFrame]:
        """Frames from here on; far from the wanted moment only those that others build on."""
        stream, base = self._stream, float(self._stream.time_base or 0)
        try:
            for packet in self._container.demux(stream):
                # a few bytes may be minutes of large frames, each of which builds on the last
                if time.monotonic() >= self._until():
                    raise VideoError(f"{self._label}: takes too long to decode")
                end = (packet.pts or 0) + (packet.duration or 0)
                is_far = packet.pts is not None and end * base - self._start < self._wanted - _NEAR
                stream.codec_context.skip_frame = "NONREF" if is_far else "DEFAULT"
                try:
                    yield from packet.decode()
                except self._av.error.InvalidDataError:
                    # a damaged packet; the decoder picks up at a later one
                    self._lost.add((packet.pts or packet.dts or 0) * base - self._start)
        except self._av.error.FFmpegError:
            return

    def _end(self, frame: VideoFrame) -> float:
        base = float(self._stream.time_base or 0)
        rate = float(self._stream.average_rate or 0)
        return self.time(frame) + ((frame.duration or 0) * base or (1 / rate if rate else 0.0))

    def time(self, frame: VideoFrame) -> float:
        """Seconds from the start of the video."""
        if frame.time is None:
            return 0.0
        return float(frame.time) - self._start


def _sample(
    reader: _Reader, targets: list[float], *, seconds: float, name: str, max_pixels: int
) -> Video:
    images: list[Image.Image | None] = []
    times: list[float] = []
    last: VideoFrame | None = None
    repeated = 0
    for target in targets:
        frame, is_substitute = reader.at(target)
        repeated += is_substitute
        if frame is None:
            images.append(None)
            times.append(target)
            continue
        if frame.width * frame.height > max_pixels:  # it may change behind its header
            raise VideoError(f"{name}: a frame has more than {max_pixels:,} pixels")
        images.append(images[-1] if frame is last else _upright(frame))
        times.append(max(0.0, reader.time(frame)))
        last = frame
    found = [i for i, image in enumerate(images) if image is not None]
    if not found:
        raise VideoError(f"{name}: no frame of it can be decoded")
    nearest = [_nearest(found, i) for i in range(len(images))]
    return Video(
        frames=tuple(p for p in (images[j] for j in nearest) if p is not None),
        times=tuple(times[j] for j in nearest),
        seconds=seconds,
        name=name,
        repeated=repeated,
    )


def _nearest(places: list[int], place: int) -> int:
    return min(places, key=lambda other: abs(other - place))


def _upright(frame: VideoFrame) -> Image.Image:
    image = frame.to_image()
    # counter-clockwise in both FFmpeg's matrix and Pillow
    turn = frame.rotation % 360
    return image.rotate(turn, expand=True) if turn else image
