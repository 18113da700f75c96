"""`llama-adapter export`: a stock checkpoint, one for vLLM, or the authors' file format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llama_adapter.cli.models import MODEL

_Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="`merged`: a stock Hugging Face checkpoint. `vllm`: a directory for vLLM with our "
        "plugin. `released`: the authors' adapter.pth.",
        metavar="merged|vllm|released",
    ),
]
_Partial = Annotated[
    bool,
    typer.Option(
        "--partial",
        help="Fold linears and norms into OUT/base, keep prompts and vision as an adapter.",
    ),
]


def export(
    model: Annotated[str, MODEL],
    out: Annotated[Path, typer.Option(help="The directory to write.", metavar="DIR")],
    format_: _Format = "merged",
    partial: _Partial = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model directory at --out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base, write it for vLLM, or in the authors' format.

    A merged checkpoint needs no code of ours: any engine that serves its family with biases
    serves it. Prompts and vision cannot be merged; --partial keeps them as a smaller adapter.

    \b
    Examples:
      llama-adapter export chat-65b --out chat-65b-merged
      llama-adapter export bias-7b --out bias-7b-merged --partial
      llama-adapter export toy --out toy-vllm --format vllm
      llama-adapter export bias-7b --out released --format released
    """
    from transformers.utils import logging

    from llama_adapter.cli.models import adapter_directory
    from llama_adapter.cli.output import json_only
    from llama_adapter.errors import ConfigError

    if format_ not in ("merged", "vllm", "released"):
        raise ConfigError(f"--format must be merged, vllm or released, got {format_!r}")
    if partial and format_ != "merged":
        raise ConfigError("--partial belongs to --format merged")
    logging.disable_progress_bar()
    directory = adapter_directory(model)
    with json_only(as_json) as emit:
        if format_ == "released":
            result, shown = _released(directory, out, overwrite=overwrite)
        elif format_ == "vllm":
            result, shown = _vllm(directory, out, overwrite=overwrite)
        else:
            result, shown = _merged(directory, out, partial=partial, overwrite=overwrite)
    if as_json:
        emit({"out": str(out), "format": format_, **result})
    else:
        typer.echo(shown)


def _released(directory: Path, out: Path, *, overwrite: bool) -> tuple[dict[str, Any], str]:
    """What was written, for programs and for people."""
    from llama_adapter.checkpoints.released_export import export_released

    path = export_released(directory, out=out, overwrite=overwrite)
    return {"file": str(path)}, str(path)


def _vllm(directory: Path, out: Path, *, overwrite: bool) -> tuple[dict[str, Any], str]:
    """What was written, for programs and for people."""
    from llama_adapter.checkpoints.vllm_export import export_vllm

    report = export_vllm(directory, out=out, overwrite=overwrite)
    shown = f"{out}: {report.merged} linears and norms merged; images: {report.mode}"
    if report.stop:
        shown += f"; requests must stop at {', '.join(map(repr, report.stop))}"
    return {"merged": report.merged, "mode": report.mode, "stop": list(report.stop)}, shown


def _merged(
    directory: Path, out: Path, *, partial: bool, overwrite: bool
) -> tuple[dict[str, Any], str]:
    """What was written, for programs and for people."""
    from llama_adapter.checkpoints.merging import export_merged

    report = export_merged(directory, out=out, partial=partial, overwrite=overwrite)
    shown = f"{out}: {report.merged} linears and norms merged"
    if report.kept:
        shown += f"; kept as an adapter: {', '.join(report.kept)}"
    return {"merged": report.merged, "kept": list(report.kept)}, shown
