"""Hugging Face's image processors, always the ones on Pillow.

`AutoImageProcessor` picks by what is installed (some releases cannot even be asked without
torchvision); an adapter should see the same pixels on every machine.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from llama_adapter.errors import CheckpointError, ImageError
from llama_adapter.pretrained import check_settings, explain
from llama_adapter.processing.images import MAX_PIXELS

MAX_EDGE = 8192
"""Pixels of a side that an encoder may want."""


def pixel_values(image_processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """Images as an encoder takes them, (I, 3, H, W).

    Raises `ImageError` for an image that the processor cannot take, or that would grow beyond
    `MAX_PIXELS` on the way.
    """
    for width, height in {image.size for image in images}:
        check_resize(image_processor, width, height)
    try:
        pixels: Tensor = image_processor(images=images, return_tensors="pt")["pixel_values"]
    except (ValueError, ArithmeticError, MemoryError) as error:
        sizes = ", ".join(sorted({f"{image.width}x{image.height}" for image in images})[:3])
        raise ImageError(
            f"{type(image_processor).__name__} cannot take an image of {sizes} pixels: {error}"
        ) from error
    return pixels


def check_resize(image_processor: Any, width: int, height: int) -> None:
    """`ImageError` where an image of that size is resized to more than `MAX_PIXELS`.

    Processors that bring the shorter edge to a fixed length, and crop afterwards, make a long
    thin image larger: with an edge of 336 pixels, sides may differ by a factor of up to 788.
    """
    size: Any = getattr(image_processor, "size", None) or {}
    edge: int = size.get("shortest_edge") or 0
    is_bounded = bool(size.get("longest_edge") or size.get("max_pixels"))
    if not edge or is_bounded or not getattr(image_processor, "do_resize", False):
        return
    longer = edge * max(width, height) // min(width, height)
    if edge * longer > MAX_PIXELS:
        resized = f"{longer}x{edge}" if width > height else f"{edge}x{longer}"
        raise ImageError(
            f"an image of {width}x{height} pixels is too thin: resized to a shorter edge of {edge} "
            f"it has {resized} = {edge * longer} pixels; at most {MAX_PIXELS} are held"
        )


def load_image_processor(name_or_path: str, **kwargs: Any) -> Any:
    """The image processor of a model, by name or directory.

    Raises `CheckpointError` where there is none, or none that works on Pillow.
    """
    check_settings(Path(name_or_path))
    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **kwargs)
    except Exception as error:  # damaged files make it raise whatever it likes
        reason = explain(error)
        raise CheckpointError(f"{name_or_path} has no image processor: {reason}") from error
    return image_processor_from(stored, where=name_or_path)


def image_processor_from(stored: Mapping[str, Any], *, where: Any) -> Any:
    """An image processor from its stored settings; CheckpointError where they make none."""
    stated = stored.get("image_processor_type") or stored.get("feature_extractor_type") or ""
    kind = str(stated).removesuffix("Pil").removesuffix("Fast").replace("Feature", "Image")
    kind = kind.replace("Extractor", "Processor")
    for name in (f"{kind}Pil", kind):
        found = getattr(transformers, name, None)
        # classes whose requirements are not installed are dummies that cannot be made
        if found is not None and not getattr(found, "is_dummy", False):
            return _tried(found, stored, where=where)
    raise CheckpointError(
        f"{where}: image processor {reprlib.repr(stated)} is none that works on Pillow"
    )


def _tried(kind: Any, stored: Mapping[str, Any], *, where: Any) -> Any:
    """An image processor that turns a small image into finite values."""
    complaint = f"{where}: the image processor's settings are damaged"
    for name, value in stored.items():
        if name.startswith("do_") and not isinstance(value, bool | None):
            raise CheckpointError(
                f"{complaint}: {name} must be true or false, got {reprlib.repr(value)}"
            )
        sides = value if isinstance(value, dict) else {"height": value}
        for side in ("height", "width", "shortest_edge") if name in {"size", "crop_size"} else ():
            length = sides.get(side)
            if isinstance(length, int | float) and not 1 <= length <= MAX_EDGE:
                raise CheckpointError(f"{complaint}: {name} cannot have {side} {length!r}")
    try:
        made = kind.from_dict(dict(stored))
        pixels = pixel_values(made, [Image.new("RGB", (4, 4), (90, 120, 200))])
        is_sound = pixels.ndim == 4 and pixels.is_floating_point() and bool(pixels.isfinite().all())
    except Exception as error:  # each class fails in its own way
        raise CheckpointError(f"{complaint}: {explain(error)}") from error
    if not is_sound:
        raise CheckpointError(f"{complaint}: a plain image does not become finite values")
    return made
