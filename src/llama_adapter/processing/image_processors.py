"""Hugging Face's image processors, always the ones on Pillow.

`AutoImageProcessor` picks by what is installed (some releases cannot even be asked without
torchvision); an adapter should see the same pixels on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.image_processing_base import ImageProcessingMixin

from llama_adapter.errors import CheckpointError


def load_image_processor(name_or_path: str, **kwargs: Any) -> Any:
    """The image processor of a model, by name or directory.

    Raises `CheckpointError` where there is none, or none that works on Pillow.
    """
    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name_or_path} has no image processor: {error}") from error
    return image_processor_from(stored, where=name_or_path)


def image_processor_from(stored: Mapping[str, Any], *, where: Any) -> Any:
    """An image processor from its stored settings."""
    stated = stored.get("image_processor_type") or stored.get("feature_extractor_type") or ""
    kind = str(stated).removesuffix("Pil").removesuffix("Fast").replace("Feature", "Image")
    kind = kind.replace("Extractor", "Processor")
    for name in (f"{kind}Pil", kind):
        found = getattr(transformers, name, None)
        # classes whose requirements are not installed are stand-ins that cannot be made
        if found is not None and not getattr(found, "is_dummy", False):
            return found.from_dict(dict(stored))
    raise CheckpointError(f"{where}: image processor {stated!r} is none that works on Pillow")
