"""What is read of a frozen vision encoder.

Shapes: I images, F frames of one, P patch tokens, C their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.config import AdapterConfig
from llama_adapter.errors import ConfigError, UnsupportedModelError
from llama_adapter.families.structure import VisionEncoder


def vision_feature_size(vision: VisionEncoder, config: AdapterConfig) -> int:
    """Width of the features that `vision_features` returns."""
    vision_config = getattr(vision.config, "vision_config", vision.config)
    if config.vision_feature == "projected":
        projection = getattr(vision, "visual_projection", None)
        if projection is None:
            raise ConfigError(
                f"vision_feature 'projected' needs a CLIP encoder with its projection, "
                f"got {type(vision).__name__}"
            )
        return int(projection.out_features)
    return int(vision_config.hidden_size)


@torch.no_grad()
def vision_features(vision: VisionEncoder, pixel_values: Tensor, config: AdapterConfig) -> Tensor:
    """Patch features [I, P, C] of images [I, 3, H, W], or [I, F, P, C] of [I, F, 3, H, W].

    The encoder is frozen: no gradient flows. Raises ConfigError for a feature layer it lacks.
    """
    has_frames = pixel_values.ndim == 5
    pixels = pixel_values.flatten(0, 1) if has_frames else pixel_values
    pixels = pixels.to(next(vision.parameters()).dtype)
    encoder: Any = getattr(vision, "vision_model", vision)
    layer = config.vision_feature
    if layer == "projected":
        hidden = encoder(pixel_values=pixels).last_hidden_state
        features = vision.visual_projection(encoder.post_layernorm(hidden))
    elif layer == -1:
        features = encoder(pixel_values=pixels).last_hidden_state
    else:
        states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
        if not -len(states) <= int(layer) < len(states):
            raise ConfigError(
                f"vision_feature is layer {layer}, but the vision encoder has {len(states)} "
                "hidden states"
            )
        features = states[int(layer)]
    return features.unflatten(0, pixel_values.shape[:2]) if has_frames else features


def vision_encoder_of(model: Any) -> PreTrainedModel:
    """The visual half of a vision or vision-language model, frozen and in evaluation mode.

    Raises UnsupportedModelError if the model takes no pixels.
    """
    if hasattr(model, "text_model") and hasattr(model, "vision_model"):
        model = model.vision_model
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a vision model: expected one that takes pixel_values"
        )
    encoder: PreTrainedModel = model.eval().requires_grad_(False)
    return encoder
