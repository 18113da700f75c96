"""Commands that take settings objects: each field of a dataclass is an option.

Typer reads a function's parameters one by one. Here a parameter may be a dataclass, whose
`section` heads its options in `--help`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from llama_adapter.errors import ConfigError


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: an option for each field of its settings."""
    hints = get_type_hints(command, include_extras=True)
    settings: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in settings:
            parameters += _options(settings[parameter.name])
        else:
            hint = hints[parameter.name]
            parameters.append(
                parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in settings.items()
        }
        command(**given, **chosen)

    described: Any = run
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _options(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    parameters = []
    for field in fields(kind):
        of_type, option = get_args(hints[field.name])
        option.rich_help_panel = kind.section
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=Annotated[of_type, option],
            )
        )
    return parameters


class CommandInSections(TyperCommand):
    """A command whose plain `--help` lists options under the titles of their settings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, the options that belong nowhere, then a section for each title."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            is_argument = parameter.param_type_name == "argument"
            title = getattr(parameter, "rich_help_panel", None)
            if record is not None:
                default = "Arguments" if is_argument else "Options"
                sections.setdefault(title or default, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def given_options(context: typer.Context) -> dict[str, str]:
    """The options on the command line: how each is written, by its parameter's name."""
    given = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            written = parameter.opts
            if parameter.secondary_opts and context.params.get(str(parameter.name)) is False:
                written = parameter.secondary_opts
            given[str(parameter.name)] = written[0]
    return given


Unread = Iterator[tuple[frozenset[str], str]]
"""Options, by their parameters' names, that have no effect where they are given, and why."""


def refuse_unread(given: Mapping[str, str], unread: Unread) -> None:
    """`ConfigError` for an option on the command line that would have no effect."""
    for names, why in unread:
        if found := [written for name, written in given.items() if name in names]:
            raise ConfigError(f"{found[0]} has no effect: {why}")
