"""Reading images: whatever can be shown becomes plain RGB, whatever cannot is refused by name.

The one place that opens image files. Only formats of a list are tried: others make Pillow start
programs (Ghostscript for EPS) or unpack without a bound. Size is checked on the header, before
any pixel is decoded.
"""

from __future__ import annotations

import io
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from llama_adapter.conversation import ImageRef
from llama_adapter.errors import ImageError
from llama_adapter.files import read_bytes

FORMATS = (
    "AVIF", "BMP", "CUR", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG",
    "PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM",
)  # fmt: skip
"""Formats that are read, by Pillow's names; each is decoded within this process."""
_PLUGIN_FORMATS = ("HEIF", "JXL")
"""Read as well where a Pillow plugin is registered for them, as that of the extra `heif` is."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Of HEIC files; the last two are of some AVIF files as well, which Pillow reads."""

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused: as many pixels as are read have 700 MB at 64 bits each."""
MAX_SIDE = 32_768
"""Pixels along one side; longer images are refused."""
MAX_PIXELS = 89_000_000
"""Pixels altogether; larger images are refused. Just below where Pillow itself starts to warn."""

_WHITE = (255, 255, 255)


def load_image(
    source: Any, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An RGB image from a path, encoded bytes, a `data:` URL, a PIL image, a function that makes
    one, or an `ImageRef`.

    Rotation stored as EXIF is applied, transparency shown on white, 16 bits reduced to 8, and of
    an animation the first frame is taken. Raises `ImageError` for anything else, and for images
    of more than `max_pixels` before they are decoded.
    """
    max_pixels = min(max_pixels, MAX_PIXELS)
    ref = ImageRef.of(source, name=name)
    if callable(ref.source) and not isinstance(ref.source, Image.Image):
        return load_image(ref.source(), name=ref.name, max_pixels=max_pixels)
    if isinstance(ref.source, Image.Image):
        return _given(ref.source, name=ref.name, max_pixels=max_pixels)
    if isinstance(ref.source, Path | bytes):
        return _decode(_read(ref.source, name=ref.name), name=ref.name, max_pixels=max_pixels)
    raise ImageError(
        f"{ref.name} must be a path, bytes or a PIL image, got {type(ref.source).__name__}"
    )


def _read(source: Path | bytes, *, name: str) -> bytes:
    data = source
    if isinstance(data, Path):
        data = read_bytes(data, error=ImageError, limit=MAX_FILE_BYTES, name=f"image {name}")
    if not data:
        raise ImageError(f"image {name} is empty (0 bytes)")
    return data


def _given(image: Image.Image, *, name: str, max_pixels: int) -> Image.Image:
    """A PIL image of the caller's, whose file may not have been decoded yet."""
    waits = isinstance(image, ImageFile.ImageFile) and bool(image.tile)
    waits = waits or isinstance(image, ImageFile.StubImageFile)
    if waits and image.format not in {*FORMATS, *_PLUGIN_FORMATS, "MPO"}:  # MPO: several JPEGs
        raise ImageError(f"image {name} is of format {image.format}, which is not read")
    try:
        image.seek(0)
    except EOFError:
        pass  # some formats count from 1
    except Exception as error:
        raise _damaged(name, error) from error
    return _to_rgb(image, name=name, max_pixels=max_pixels)


def _decode(data: bytes, *, name: str, max_pixels: int) -> Image.Image:
    Image.init()
    is_heif = data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS
    if is_heif and "HEIF" not in Image.OPEN:
        with suppress(ImportError):
            import_module("pillow_heif").register_heif_opener()
    formats = [kind for kind in (*FORMATS, *_PLUGIN_FORMATS) if kind in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        if is_heif and "HEIF" not in Image.OPEN:
            raise ImageError(
                f"cannot decode image {name}: it is HEIC, as telephones save photographs; run: "
                "pip install 'llama-adapter[heif]', or convert it to JPEG"
            ) from error
        raise ImageError(
            f"cannot decode image {name}: {len(data)} bytes in no known image format "
            f"(known are {', '.join(FORMATS)})"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, error) from error
    except Exception as error:
        raise _damaged(name, error) from error
    return _to_rgb(image, name=name, max_pixels=max_pixels)


def _to_rgb(image: Image.Image, *, name: str, max_pixels: int) -> Image.Image:
    _check_size(image, name=name, max_pixels=max_pixels)
    try:
        image.load()
        # an icon may hold a larger image than its header says
        _check_size(image, name=name, max_pixels=max_pixels)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
            image = _to_8_bits(image)
        if image.has_transparency_data:
            above = image.convert("RGBA")
            below = Image.new("RGBA", above.size, (*_WHITE, 255))
            image = Image.alpha_composite(below, above)
        return image.convert("RGB")
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, error) from error
    except Exception as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ImageError:
    """For whatever a decoder raises: each has its own way of noticing damage."""
    return ImageError(f"cannot decode image {name}: {error or type(error).__name__}")


def _too_large(name: str, error: Exception) -> ImageError:
    return ImageError(f"image {name} has too many pixels; at most {MAX_PIXELS} are read ({error})")


def _check_size(image: Image.Image, *, name: str, max_pixels: int) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"image {name} is {width}x{height} pixels; a side may have at most {MAX_SIDE}"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"image {name} has {width}x{height} = {width * height} pixels; "
            f"at most {max_pixels} are read"
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
