"""The keywords of Hugging Face's processors, read into settings of our one way of making batches.

Each is honored or refused in one line. A keyword may be given by itself, in `text_kwargs`,
`images_kwargs` or `common_kwargs`, as in `transformers.ProcessorMixin`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from llama_adapter.config import did_you_mean
from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.processing.encoding import Side
from llama_adapter.processing.image_processors import image_processor_from
from llama_adapter.processing.pieces import Rendered

_GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")
_OF_IMAGES = frozenset(
    {"do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size", "do_pad",
     "pad_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
     "do_convert_rgb"}
)  # fmt: skip
"""What an image processor can be asked to do in another way for one call."""
_IDLE: dict[str, tuple[Any, ...]] = {
    "text_pair": (None,),
    "text_target": (None,),
    "text_pair_target": (None,),
    "videos": (None,),
    "audio": (None,),
    "stride": (None, 0),
    "is_split_into_words": (None, False),
    "return_token_type_ids": (None, False),
    "return_mm_token_type_ids": (None, False),
    "return_overflowing_tokens": (None, False),
    "return_special_tokens_mask": (None, False),
    "return_offsets_mapping": (None, False),
    "return_text_replacement_offsets": (None, False),
    "return_length": (None, False),
    "return_metadata": (None, False),
    "verbose": (None, False, True),  # there are no warnings
    # what users wrote is always kept from being special tokens
    "sanitize_control_tokens": (None, True),
    "data_format": (None, "channels_first"),
    "input_data_format": (None,),
    "device": (None, "cpu"),
    "disable_grouping": (None, False, True),
    "image_seq_length": (None,),
}
"""Keywords of which only these values, their defaults, mean what is done here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """How prompts become a batch."""

    labels: bool = False
    """Whether there are labels; then padding is on the right by default."""
    padding: bool | str = True
    """True or "longest", "max_length", or False, which takes rows of one length alone."""
    padding_side: Side | None = None
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    truncation: bool | str = False
    """Cut rows that are longer than `max_length` or the context, rather than refuse them."""
    add_special_tokens: bool | None = None
    """False: plain strings are whole texts, and nothing is put before them."""
    return_tensors: str | None = "pt"
    """"pt", "np", or None for lists."""
    return_attention_mask: bool | None = None
    return_assistant_tokens_mask: bool | None = None
    """Adds `assistant_masks` (B, T): 1 where a token is an answer's."""

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "labels": (False, True),
            "padding": (True, False, None, "longest", "max_length", "do_not_pad"),
            "padding_side": (None, "left", "right"),
            "truncation": (
                False, True, None, "longest_first", "only_first", "do_not_truncate"
            ),
            "add_special_tokens": (None, False, True),
            "return_tensors": ("pt", "np", None),
            "return_attention_mask": (None, False, True),
            "return_assistant_tokens_mask": (None, False, True),
        }  # fmt: skip
        for name, values in allowed.items():
            found = getattr(self, name)
            if not isinstance(found, str | bool | None) or found not in values:
                shown = ", ".join(map(repr, values))
                raise ConfigError(f"{name} must be one of {shown}, got {reprlib.repr(found)}")
        for name in ("max_length", "pad_to_multiple_of"):
            found = getattr(self, name)
            if found is not None and (type(found) is not int or found < 1):
                raise ConfigError(f"{name} must be at least 1, got {reprlib.repr(found)}")

    @property
    def truncates(self) -> bool:
        return self.truncation not in {False, None, "do_not_truncate"}

    @property
    def pads(self) -> bool:
        return self.padding not in {False, None, "do_not_pad"}

    @property
    def side(self) -> Side:
        return self.padding_side or ("right" if self.labels else "left")

    def length(self, longest: int, limit: int | None) -> int:
        """Tokens of a row, of which the longest has `longest`."""
        length = limit if self.padding == "max_length" and limit is not None else longest
        step = self.pad_to_multiple_of or 1
        return -(-length // step) * step

    def shape(self, batch: BatchFeature) -> BatchFeature:
        """A batch of tensors as arrays or lists, if that is what was asked for."""
        if self.return_attention_mask is False:
            batch.pop("attention_mask")
        for name, value in batch.items():
            if self.return_tensors == "np":
                batch[name] = value.numpy()
            elif self.return_tensors is None:
                # lists of numbers, but an image stays an array, as with Hugging Face's
                is_pixels = name == "pixel_values"
                batch[name] = list(value.numpy()) if is_pixels else value.tolist()
        return batch


_OPTIONS = frozenset(field.name for field in fields(BatchOptions))


def read_keywords(given: Mapping[str, Any], *, image_processor: Any) -> tuple[BatchOptions, Any]:
    """The options that keywords mean, and the image processor that they ask for.

    Raises ConfigError for what is not honored.
    """
    flat = _flattened(given)
    overrides = {n: flat.pop(n) for n in sorted(flat.keys() & _OF_IMAGES)}
    for name in sorted(flat.keys() - _OPTIONS):
        if name not in _IDLE:
            near = did_you_mean(name, {*_OPTIONS, *_IDLE, *_OF_IMAGES})
            raise ConfigError(f"unknown processor option {name!r}{near}")
        value = flat.pop(name)
        if not any(type(value) is type(idle) and value == idle for idle in _IDLE[name]):
            hint = ": a video is passed among images, or in messages" if name == "videos" else ""
            raise ConfigError(
                f"processor option {name}={reprlib.repr(value)} is not supported{hint}"
            )
    return BatchOptions(**flat), _asked_for(image_processor, overrides)


def _flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in given.items() if name not in _GROUPS}
    for group in _GROUPS:
        inner = given.get(group) or {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{group} must be a dictionary, got {reprlib.repr(inner)}")
        if inner and group in {"videos_kwargs", "audio_kwargs"}:
            raise ConfigError(f"{group} are not supported, got {sorted(inner)[0]!r}")
        for name, value in inner.items():
            if name in flat and flat[name] != value:
                raise ConfigError(
                    f"processor option {name!r} is given twice, as {reprlib.repr(flat[name])} and "
                    f"in {group} as {reprlib.repr(value)}"
                )
            flat[name] = value
    return flat


def _asked_for(image_processor: Any, overrides: Mapping[str, Any]) -> Any:
    """The image processor, with other settings for this call."""
    changed = {n: v for n, v in overrides.items() if v is not None}
    if not changed:
        return image_processor
    for name in changed:
        if image_processor is None or not hasattr(image_processor, name):
            kind = (
                "this adapter reads text alone"
                if image_processor is None
                else (f"{type(image_processor).__name__} has no such setting")
            )
            raise ConfigError(f"processor option {name!r} is of images, but {kind}")
    allowed: dict[str, list[Any]] = {
        "default_to_square": [False, True],
        "resample": list(Image.Resampling),
    }
    for name in changed.keys() & allowed.keys():
        if changed[name] not in allowed[name]:
            found = reprlib.repr(changed[name])
            raise ConfigError(f"{name} must be one of {allowed[name]}, got {found}")
    try:
        return image_processor_from(
            {**image_processor.to_dict(), **changed}, where=f"option {sorted(changed)[0]!r}"
        )
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def in_order(given: Sequence[Any], *, images: Any, text: Any) -> tuple[Any, Any]:
    """Images and prompts, of which some were given by position.

    One is a prompt, two are images and prompts in the order of Hugging Face's processors; where
    their kinds tell that they are the other way around, they are taken so.
    """
    if len(given) + (text is not None) + (images is not None) > 2:
        raise ConfigError("a processor takes images and text by position, and each of them once")
    if len(given) == 2:
        first, second = given
        is_text_first = _is_a_talk(first) or (
            not _are_images(first) and (second is None or _are_images(second))
        )
        return (second, first) if is_text_first else (first, second)
    if given and text is None:
        return images, given[0]
    return (given[0], text) if given else (images, text)


_IMAGES = (Image.Image, ImageRef, Path, bytes, bytearray, np.ndarray, Tensor)


def _are_images(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_are_images(entry) for entry in value)
    return isinstance(
        value, Image.Image | ImageRef | Path | bytes | bytearray | np.ndarray | Tensor
    )


def _is_a_talk(value: Any) -> bool:
    """Whether this can be a prompt alone: a string may be the path of an image too."""
    if isinstance(value, list | tuple):
        return any(_is_a_talk(entry) for entry in value)
    return isinstance(value, Conversation | Rendered | Mapping)
