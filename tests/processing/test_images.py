from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama_adapter.errors import ImageError
from llama_adapter.processing.images import MAX_SIDE, load_image

RED = (255, 0, 0)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def claims_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "P", "1", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = load_image(Image.new("RGB", (5, 4), "white").convert(mode))
    assert image.mode == "RGB"
    assert image.size == (5, 4)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_keeps_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "red.jpg"
    path.write_bytes(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    r, g, b = load_image(path).getpixel((4, 4))
    assert (r > 200, g < 60, b < 60) == (True, True, True)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(values), "PNG"))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize(("peak", "expected"), [(1.0, 255), (255.0, 255)])
def test_floats_are_fractions_or_bytes(peak: float, expected: int) -> None:
    image = load_image(Image.fromarray(np.array([[0.0, peak]], dtype=np.float32)))
    assert image.getpixel((1, 0)) == (expected,) * 3


def test_transparency_is_shown_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    shown = load_image(encoded(image, "PNG"))
    assert [shown.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), RED]


def test_a_transparent_palette_is_shown_on_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, *RED])
    image.putpixel((1, 0), 1)
    shown = load_image(encoded(image, "PNG", transparency=0))
    assert [shown.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), RED]


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert load_image(encoded(image, "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert load_image(data).getpixel((1, 1)) == RED


def test_an_image_moved_to_another_frame_is_read_from_the_first() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    image = Image.open(
        io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    )
    image.seek(1)
    assert load_image(image).getpixel((1, 1)) == RED


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", r"bad\.png is empty \(0 bytes\)"),
        (b"hello", r"cannot decode image .*bad\.png: 5 bytes in no known image format"),
        (encoded(Image.effect_noise((64, 64), 90), "PNG")[:600], r"cannot decode image .*bad\.png"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], r"cannot decode image .*bad"),
        (claims_size(50_000, 10), rf"bad\.png is 50000x10 pixels; .* at most {MAX_SIDE}"),
        (claims_size(20_000, 20_000), r"too many pixels; at most 89000000 .*400000000"),
        (claims_size(12_000, 12_000), r"too many pixels; at most 89000000 .*144000000"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "wide", "bomb", "large"],
)
def test_what_cannot_be_read_is_refused_by_name(
    data: bytes, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=complaint):
        load_image(path)


def test_photographs_of_telephones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), RED)).save(tmp_path / "a.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    words = r"a\.heic: it is HEIC, .* pip install 'llama-adapter\[heif\]', or convert it to JPEG"
    with pytest.raises(ImageError, match=words):
        load_image(tmp_path / "a.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", pillow_heif)
    found = load_image(tmp_path / "a.heic")
    assert found.size == (64, 48)
    assert all(abs(a - b) < 8 for a, b in zip(found.getpixel((9, 9)), RED, strict=True))
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)


def test_avif_of_a_brand_that_heic_has_too_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    content = encoded(Image.new("RGB", (32, 32), RED), "AVIF")
    assert content[4:12] == b"ftypavif"
    assert load_image(b"%s%s%s" % (content[:8], b"mif1", content[12:])).size == (32, 32)


def test_a_missing_file_a_directory_and_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read image .*nothing\.png: No such file"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="it is a folder, expected a file"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="got int"):
        load_image(7)


@pytest.mark.parametrize("name", ["photo.eps", "photo.jpg"])
def test_a_format_that_starts_a_program_is_not_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    Image.new("RGB", (4, 4), "red").save(path, "EPS")
    waiting = Image.open(io.BytesIO(path.read_bytes()))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started a program"))
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program"))
    with pytest.raises(ImageError, match=r"in no known image format .known are AVIF, BMP"):
        load_image(path)
    with pytest.raises(ImageError, match="is of format EPS, which is not read"):
        load_image(waiting)


@pytest.mark.parametrize(
    "kind", ["AVIF", "BMP", "DDS", "ICO", "JPEG2000", "MPO", "PCX", "PPM", "QOI", "SGI", "TGA"]
)
def test_the_formats_that_cameras_scanners_and_editors_write(kind: str) -> None:
    image = load_image(encoded(Image.new("RGB", (16, 16), RED), kind))
    assert image.size == (16, 16)
    assert image.getpixel((8, 8)) == pytest.approx(RED, abs=3)


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    pipe, sparse = tmp_path / "pipe.png", tmp_path / "sparse.png"
    os.mkfifo(pipe)
    with sparse.open("wb") as file:
        file.truncate(6 << 30)
    with pytest.raises(ImageError, match=r"cannot read image .*pipe\.png: .*not a regular file"):
        load_image(pipe)
    with pytest.raises(ImageError, match=r"/dev/zero: it is not a regular file"):
        load_image("/dev/zero")
    with pytest.raises(ImageError, match=r"sparse\.png: it has 6442450944 bytes, at most"):
        load_image(sparse)
