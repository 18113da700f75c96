"""`llama-adapter export`: for transformers, vLLM, llama.cpp, peft, or in the authors' format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_adapter.cli.models import MODEL

Written = tuple[dict[str, Any], str]
"""What was written, for programs and for people."""


def _released(directory: Path, out: Path, **options: bool) -> Written:
    """The authors' adapter.pth"""
    from llama_adapter.checkpoints.released_export import export_released

    path = export_released(directory, out=out, **options)
    return {"file": str(path)}, str(path)


def _vllm(directory: Path, out: Path, **options: bool) -> Written:
    """A directory for vLLM with our plugin"""
    from llama_adapter.checkpoints.vllm_export import export_vllm

    report = export_vllm(directory, out=out, **options)
    shown = f"{out}: {report.merged} linears and norms merged; images: {report.mode}"
    shown += _stops(report.stop)
    return {"merged": report.merged, "mode": report.mode, "stop": list(report.stop)}, shown


def _gguf(directory: Path, out: Path, **options: bool) -> Written:
    """A GGUF file for llama.cpp, of what merges fully"""
    from llama_adapter.checkpoints.gguf_export import export_gguf

    report = export_gguf(directory, out=out, **options)
    shown = f"{report.file}: {report.merged} linears and norms merged{_stops(report.stop)}"
    return {"file": str(report.file), "merged": report.merged, "stop": list(report.stop)}, shown


def _peft(directory: Path, out: Path, **options: bool) -> Written:
    """An adapter of peft, of static prompts alone or LoRA alone"""
    from llama_adapter.checkpoints.peft_format import export_peft

    kind = export_peft(directory, out=out, **options)
    return {"peft_type": kind}, f"{out}: {kind}"


def _stops(stop: Sequence[str]) -> str:
    return f"; requests must stop at {', '.join(map(repr, stop))}" if stop else ""


def _merged(directory: Path, out: Path, **options: bool) -> Written:
    """A stock Hugging Face checkpoint"""
    from llama_adapter.checkpoints.merging import export_merged

    report = export_merged(directory, out=out, **options)
    shown = f"{out}: {report.merged} linears and norms merged"
    if report.kept:
        shown += f"; kept as an adapter: {', '.join(report.kept)}"
    if report.problem is not None:
        shown += f"; the chat template is the base's: {report.problem}"
    shown += _stops(report.stop)
    result = {"merged": report.merged, "kept": list(report.kept), "stop": list(report.stop)}
    return result | {"problem": report.problem}, shown


FORMATS: dict[str, Callable[..., Written]] = {
    "merged": _merged,
    "vllm": _vllm,
    "gguf": _gguf,
    "peft": _peft,
    "released": _released,
}
"""What writes each format; its docstring is in the help."""

_Format = Annotated[
    str,
    typer.Option(
        "--format",
        help=" ".join(f"`{name}`: {write.__doc__}." for name, write in FORMATS.items()),
        metavar="|".join(FORMATS),
    ),
]
_Partial = Annotated[
    bool,
    typer.Option(
        "--partial",
        help="Merge linears and norms into OUT/base, keep prompts and vision as an adapter.",
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
    """Merge an adapter into its base, or write it for vLLM, llama.cpp, peft or the authors' code.

    A merged checkpoint needs no code of ours: any engine that serves its family with biases
    serves it. Prompts and vision cannot be merged; --partial keeps them as a smaller adapter.

    \b
    Examples:
      llama-adapter export chat-65b --out chat-65b-merged
      llama-adapter export bias-7b --out bias-7b-merged --partial
      llama-adapter export toy --out toy-vllm --format vllm
      llama-adapter export chat-65b --out chat-65b-gguf --format gguf
      llama-adapter export bias-7b --out released --format released
    """
    from transformers.utils import logging

    from llama_adapter.cli.models import adapter_directory
    from llama_adapter.cli.output import json_only
    from llama_adapter.config import not_one_of
    from llama_adapter.errors import ConfigError

    if format_ not in FORMATS:
        raise ConfigError(not_one_of("--format", format_, FORMATS))
    if partial and format_ != "merged":
        raise ConfigError("--partial belongs to --format merged")
    logging.disable_progress_bar()
    directory = adapter_directory(model)
    with json_only(as_json) as emit:
        options = {"partial": True} if partial else {}
        result, shown = FORMATS[format_](directory, out, overwrite=overwrite, **options)
    if as_json:
        emit({"out": str(out), "format": format_, **result})
    else:
        typer.echo(shown)
