"""`llama-adapter import`: a checkpoint of the authors or of peft becomes an adapter directory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_adapter.cli.numbers import between

if TYPE_CHECKING:
    from llama_adapter.checkpoints import ImportReport


_Base = Annotated[
    Path,
    typer.Option(
        help="LLaMA in Meta's layout (params.json, consolidated.*.pth) or a Hugging Face "
        "directory.",
        metavar="DIR",
        show_default=False,
    ),
]
_Vision = Annotated[
    Path | None,
    typer.Option(
        help="OpenAI's CLIP (ViT-L-14.pt, or safetensors) or a Hugging Face CLIP directory.",
        metavar="FILE|DIR",
    ),
]
_Gate = Annotated[
    str,
    typer.Option(
        help="V1 only: `tanh` as in its training code, `raw` as in its inference code.",
        metavar="tanh|raw",
    ),
]
_PromptLength = Annotated[
    int | None,
    typer.Option(
        callback=between(1, 100_000), help="Prompts per layer, where the file does not say (V1)."
    ),
]
_VisualHeads = Annotated[
    int | None,
    typer.Option(
        callback=between(1, 10_000), help="Heads of the visual blocks, if not the authors' 16."
    ),
]
_AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Import onto a base it was not trained for.")
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model directory at --out.")
]


def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A released .pth file, or a directory of peft's AdaptionPrompt.",
            metavar="CHECKPOINT",
            show_default=False,
        ),
    ],
    base: _Base,
    out: Annotated[Path, typer.Option(help="The adapter directory to write.", metavar="DIR")],
    vision: _Vision = None,
    gate: _Gate = "tanh",
    prompt_length: _PromptLength = None,
    visual_heads: _VisualHeads = None,
    allow_other_base: _AllowOtherBase = False,
    overwrite: _Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn a released LLaMA-Adapter checkpoint into an adapter directory.

    V1, V2 (BIAS, LORA-BIAS, CAPTION), V2.1 and the 65B chat weights are recognized by content.
    A base in Meta's layout is converted once into OUT/base; one of Hugging Face is referenced.
    peft's AdaptionPrompt on a Hugging Face base becomes an adapter with raw gates.

    \b
    Examples:
      llama-adapter import BIAS-7B.pth --base llama/7B --vision ViT-L-14.pt --out bias-7b
      llama-adapter import adapter_len10_layer30.pth --base llama/7B --out v1 --gate raw
    """
    from llama_adapter.checkpoints import import_released
    from llama_adapter.checkpoints.peft_format import has_peft_prompts, import_peft
    from llama_adapter.checkpoints.settings import Overrides
    from llama_adapter.cli.output import json_only
    from llama_adapter.errors import ConfigError

    if gate not in ("tanh", "raw"):
        raise ConfigError(f"--gate must be tanh or raw, got {gate!r}")
    if has_peft_prompts(checkpoint):
        with json_only(as_json) as emit:
            layers = import_peft(checkpoint, base=base, out=out, overwrite=overwrite)
        if as_json:
            emit({"out": str(out), "layers": layers})
        else:
            typer.echo(f"{out}: static prompts of {layers} layers, one gate for all heads of each")
        return
    with json_only(as_json) as emit, _progress() as progress:
        report = import_released(
            checkpoint,
            base=base,
            out=out,
            vision=vision,
            gate=gate,
            overrides=Overrides(prompt_length=prompt_length, projector_heads=visual_heads),
            allow_other_base=allow_other_base,
            overwrite=overwrite,
            progress=progress,
        )
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        emit(_as_json(report))
    else:
        _print(report)


def _as_json(report: ImportReport) -> dict[str, Any]:
    values = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    return {**values, "config": report.config.to_dict()}


def _print(report: ImportReport) -> None:
    typer.echo(f"{report.out}: {report.kind}, {report.num_tensors} tensors, base {report.base}")
    if report.unused:
        typer.echo(f"without effect in this setting: {', '.join(report.unused)}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Progress on stderr while the base is converted; transformers' own bars are off."""
    from transformers.utils import logging

    from llama_adapter.cli.progress import stages

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with stages() as stage:
            shown = 0
            advance: Callable[[int], None] | None = None

            def progress(done: int, total: int) -> None:
                nonlocal advance, shown
                advance = advance or stage("converting the base, MiB", total >> 20)
                advance((done >> 20) - shown)
                shown = done >> 20

            yield progress
    finally:
        if had_bars:
            logging.enable_progress_bar()
