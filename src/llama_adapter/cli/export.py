"""`llama-adapter export`: a stock Hugging Face checkpoint, or the authors' file format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llama_adapter.cli.models import MODEL_HELP


def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)],
    out: Annotated[Path, typer.Option(help="The directory to write.", metavar="DIR")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="`merged`: a stock Hugging Face checkpoint. `released`: the authors' adapter.pth.",
            metavar="merged|released",
        ),
    ] = "merged",
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Fold linears and norms into OUT/base, keep prompts and vision as an adapter.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model directory at --out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base, or write it in the authors' format.

    A merged checkpoint needs no code of ours: any engine that serves its family with biases
    serves it. Prompts and vision cannot be folded; --partial keeps them as a smaller adapter.

    \b
    Examples:
      llama-adapter export chat-65b --out chat-65b-merged
      llama-adapter export bias-7b --out bias-7b-folded --partial
      llama-adapter export bias-7b --out released --format released
    """
    from transformers.utils import logging

    from llama_adapter.checkpoints.merging import export_merged
    from llama_adapter.checkpoints.released_export import export_released
    from llama_adapter.cli.models import adapter_directory
    from llama_adapter.cli.output import json_only
    from llama_adapter.errors import ConfigError

    if format_ not in ("merged", "released"):
        raise ConfigError(f"--format must be merged or released, got {format_!r}")
    if partial and format_ == "released":
        raise ConfigError("--partial belongs to --format merged")
    logging.disable_progress_bar()
    directory = adapter_directory(model)
    with json_only(as_json) as emit:
        if format_ == "released":
            path = export_released(directory, out=out, overwrite=overwrite)
            result: dict[str, Any] = {"out": str(out), "format": format_, "file": str(path)}
            shown = str(path)
        else:
            report = export_merged(directory, out=out, partial=partial, overwrite=overwrite)
            result = {
                "out": str(out),
                "format": format_,
                "folded": report.folded,
                "kept": list(report.kept),
            }
            shown = f"{out}: {report.folded} linears and norms folded"
            if report.kept:
                shown += f"; kept as an adapter: {', '.join(report.kept)}"
    if as_json:
        emit(result)
    else:
        typer.echo(shown)
