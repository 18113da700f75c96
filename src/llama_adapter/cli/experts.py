"""`--expert`: from what a user writes to a pool of experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer import Option

from llama_adapter.cli.models import expert_defaults
from llama_adapter.cli.output import one_line
from llama_adapter.cli.settings import Unread
from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from llama_adapter.experts import Expert, ExpertPool, Report
    from llama_adapter.model import LlamaAdapterForConditionalGeneration
    from llama_adapter.processing.processor import LlamaAdapterProcessor


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSettings:
    """Which experts to ask, and how."""

    section: ClassVar[str] = "Experts"

    expert: Annotated[
        list[str] | None,
        Option(
            help="An expert that describes the image in words: caption, ocr, detection=MODEL, "
            "search=FOLDER, web=URL, or auto (not for serve); may be repeated. Options follow "
            "after commas.",
            metavar="NAME[=VALUE]",
            show_default=False,
        ),
    ] = None
    expert_timeout: Annotated[float, Option(help="Seconds that each expert has.")] = 30.0
    expert_tokens: Annotated[
        int, Option(help="Most tokens of what all experts say in a prompt.")
    ] = 512
    expert_cache: Annotated[
        bool, Option(help="Remember on disk what experts found in an image.")
    ] = True

    def __post_init__(self) -> None:
        if not 0 < self.expert_timeout <= TIMEOUT_MAX:
            raise ConfigError(
                f"--expert-timeout must be above 0 seconds and at most {TIMEOUT_MAX:.0f}, "
                f"got {self.expert_timeout:g}"
            )
        if self.expert_tokens < 1:
            raise ConfigError(f"--expert-tokens must be at least 1, got {self.expert_tokens}")

    @property
    def names(self) -> frozenset[str]:
        """The experts, without their options."""
        return frozenset(re.split("[=,]", text)[0].strip() for text in self.expert or ())

    def unread(self) -> Unread:
        """Options that have no effect, and why."""
        if not self.expert:
            limits = ("expert_timeout", "expert_tokens", "expert_cache")
            yield frozenset(limits), "it needs --expert"

    def check(self, model: str | None) -> None:
        """Refuse what is wrong in an expert's options, before MODEL is loaded."""
        if self.expert:
            from llama_adapter.experts.registry import read_options

            read_options(self.expert, expert_defaults(model))

    def open(
        self,
        model: str | None,
        *,
        loaded: LlamaAdapterForConditionalGeneration | None,
        processor: LlamaAdapterProcessor | None,
        device: str | None = None,
        caption_expert: Callable[[Path, Any], Expert] | None = None,
    ) -> ExpertPool:
        """The pool for MODEL, which is loaded already or answers elsewhere."""
        from llama_adapter.experts import ExpertContext, make_pool
        from llama_adapter.experts.cache import ReportCache, default_cache_file

        named = self.expert or ()
        return make_pool(
            named,
            ExpertContext(
                model=loaded,
                device=device,
                defaults=expert_defaults(model),
                caption_expert=caption_expert,
            ),
            processor=processor,
            timeout=self.expert_timeout,
            max_tokens=self.expert_tokens,
            cache=ReportCache(default_cache_file()) if self.expert_cache and named else None,
        )


def show_reports(reports: Sequence[Report]) -> None:
    """What experts said, and what a user should know about it, on stderr."""
    if not reports:  # then nothing of torch is needed either
        return
    from llama_adapter.experts import report_text

    for report in reports:
        if text := report_text(report):
            typer.echo(f"[{report.expert}] {text}", err=True)
        for note in report.notes:
            typer.echo(f"[{report.expert}] note: {one_line(note)}", err=True)
        if report.problem is not None:
            typer.echo(f"[{report.expert}] failed: {one_line(report.problem)}", err=True)
