"""What an operator watches: Prometheus metrics, and one JSON line in the log for each request."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llama_adapter.generation.requests import Engine, Usage

PREFIX = "llama_adapter_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

logger = logging.getLogger("llama_adapter.serving")


class Metrics:
    """Counters of one server, and gauges that look at its engine when they are read."""

    def __init__(self, engine: Engine, under_way: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, labels, registry=registry, buckets=_SECONDS)

        self.requests = counter("requests", "Requests answered", "route", "status")
        self.errors = counter("errors", "Requests refused or failed, by the error's code", "code")
        self.answers = counter("answers", "Answers by why they ended", "model", "finish")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens that were reused", "model")
        self.completion_tokens = counter("completion_tokens", "Tokens of answers", "model")
        self.seconds = histogram("request_seconds", "From a request to its last byte", "route")
        self.first_token = histogram("first_token_seconds", "From a request to its first token")
        self.prepare = histogram("prepare_seconds", "Reading a request's images and its prompt")
        for name, text, read in (
            ("under_way", "Answers asked for and not complete", under_way),
            ("queued", "Requests that wait for a row", lambda: engine.stats.queued),
            ("rows", "Answers that are worked on at once", lambda: engine.stats.rows),
            ("busy_rows", "Rows that are in use", lambda: engine.stats.busy_rows),
            ("adapters", "Adapters that are loaded", lambda: len(engine.adapters)),
            ("ready", "1 while requests are taken", lambda: engine.health.state == "ready"),
        ):
            Gauge(PREFIX + name, text, registry=registry).set_function(read)

    def count_usage(self, model: str, usage: Usage) -> None:
        """Add what a request has cost."""
        self.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self.cached_tokens.labels(model).inc(usage.cached_tokens)
        self.completion_tokens.labels(model).inc(usage.completion_tokens)

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """A log record as a line of JSON; messages of exceptions are left out, they may quote users."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames[-12:]]
        return json.dumps(line, default=str)


def log(event: str, *, level: int = logging.INFO, failed: bool = False, **fields: Any) -> None:
    """Log an event with its fields; `failed` adds where the present exception comes from."""
    logger.log(level, event, extra={"fields": fields}, exc_info=failed)


def set_up_logging(level: str) -> None:
    """JSON lines on stderr, from this package and from uvicorn."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("llama_adapter.serving", "uvicorn"):
        chosen = logging.getLogger(name)
        chosen.handlers, chosen.propagate = [handler], False
        chosen.setLevel(level.upper() if name != "uvicorn" else "WARNING")
