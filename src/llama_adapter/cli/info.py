"""`llama-adapter info`: what an adapter directory holds, without loading its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llama_adapter.cli.models import BUILT_IN_NAMES, MODEL


def info(
    model: Annotated[str | None, MODEL] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Sizes on a base of this shape instead, without any weights.",
            metavar="llama-7b|13b|65b|3-8b",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="With --shape: the published setting to count, such as v1; v2 unless told.",
            metavar="NAME",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show an adapter's kind, settings, size, base and prompt template.

    \b
    Examples:
      llama-adapter info toy
      llama-adapter info runs/mine/adapter --json
      llama-adapter info --shape llama-7b
    """
    from llama_adapter.cli.models import adapter_directory
    from llama_adapter.cli.output import json_only
    from llama_adapter.errors import ConfigError

    if (model is None) == (shape is None):
        raise ConfigError(
            f"info takes an adapter directory (or {BUILT_IN_NAMES}), or --shape, and not both"
        )
    if preset is not None and shape is None:
        raise ConfigError(
            "--preset says what to count with --shape; an adapter has its own setting"
        )
    with json_only(as_json) as emit:
        if shape is not None:
            from llama_adapter.checkpoints.description import describe_shape

            described = describe_shape(shape, preset=preset or "v2")
        else:
            described = describe(adapter_directory(str(model)))
    if as_json:
        emit(described)
        return
    for section, content in described.items():
        _print_section(section, content)


def describe(directory: Path) -> dict[str, Any]:
    """Everything about an adapter directory as one JSON-ready dictionary."""
    from llama_adapter.checkpoints.description import describe_directory
    from llama_adapter.processing.processor import PROCESSOR_FILE, read_processor_options

    described = describe_directory(directory)
    has_processor = (directory / PROCESSOR_FILE).is_file()
    if not has_processor:
        described["notes"].append(
            f"{PROCESSOR_FILE} is missing: it takes token ids only; chat and eval need it"
        )
    processor = read_processor_options(directory) if has_processor else None
    return {"model": str(directory), **described, "processor": processor}


def _print_section(name: str, content: Any) -> None:
    if isinstance(content, dict):
        typer.echo(f"{name}:")
        for key, value in content.items():
            typer.echo(f"  {key:<22}{_shown(value)}")
    elif isinstance(content, list):
        for entry in content:
            typer.echo(f"note: {entry}")
    else:
        typer.echo(f"{name}: {_shown(content)}")


def _shown(value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value in (None, ""):
        return "–"
    return f"{value:,}" if is_number else value
