"""Reading images: whatever can be shown becomes plain RGB, whatever cannot is refused by name.

Size is checked on the header, before any pixel is decoded.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llama_adapter.conversation import ImageRef
from llama_adapter.errors import ImageError

MAX_SIDE = 32_768
"""Pixels along one side; longer images are refused."""
MAX_PIXELS = 89_000_000
"""Pixels altogether; larger images are refused. Just below where Pillow itself starts to warn."""

_WHITE = (255, 255, 255)
# What a damaged file makes Pillow raise: each decoder has its own way of noticing.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, MemoryError)


def load_image(source: Any, *, name: str | None = None) -> Image.Image:
    """An RGB image from a path, encoded bytes, a `data:` URL, a PIL image or an `ImageRef`.

    Rotation stored as EXIF is applied, transparency shown on white, 16 bits reduced to 8, and of
    an animation the first frame is taken. Raises `ImageError` for anything else.
    """
    ref = ImageRef.of(source, name=name)
    if isinstance(ref.source, Image.Image):
        return _to_rgb(ref.source, name=ref.name)
    if isinstance(ref.source, Path | bytes):
        return _decode(_read(ref.source, name=ref.name), name=ref.name)
    raise ImageError(
        f"{ref.name} must be a path, bytes or a PIL image, got {type(ref.source).__name__}"
    )


def _read(source: Path | bytes, *, name: str) -> bytes:
    if isinstance(source, bytes):
        data = source
    else:
        try:
            data = source.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot read image {name}: {error.strerror or error}") from error
    if not data:
        raise ImageError(f"image {name} is empty (0 bytes)")
    return data


def _decode(data: bytes, *, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"cannot decode image {name}: {len(data)} bytes in no known image format"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"image {name} has too many pixels; at most {MAX_PIXELS} are read ({error})"
        ) from error
    except _DAMAGE as error:
        raise ImageError(f"cannot decode image {name}: {error}") from error
    return _to_rgb(image, name=name)


def _to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    _check_size(image, name=name)
    try:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(0)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
            image = _to_8_bits(image)
        if image.has_transparency_data:
            above = image.convert("RGBA")
            below = Image.new("RGBA", above.size, (*_WHITE, 255))
            image = Image.alpha_composite(below, above)
        return image.convert("RGB")
    except _DAMAGE as error:
        raise ImageError(f"cannot decode image {name}: {error}") from error


def _check_size(image: Image.Image, *, name: str) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"image {name} is {width}x{height} pixels; a side may have at most {MAX_SIDE}"
        )
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"image {name} has {width}x{height} = {width * height} pixels; "
            f"at most {MAX_PIXELS} are read"
        )
    if min(width, height) < 1:
        raise ImageError(f"image {name} is {width}x{height} pixels; it has no content")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Integers as 16-bit values; floats as 0 to 1 or, beyond that, as 0 to 255."""
    values = np.asarray(image, dtype=np.float32)
    if image.mode == "F":
        values = np.nan_to_num(values)
        peak = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
        scaled = values * (255.0 / peak)
    elif image.mode == "I" and values.max(initial=0.0) <= 255.0:
        scaled = values
    else:
        scaled = values / 257.0
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8), mode="L")
