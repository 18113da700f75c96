"""From what a user calls a model to the model: `toy`, or an adapter directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from llama_adapter.model import LlamaAdapterForConditionalGeneration
    from llama_adapter.processing.processor import LlamaAdapterProcessor

TOY = "toy"
MODEL_HELP = "An adapter directory, or `toy` for the built-in one."


def adapter_directory(model: str) -> Path:
    """The directory that MODEL means; `CheckpointError` where there is none."""
    if model == TOY:
        from llama_adapter.miniature.bundled import bundled_adapter

        return bundled_adapter("v2")
    path = Path(model).expanduser()
    if not path.exists():
        raise CheckpointError(f"no adapter directory {model!r} (and no built-in model but `toy`)")
    if not path.is_dir():
        raise CheckpointError(f"{model!r} is a file; an adapter is a directory")
    return path


def load(
    model: str, *, device: str | None = None, **options: Any
) -> tuple[LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor]:
    """MODEL on its base and on a device, with its processor, ready to answer."""
    from llama_adapter.model import LlamaAdapterForConditionalGeneration
    from llama_adapter.model.configuration import read_adapter_config
    from llama_adapter.processing.processor import LlamaAdapterProcessor

    directory = adapter_directory(model)
    read_adapter_config(directory)  # a folder that is not an adapter at all is called that
    processor = LlamaAdapterProcessor.from_pretrained(directory)
    options.setdefault("device_map", torch_device(device))
    loaded = LlamaAdapterForConditionalGeneration.from_pretrained(directory, **options)
    loaded.prepare_for_inference()
    return loaded, processor


def torch_device(name: str | None) -> str:
    """The device of that name, or the best there is; `ConfigError` where it is not there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return name
