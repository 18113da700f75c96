"""`llama-adapter info`: what an adapter directory holds, without loading its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llama_adapter.cli.models import MODEL_HELP


def info(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show an adapter's semantics, size, base and prompt template.

    \b
    Examples:
      llama-adapter info toy
      llama-adapter info runs/mine/final --json
    """
    from llama_adapter.cli.models import adapter_directory
    from llama_adapter.cli.output import json_only

    with json_only(as_json) as emit:
        described = describe(adapter_directory(model))
    if as_json:
        emit(described)
        return
    for section, content in described.items():
        _print_section(section, content)


def describe(directory: Path) -> dict[str, Any]:
    """Everything about an adapter directory as one JSON-ready dictionary."""
    from llama_adapter.config import AdapterConfig
    from llama_adapter.model.configuration import read_adapter_config
    from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
    from llama_adapter.processing.processor import read_processor_options

    stored = read_adapter_config(directory)
    config = AdapterConfig.from_dict(stored["adapter"])
    weights = directory / ADAPTER_WEIGHTS_NAME
    sizes = tensor_sizes(weights)
    vision = sum(size for name, size in sizes.items() if _is_vision(name))
    total = sum(sizes.values())
    layers = int((stored["base"] or {}).get("num_hidden_layers", 0))
    return {
        "model": str(directory),
        "format_version": stored["format_version"],
        "trainable": {"vision": vision, "language": total - vision, "total": total},
        "file": {"name": weights.name, "bytes": weights.stat().st_size, "tensors": len(sizes)},
        "layers": {
            "base": layers,
            "static": _layers_with(sizes, "prompt"),
            "visual": list(config.visual_layer_indices()),
        },
        "base": stored["base"],
        "vision": stored["vision"],
        "processor": read_processor_options(directory),
        "adapter": config.to_dict(),
        "notes": _notes(stored["base"], directory),
    }


def tensor_sizes(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds; reads its header alone."""
    import math

    from safetensors import SafetensorError, safe_open

    from llama_adapter.errors import CheckpointError

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {name: math.prod(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _is_vision(name: str) -> bool:
    """Whether a tensor belongs to the VISION group, by the names that adapter files use."""
    return name.startswith("visual.") or name.rpartition(".")[2].startswith("visual_")


def _layers_with(names: dict[str, int], what: str) -> list[int]:
    parts = [name.split(".") for name in names if name.endswith(f".{what}")]
    return sorted(int(part) for found in parts for part in found if part.isdecimal())


def _notes(base: dict[str, Any] | None, directory: Path) -> list[str]:
    from transformers import AutoConfig

    from llama_adapter.errors import CheckpointError
    from llama_adapter.model.references import resolve_reference

    name = (base or {}).get("name_or_path", "")
    if not name:
        return ["the base is not named: pass it already loaded"]
    try:
        path = resolve_reference(name, directory=directory)
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    except (OSError, ValueError, CheckpointError):
        return ["the base is not on this machine"]
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts and experts > 1:
        return [
            f"mixture of {experts} experts: attention linears and norms are adapted, "
            "the experts are left alone"
        ]
    return []


def _print_section(name: str, content: Any) -> None:
    if isinstance(content, dict):
        typer.echo(f"{name}:")
        for key, value in content.items():
            shown = f"{value:,}" if isinstance(value, int) and value is not True else value
            typer.echo(f"  {key:<22}{shown}")
    elif isinstance(content, list):
        for entry in content:
            typer.echo(f"note: {entry}")
    else:
        typer.echo(f"{name}: {content}")
