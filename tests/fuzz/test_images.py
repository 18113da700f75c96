"""Damaged images of every format that is read: an image of the stated size, or one line."""

from __future__ import annotations

import io
import random
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import pytest
from PIL import AvifImagePlugin, Image
from tests.fuzzing import Campaign, mutated_bytes

from llama_adapter.errors import ImageError
from llama_adapter.processing.images import FORMATS, MAX_PIXELS, MAX_SIDE, load_image

MEMORY = 3 << 30
"""Bytes of address space that one image may take beyond what the process has."""

XPM = b"""/* XPM */
static char *i[] = {
"4 2 2 1",
"a c #FF0000",
"b c #0000FF",
"abab",
"baba",
};
"""


def noise(mode: str) -> Image.Image:
    pixels = random.Random(0).randbytes(24 * 16 * 3)
    return Image.frombytes("RGB", (24, 16), pixels).convert(mode)


@cache
def seeds() -> dict[str, bytes]:
    """A small valid image of every format in every mode that Pillow writes."""
    found = {"XPM": XPM, "PSD": photoshop(), "CUR": cursor()}
    for kind in FORMATS:
        for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16"):
            buffer = io.BytesIO()
            try:
                noise(mode).save(buffer, kind)
            except (OSError, KeyError, ValueError):
                continue  # Pillow does not write this format, or not in this mode
            found[f"{kind} {mode}"] = buffer.getvalue()
    frames = [noise("RGB"), noise("RGB").rotate(180)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        found[f"{kind} frames"] = buffer.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    frames[0].save(buffer, "JPEG", exif=exif)
    found["JPEG EXIF"] = buffer.getvalue()
    return found


def photoshop() -> bytes:
    """A Photoshop file without layers."""
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 2, 4, 8, 3)
    return header + bytes(12) + bytes(2) + bytes(range(24))


def cursor() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (16, 16), "red").save(buffer, "ICO", bitmap_format="bmp")
    icon = bytearray(buffer.getvalue())
    icon[2] = 2
    return bytes(icon)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """MemoryError for whoever asks for more than `MEMORY` beyond what is in use."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_sound(image: Image.Image) -> None:
    assert image.mode == "RGB"
    assert min(image.size) >= 1
    assert max(image.size) <= MAX_SIDE
    assert image.width * image.height <= MAX_PIXELS
    assert len(image.tobytes()) == 3 * image.width * image.height


def test_every_format_has_a_valid_seed() -> None:
    kinds = {name.split()[0] for name in seeds()}
    assert kinds >= set(FORMATS)
    for data in seeds().values():
        is_sound(load_image(data))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about odd but readable files
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_images(monkeypatch: pytest.MonkeyPatch) -> None:
    # of its threads, one for each CPU of the machine, each has address space of its own
    monkeypatch.setattr(AvifImagePlugin, "DEFAULT_MAX_THREADS", 2)
    valid = seeds()
    names = sorted(valid)
    campaign = Campaign("images", inputs=400)
    with bounded_memory():
        for number, rng in enumerate(campaign):
            data = valid[names[number % len(names)]]
            damaged = mutated_bytes(data, rng)
            campaign.attempt(partial(load_image, damaged), accepted=is_sound, refusals=ImageError)
            if damaged == data:
                assert load_image(damaged) == load_image(data)
    assert campaign.counts["accepted"] > 50
    assert campaign.counts["refused"] > 50
