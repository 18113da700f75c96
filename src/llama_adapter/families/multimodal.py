"""The text decoder inside a multimodal model, as a causal language model of its own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

_COPIED = (
    "generation_config",
    "hf_quantizer",
    "hf_device_map",
    "is_quantized",
    "quantization_method",
)


def is_text_decoder(config: Any) -> bool:
    """Whether AutoModelForCausalLM loads models of this config."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def holds_text_decoder(config: Any) -> bool:
    """Whether models of this config read images too, around a text decoder that can be taken."""
    text = getattr(config, "text_config", None)
    return is_text_decoder(text) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def loader_of(config: Any) -> Any:
    """The class that loads a base of this config, whole."""
    return AutoModelForCausalLM if is_text_decoder(config) else AutoModelForImageTextToText


def text_decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder of a multimodal model, its tensors shared and its vision left out.

    What AutoModelForCausalLM loads by itself is given back as it is.
    """
    # the mapping's values import every family of transformers: seconds
    if not holds_text_decoder(model.config) or isinstance(
        model, (*MODEL_FOR_CAUSAL_LM_MAPPING.values(),)
    ):
        return model
    config: Any = model.config.get_text_config()
    with torch.device("meta"):
        decoder = cast(PreTrainedModel, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config))
    setattr(decoder, decoder.base_model_prefix, model.get_decoder())
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    decoder.set_output_embeddings(head)
    config._name_or_path = decoder.name_or_path = str(model.name_or_path)
    config._commit_hash = getattr(model.config, "_commit_hash", None)
    for name in _COPIED:
        if name in vars(model):
            setattr(decoder, name, getattr(model, name))
    return decoder.train(model.training)
