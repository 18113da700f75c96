"""`--expert`: from what a user writes to a pool of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any

import typer

from llama_adapter.cli.models import TOY
from llama_adapter.cli.output import one_line
from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from llama_adapter.experts import ExpertPool, Report
    from llama_adapter.model import LlamaAdapterForConditionalGeneration
    from llama_adapter.processing.processor import LlamaAdapterProcessor


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertChoice:
    """Which experts to ask, and how, as the options say; refused before a model is loaded."""

    model: str | None
    """MODEL, for what experts are told by default."""
    names: tuple[str, ...] = ()
    timeout: float = 30.0
    max_tokens: int = 512
    cache: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= TIMEOUT_MAX:
            raise ConfigError(
                f"--expert-timeout must be above 0 seconds and at most {TIMEOUT_MAX:.0f}, "
                f"got {self.timeout:g}"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"--expert-tokens must be at least 1, got {self.max_tokens}")
        if self.names:
            from llama_adapter.experts.registry import read_options

            read_options(self.names, _defaults(self.model))

    def open(
        self,
        *,
        loaded: LlamaAdapterForConditionalGeneration | None,
        processor: LlamaAdapterProcessor | None,
        device: str | None = None,
    ) -> ExpertPool:
        """The pool for MODEL, which is loaded already or answers elsewhere."""
        from llama_adapter.experts import ExpertContext, make_pool
        from llama_adapter.experts.cache import ReportCache, default_cache_file

        cache = ReportCache(default_cache_file()) if self.cache and self.names else None
        context = ExpertContext(model=loaded, device=device, defaults=_defaults(self.model))
        return make_pool(
            self.names,
            context,
            processor=processor,
            timeout=self.timeout,
            max_tokens=self.max_tokens,
            cache=cache,
        )


def _defaults(model: str | None) -> dict[str, dict[str, Any]]:
    """What experts are told where MODEL is `toy`."""
    if model != TOY:
        return {}
    from llama_adapter.miniature.bundled import bundled_adapter

    return {
        "caption": {"model": str(bundled_adapter("caption"))},
        # the toy decoder knows signs by this sentence, and no language but English
        "ocr": {"wording": "a sign says {}.", "languages": "en"},
    }


def show_reports(reports: Sequence[Report]) -> None:
    """What experts said, and what a user should know about it, on stderr."""
    from llama_adapter.experts import report_text

    for report in reports:
        if text := report_text(report):
            typer.echo(f"[{report.expert}] {text}", err=True)
        for note in report.notes:
            typer.echo(f"[{report.expert}] note: {one_line(note)}", err=True)
        if report.problem is not None:
            typer.echo(f"[{report.expert}] failed: {one_line(report.problem)}", err=True)
