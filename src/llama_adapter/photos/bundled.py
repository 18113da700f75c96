"""The photos model as the package carries it: an adapter for base and encoder of `get photos`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_adapter.errors import CheckpointError

ADAPTER = Path(__file__).parent / "adapter"
CAPTION_FOLDER = "caption"
"""Inside `ADAPTER`, where a caption expert of its own is bundled too."""
CAPTION_INSTRUCTION = "Describe the image in one sentence."
"""One of those that captions were learned from."""


def bundled_adapter() -> Path:
    """The adapter's directory; CheckpointError where the package was made without it."""
    if not ADAPTER.is_dir():
        raise CheckpointError(
            "this package was made without the model `photos`: train it with `llama-adapter train "
            "recipes/photos.yaml` and name the adapter's directory instead"
        )
    return ADAPTER


def why_missing() -> str | None:
    """What the photos model lacks to be loaded here, with what to do about it; None for nothing."""
    from llama_adapter.photos.get import is_there

    try:
        bundled_adapter()
    except CheckpointError as refusal:
        return str(refusal)
    return None if is_there() else "its base is not fetched yet; run: llama-adapter get photos"


def expert_defaults() -> Mapping[str, Mapping[str, Any]]:
    """Who captions for the photos model: the bundled caption expert, or else the model itself."""
    caption = ADAPTER / CAPTION_FOLDER
    model = caption if caption.is_dir() else ADAPTER
    return {"caption": {"model": str(model), "instruction": CAPTION_INSTRUCTION}}
