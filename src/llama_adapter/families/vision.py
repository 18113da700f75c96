"""What is read of a frozen vision encoder: patch tokens, a class token, or a feature map.

No list of encoders decides anything. The width is found by a pass of shapes alone, of a copy on the
meta device, and tokens that are not patches (class and register tokens) by what the image does not
change.

Shapes: I images, F frames of one, P tokens, C their width.
"""

from __future__ import annotations

import inspect
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from llama_adapter.config import AdapterConfig
from llama_adapter.errors import ConfigError, UnsupportedModelError
from llama_adapter.families.structure import VisionEncoder

DEFAULT_PIXELS = 224
"""The side of an image for an encoder whose config names none."""

ROUNDED = 0.3
"""By how much, as a logarithm, a small map's proportions may differ from its image's."""

_PACKED = {"pixel_attention_mask", "spatial_shapes"}
"""What an encoder of packed patches (NaFlex) needs with its pixels."""

_FAILURES = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)

_num_extra_tokens: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Class and register tokens of the encoders that were asked for patches or the class token."""


def pixel_size(vision: VisionEncoder) -> tuple[int, int]:
    """Height and width of the images that an encoder was trained on."""
    sides = getattr(_config_of(vision), "image_size", None) or DEFAULT_PIXELS
    return (sides, sides) if isinstance(sides, int) else (int(sides[0]), int(sides[-1]))


def vision_feature_size(vision: VisionEncoder, config: AdapterConfig) -> int:
    """Width of the features that `vision_features` returns, found without computing them.

    Raises UnsupportedModelError for an encoder that cannot be read, and ConfigError for a feature
    that it lacks.
    """
    if config.vision_feature == "projected" and not hasattr(vision, "visual_projection"):
        raise ConfigError(
            f"vision_feature 'projected' needs a CLIP encoder with its projection, "
            f"got {type(vision).__name__}"
        )
    kind: Any = type(vision)
    with torch.device("meta"):
        twin = kind(vision.config).eval()
    weight = next(iter(vision.parameters()))
    image = torch.zeros(1, 3, *pixel_size(vision), dtype=twin.dtype, device="meta")
    with torch.no_grad(), _WithoutRandomness(vision):
        try:
            return int(_tokens(twin, image, config.vision_feature).shape[-1])
        except UnsupportedModelError:
            if weight.is_meta:
                raise
            # some look into values, which the meta device does not have
            black = torch.zeros_like(image, device=weight.device, dtype=weight.dtype)
            return int(_tokens(vision, black, config.vision_feature).shape[-1])


@torch.no_grad()
def vision_features(vision: VisionEncoder, pixel_values: Tensor, config: AdapterConfig) -> Tensor:
    """Features [I, P, C] of images [I, 3, H, W], or [I, F, P, C] of [I, F, 3, H, W].

    The encoder is frozen: no gradient flows. Images of another size than it was trained on are
    read where it interpolates its positions. Raises ConfigError for a feature that it lacks, and
    UnsupportedModelError for images that it cannot read.
    """
    has_frames = pixel_values.ndim == 5
    pixels = pixel_values.flatten(0, 1) if has_frames else pixel_values
    pixels = pixels.to(next(vision.parameters()).dtype)
    features = _tokens(vision, pixels, config.vision_feature)
    if config.vision_tokens != "all":
        extra = _extra_tokens(vision, pixels, features.shape[1])
        if config.vision_tokens == "class" and not extra:
            raise ConfigError(
                f"vision_tokens is 'class', but {type(vision).__name__} has no class token"
            )
        is_class = config.vision_tokens == "class"
        features = features[:, :1] if is_class else features[:, extra:]
    return features.unflatten(0, pixel_values.shape[:2]) if has_frames else features


def vision_encoder_of(model: Any) -> PreTrainedModel:
    """The visual half of a vision or vision-language model, frozen and in evaluation mode.

    Raises UnsupportedModelError if the model does not read images, or needs more than them.
    """
    if hasattr(model, "text_model") and hasattr(model, "vision_model"):
        model = model.vision_model
    parameters = inspect.signature(model.forward).parameters
    if "pixel_values" not in parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a vision model: expected one that takes pixel_values"
        )
    required = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    needed = sorted(required - {"pixel_values"} - _PACKED)
    if needed:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be the vision encoder: it needs {', '.join(needed)} "
            "with its pixel_values"
        )
    encoder: PreTrainedModel = model.eval().requires_grad_(False)
    return encoder


def _config_of(vision: VisionEncoder) -> Any:
    return getattr(vision.config, "vision_config", vision.config)


def _tokens(vision: VisionEncoder, pixels: Tensor, layer: int | str) -> Tensor:
    """Features [I, P, C] of a layer, class and register tokens included."""
    if layer == "projected":
        encoder: Any = getattr(vision, "vision_model", vision)
        hidden = _output(vision, pixels).last_hidden_state
        features: Tensor = vision.visual_projection(encoder.post_layernorm(hidden))
        return features
    if layer == -1:
        found = getattr(_output(vision, pixels), "last_hidden_state", None)
        return _as_tokens(vision, found, pixels)
    states = getattr(_output(vision, pixels, with_states=True), "hidden_states", None) or ()
    if not -len(states) <= int(layer) < len(states):
        raise ConfigError(
            f"vision_feature is layer {layer}, but the vision encoder has {len(states)} "
            "hidden states"
        )
    return _as_tokens(vision, states[int(layer)], pixels)


def _output(vision: VisionEncoder, pixels: Tensor, *, with_states: bool = False) -> Any:
    encoder: Any = getattr(vision, "vision_model", vision)
    takes = inspect.signature(encoder.forward).parameters
    size, own = tuple(pixels.shape[-2:]), pixel_size(vision)
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if takes.keys() >= _PACKED:
        inputs = _packed(pixels, int(_config_of(vision).patch_size))
    if size != own and "interpolate_pos_encoding" in takes:
        inputs["interpolate_pos_encoding"] = True
    if with_states:
        inputs["output_hidden_states"] = True
    try:
        return encoder(**inputs)
    except _FAILURES as error:
        given = f"{size[0]}x{size[1]} pixels"
        expected = "" if size == own else f", expected {own[0]}x{own[1]}"
        raise UnsupportedModelError(
            f"{type(vision).__name__} cannot read an image of {given}{expected} "
            f"({type(error).__name__}: {error})"
        ) from error


def _packed(pixels: Tensor, side: int) -> dict[str, Any]:
    """Whole images as an encoder of packed patches takes them: channels last inside a patch."""
    patches = pixels.unfold(2, side, side).unfold(3, side, side)  # [I, 3, h, w, side, side]
    images, _, height, width = patches.shape[:4]
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(images, height * width, -1)
    # encoders look into the shapes, which the meta device does not allow
    device = torch.device("cpu") if pixels.is_meta else pixels.device
    return {
        "pixel_values": patches,
        "pixel_attention_mask": None,  # no patch is padding
        "spatial_shapes": torch.tensor([[height, width]], device=device).expand(images, 2),
    }


def _as_tokens(vision: VisionEncoder, states: Any, pixels: Tensor) -> Tensor:
    """Tokens as they are; a feature map [I, C, h, w] or [I, h, w, C] as a token for each place."""
    name, found = type(vision).__name__, None
    if isinstance(states, Tensor):
        found = list(states.shape)
        if states.ndim == 3 and len(states) == len(pixels):
            return states
        if states.ndim == 4 and len(states) == len(pixels):
            height, width = pixels.shape[-2:]
            first, last = (
                abs(math.log(rows / columns * width / height))
                for rows, columns in (found[2:], found[1:3])
            )
            if first != last and min(first, last) < ROUNDED:
                return states.flatten(2).transpose(1, 2) if first < last else states.flatten(1, 2)
    raise UnsupportedModelError(
        f"{name} cannot be the vision encoder: expected tokens [images, tokens, width] or a "
        f"feature map of the image's proportions, got {found or 'no last_hidden_state'}"
    )


def _extra_tokens(vision: VisionEncoder, pixels: Tensor, length: int) -> int:
    """How many of `length` tokens, class and registers, come before the patches."""
    if pixels.is_meta:
        return 1  # shapes alone, and nobody can know
    assert isinstance(vision, nn.Module)
    if vision not in _num_extra_tokens:
        _num_extra_tokens[vision] = _count_extra_tokens(vision, pixels, length)
    return _num_extra_tokens[vision]


def _count_extra_tokens(vision: VisionEncoder, pixels: Tensor, length: int) -> int:
    """Told by the first hidden state, where tokens have not met yet: they are alike for all images.

    Where an encoder has no such state, or makes fewer tokens later, patches are the longest grid of
    the image's proportions at the end.
    """
    black = torch.zeros_like(pixels[:1])
    output = _output(vision, torch.cat([black, black + 1]), with_states=True)
    states = getattr(output, "hidden_states", None) or ()
    if states and states[0].ndim == 3 and states[0].shape[1] == length:
        is_patch = (states[0][0] != states[0][1]).any(-1)
        count = int(is_patch.int().argmax())
        if bool(is_patch[count:].all()):
            return count
    elif length:
        height, width = pixels.shape[-2:]
        for count in range(length):
            rows = math.isqrt((length - count) * height // width)
            if rows * rows * width == (length - count) * height:
                return count
    raise UnsupportedModelError(
        f"{type(vision).__name__} does not show which of its tokens are patches: "
        "vision_tokens must be 'all'"
    )


class _WithoutRandomness(TorchDispatchMode):
    """Inside, an encoder that draws random numbers is refused: its features would not repeat."""

    def __init__(self, vision: VisionEncoder) -> None:
        super().__init__()
        self._name = type(vision).__name__

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        # attention is marked as random for its dropout, which an encoder at rest has none of
        draws = torch.Tag.nondeterministic_seeded in func.tags and "dot_product" not in str(func)
        if draws:
            raise UnsupportedModelError(
                f"{self._name} cannot be the vision encoder: it draws random numbers ({func})"
            )
        return func(*args, **(kwargs or {}))
