"""Every vision encoder type that transformers registers, on a tiny random model of it.

`python -m benchmarks.families --vision` runs it, like the sweep over causal language models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)

from benchmarks.tiny_models import CannotBuildError, tiny_base, tiny_vision
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.config import AdapterConfig
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.families.vision import (
    pixel_size,
    vision_encoder_of,
    vision_feature_size,
    vision_features,
)


class WrongError(Exception):
    """An accepted encoder that does not do what it should."""


def vision_types() -> list[str]:
    """Types of encoders, and of models of images and text whose visual half is one."""
    both = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return [name for name in MODEL_MAPPING_NAMES if name in both or _is_encoder(name)]


def _is_encoder(model_type: str) -> bool:
    config = CONFIG_MAPPING[model_type]
    if "text_config" in config.sub_configs:
        return False
    if model_type in MODEL_FOR_IMAGE_MAPPING_NAMES or re.search(r"[_-]vision", model_type):
        return True
    try:
        cls: Any = MODEL_MAPPING[config]
        cls = cls[0] if isinstance(cls, tuple) else cls
        modalities = cls.input_modalities
    except (ImportError, KeyError, ValueError):
        return False
    # a class that does not say what it reads inherits "text"
    reads_text = modalities != "text" and "text" in modalities
    return cls.main_input_name == "pixel_values" and not reads_text


def check_vision_type(model_type: str) -> dict[str, Any]:
    """What a tiny encoder of a type does under an adapter, as a line of the table."""
    row: dict[str, Any] = {"type": model_type}
    try:
        model = tiny_vision(model_type)
    except CannotBuildError as error:
        return row | {"status": "unbuilt", "reason": str(error)[:300]}
    try:
        vision = vision_encoder_of(model)
        height, width = pixel_size(vision)
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))
        _calibrate(vision, images)
        row |= _tokens(vision, images)
        row["layers"] = _layers(vision, images)
        larger = torch.randn(1, 3, height + height // 2, width * 2)
        row["sizes"] = _tried(lambda: vision_features(vision, larger, AdapterConfig()))
        _learns(vision, images)
    except CannotBuildError as error:
        return row | {"status": "unbuilt", "reason": str(error)[:300]}
    except LlamaAdapterError as error:
        return row | {"status": "refused", "reason": str(error)[:300]}
    except Exception as error:
        return row | {"status": "wrong", "reason": f"{type(error).__name__}: {error}"[:300]}
    return row | {"status": "accepted"}


def _calibrate(vision: Any, images: Tensor) -> None:
    """Statistics of batch norms that fit random weights: with none an image fades to zero."""
    norms = [m for m in vision.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    try:
        with torch.no_grad():
            vision(pixel_values=images)
    except Exception as error:
        raise CannotBuildError(f"it does not run by itself: {error}") from error
    vision.eval()


def _tokens(vision: Any, images: Tensor) -> dict[str, Any]:
    """Numbers of tokens and their width; that they are the images', alone and each time."""
    width = vision_feature_size(vision, AdapterConfig())
    features = vision_features(vision, images, AdapterConfig())
    if features.shape[-1] != width:
        raise WrongError(f"features are {features.shape[-1]} wide, expected {width}")
    again = vision_features(vision, images[:1], AdapterConfig())
    difference = float((again - features[:1]).abs().max() / features.abs().max())
    if not difference < 1e-3:
        raise WrongError(f"an image alone differs from the same in a batch by {difference:.2g}")
    if torch.equal(features[0], features[1]):
        raise WrongError("the features do not depend on the image")
    found: dict[str, Any] = {"tokens": features.shape[1], "width": width}
    for kind in ("patches", "class"):
        config = AdapterConfig(vision_tokens=kind)
        try:
            found[kind] = vision_features(vision, images, config).shape[1]
        except LlamaAdapterError as error:
            found[kind] = 0 if "has no class token" in str(error) else None
    return found


def _layers(vision: Any, images: Tensor) -> int:
    """How many hidden states can be read, each as wide as it is said to be."""
    count = 0
    while True:
        config = AdapterConfig(vision_feature=count)
        try:
            width = vision_feature_size(vision, config)
            features = vision_features(vision, images, config)
        except LlamaAdapterError:
            return count
        if features.shape[-1] != width:
            raise WrongError(f"layer {count} is {features.shape[-1]} wide, expected {width}")
        count += 1


def _tried(run: Callable[[], Tensor]) -> bool:
    try:
        return bool(run().isfinite().all())
    except LlamaAdapterError:
        return False


def _learns(vision: Any, images: Tensor) -> None:
    """A loss behind the encoder reaches every trainable of the visual projection."""
    config = LlamaAdapterConfig.preset(
        "v2", prompt_length=5, visual_prompt_length=6, projector_width=32, projector_heads=4
    )
    model = LlamaAdapterForConditionalGeneration.from_base(
        tiny_base("llama"), vision, config, seed=0
    ).train()
    with torch.no_grad():
        for parameter in model.group_parameters("vision"):
            parameter.add_(0.1)
    ids = torch.arange(3, 15).view(2, -1)
    model(input_ids=ids, pixel_values=images, labels=ids).loss.backward()
    for parameter in model.group_parameters("vision"):
        if parameter.grad is None or not parameter.grad.abs().sum() > 0:
            raise WrongError(f"a trainable of shape {list(parameter.shape)} gets no gradient")


def vision_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each accepted encoder."""
    lines = [
        "| encoder | tokens of an image | patches | class token | width | hidden states "
        "| other image sizes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        patches = "not told apart" if row["patches"] is None else row["patches"]
        class_token = "yes" if row["class"] else "–"
        sizes = "yes" if row["sizes"] else "–"
        lines.append(
            f"| {row['type']} | {row['tokens']} | {patches} | {class_token} | {row['width']} | "
            f"{row['layers'] or '–'} | {sizes} |"
        )
    return lines
