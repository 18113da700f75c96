"""Whether a config is of a base, a vision encoder or something else, said before loading it."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_MAPPING, AutoConfig

from llama_adapter.config import shown
from llama_adapter.errors import CheckpointError, UnsupportedModelError
from llama_adapter.families.multimodal import holds_text_decoder, is_text_decoder
from llama_adapter.model.configuration import LlamaAdapterConfig, read_adapter_config
from llama_adapter.model.loading import folder_of
from llama_adapter.pretrained import load_pretrained


def read_base_config(path: str, revision: str | None = None) -> Any:
    """The config of a base by name or path; CheckpointError where it has no text decoder."""
    config = load_pretrained(AutoConfig, path, what="base", revision=revision or "main")
    _refuse_adapter(config, path, what="base", option="base.model")
    # of a model with code of its own, loading says that it is never run
    loads = is_text_decoder(config) or holds_text_decoder(config)
    if loads or getattr(config, "auto_map", None):
        return config
    raise CheckpointError(
        f"{path!r} is {_kind(config)} (model_type {shown(config.model_type)}), but a base must be "
        "a text decoder, which AutoModelForCausalLM can load, or a model of images and text around "
        "one"
    )


def read_encoder_config(path: str, revision: str | None = None) -> Any:
    """The config of a vision encoder by name or path.

    Raises UnsupportedModelError for a model that takes no pixels.
    """
    config = load_pretrained(AutoConfig, path, what="vision encoder", revision=revision or "main")
    _refuse_adapter(config, path, what="vision encoder", option="vision.model")
    if not _takes_pixels(config) and not hasattr(config, "vision_config"):
        raise UnsupportedModelError(
            f"{path!r} is {_kind(config)} (model_type {shown(config.model_type)}), but a vision "
            "encoder must take pixel_values: give a CLIP or SigLIP model"
        )
    return config


def _refuse_adapter(config: Any, path: str, *, what: str, option: str) -> None:
    """CheckpointError for an adapter of ours, with the model that it was trained on."""
    if not isinstance(config, LlamaAdapterConfig):
        return
    folder = folder_of(path)
    part = "base" if what == "base" else "vision"
    described = None if folder is None else read_adapter_config(folder)[part]
    name = (described or {}).get("name_or_path")
    raise CheckpointError(
        f"{path!r} is an adapter directory, not a {what}: give "
        f"{f'the {what} that it was trained on, {shown(name)}' if name else f'a {what}'}; to "
        f"train the adapter further, adapter.start takes it, not {option}"
    )


def _takes_pixels(config: Any) -> bool:
    classes = MODEL_MAPPING.get(type(config), ())
    classes = classes if isinstance(classes, tuple | list) else (classes,)
    return any(known.main_input_name == "pixel_values" for known in classes)


def _kind(config: Any) -> str:
    """What a model of a config is, in words."""
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        return "a model of images and text"
    if _takes_pixels(config):
        return "a vision encoder"
    if is_text_decoder(config):
        return "a text decoder"
    return "another kind of model"
