"""From what a user calls a model to the model: a built-in name, or an adapter directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.files import expanded

if TYPE_CHECKING:
    from llama_adapter.model import LlamaAdapterForConditionalGeneration
    from llama_adapter.processing.processor import LlamaAdapterProcessor

ExpertDefaults = Mapping[str, Mapping[str, Any]]


def _toy() -> Path:
    from llama_adapter.miniature.bundled import bundled_adapter

    return bundled_adapter("v2")


def _toy_experts() -> ExpertDefaults:
    from llama_adapter.miniature.bundled import bundled_adapter

    return {
        "caption": {"model": str(bundled_adapter("caption"))},
        # the toy decoder knows signs by this sentence, and no language but English
        "ocr": {"wording": "a sign says {}.", "languages": "en"},
    }


def _photos() -> Path:
    from llama_adapter.photos.bundled import bundled_adapter

    return bundled_adapter()


def _photos_experts() -> ExpertDefaults:
    from llama_adapter.photos.bundled import expert_defaults

    return expert_defaults()


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltIn:
    """A model that the package brings along; imported only where it is asked for."""

    directory: Callable[[], Path]
    expert_defaults: Callable[[], ExpertDefaults]
    """What `--expert NAME` means with this model where its options are not given."""


BUILT_IN = {
    "toy": BuiltIn(directory=_toy, expert_defaults=_toy_experts),
    "photos": BuiltIn(directory=_photos, expert_defaults=_photos_experts),
}
BUILT_IN_NAMES = " or ".join(f"`{name}`" for name in BUILT_IN)
MODEL_HELP = f"An adapter directory, or a built-in model: {BUILT_IN_NAMES}."


def _completions(incomplete: str) -> list[str]:
    """Built-in names that go on as typed; where there are none, shells offer files."""
    return [name for name in BUILT_IN if name.startswith(incomplete)]


MODEL = typer.Argument(
    help=MODEL_HELP, metavar="MODEL", show_default=False, autocompletion=_completions
)
"""The argument of every command that takes a model."""
MODEL_OPTION = typer.Option(
    help=f"{MODEL_HELP} With --endpoint, its name there.", autocompletion=_completions
)


def adapter_directory(model: str) -> Path:
    """The directory that MODEL means; `CheckpointError` where there is none."""
    if model in BUILT_IN:
        return BUILT_IN[model].directory()
    path = expanded(model)
    if not path.exists():
        raise CheckpointError(
            f"no adapter directory {model!r} (and no built-in model but {BUILT_IN_NAMES})"
        )
    if not path.is_dir():
        raise CheckpointError(f"{model!r} is a file; an adapter is a directory")
    return path


def expert_defaults(model: str | None) -> ExpertDefaults:
    """What experts are told by default with MODEL."""
    return BUILT_IN[model].expert_defaults() if model in BUILT_IN else {}


def load(
    model: str, *, device: str | None = None, **options: Any
) -> tuple[LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor]:
    """MODEL on its base and on a device, with its processor, ready to answer."""
    from llama_adapter.model import LlamaAdapterForConditionalGeneration
    from llama_adapter.model.configuration import read_adapter_config
    from llama_adapter.processing.processor import LlamaAdapterProcessor

    directory = adapter_directory(model)
    content = read_adapter_config(directory)  # a folder that is not an adapter is called that
    processor = LlamaAdapterProcessor.from_pretrained(directory)
    options.setdefault("device_map", torch_device(device))
    options.setdefault("dtype", _dtype(content, device=str(options["device_map"])))
    loaded = LlamaAdapterForConditionalGeneration.from_pretrained(directory, **options)
    loaded.prepare_for_inference()
    return loaded, processor


def _dtype(content: Mapping[str, Any], *, device: str) -> Any:
    """float32 on a CPU for a base that was trained on in float32 and is stored in half of it.

    Many CPUs compute slowly in float16. None: as the base is stored.
    """
    import torch

    trained = ((content["base"] or {}).get("weights") or {}).get("dtype")
    return torch.float32 if device == "cpu" and trained == "float32" else None


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
