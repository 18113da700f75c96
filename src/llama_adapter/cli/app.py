"""The program `llama-adapter`: its commands, and what an error becomes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from llama_adapter.cli.chat import chat
from llama_adapter.cli.demo import demo
from llama_adapter.cli.eval import eval_
from llama_adapter.cli.export import export
from llama_adapter.cli.get import get
from llama_adapter.cli.import_ import import_
from llama_adapter.cli.info import info
from llama_adapter.cli.output import refusals, refuse, set_up_streams
from llama_adapter.cli.plot import plot
from llama_adapter.cli.report import report
from llama_adapter.cli.score import score
from llama_adapter.cli.serve import serve
from llama_adapter.cli.settings import CommandInSections, with_settings
from llama_adapter.cli.train import train

# Plain help: rich would double the time that `--help` takes, and rewrap the examples.
app = typer.Typer(
    name="llama-adapter",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo")(demo)
app.command("get")(get)
app.command("train")(train)
app.command("plot")(plot)
app.command("chat", cls=CommandInSections)(with_settings(chat))
app.command("serve", cls=CommandInSections)(with_settings(serve))
app.command("import")(import_)
app.command("export")(export)
app.command("info")(info)
app.command("score")(score)
app.command("eval", cls=CommandInSections)(with_settings(eval_))
app.command("report")(report)


def _print_version(wanted: bool) -> None:
    if wanted:
        from llama_adapter import __version__

        typer.echo(f"llama-adapter {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Turn a frozen text LLM into a visual chat assistant.

    Every command has --help with examples. To begin: `llama-adapter demo`, or
    `llama-adapter chat toy --image scene.png`. MODEL is an adapter directory, or a built-in
    model: `toy` (drawn scenes) or `photos`.
    """


def _quiet_libraries() -> None:
    """What libraries write without being asked, where nobody can act on it."""
    if not sys.stderr.isatty():  # bars of a line each
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # a faster kernel that nobody has to have
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # PIL's limit of pixels: ours decide, and what is beyond them is refused in words of its own
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")


def _yield_when_busy() -> None:
    """Let threads that wait for each other sleep soon, before torch starts them.

    By default they turn in circles for a millisecond. Where other work has the cores, that is what
    most of a step goes into: it takes seven times as long (`docs/speed.md`).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def main() -> None:
    """Run the command line and exit with its status."""
    if sys.stdout is None:
        refuse("standard output is closed")
    set_up_streams()
    _quiet_libraries()
    _yield_when_busy()
    try:
        with refusals():
            app(prog_name=str(app.info.name))
    except MemoryError:
        refuse("out of memory")
    except KeyboardInterrupt:
        sys.exit(130)
