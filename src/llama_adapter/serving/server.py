"""The process: a socket, uvicorn, signals, and an end that loses nothing that was accepted."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_adapter.errors import ServingError
from llama_adapter.generation.requests import Engine
from llama_adapter.serving.gate import Gate
from llama_adapter.serving.limits import Limits
from llama_adapter.serving.metrics import log

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_BYTES_SECONDS = 5
_SLOWEST_READER = 1024
"""Bytes a second of a finished answer that its client must take."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that connections are refused on until the server runs; ServingError for none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ServingError(f"cannot listen on {host} port {port}: {reason}") from error
    return bound


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT: then answers what it has accepted, and returns."""

    def __init__(
        self, app: Any, gate: Gate, engine: Engine, limits: Limits, *, drain_seconds: float
    ) -> None:
        class Protocol(_TimedProtocol):
            header_seconds = limits.header_seconds

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                limit_concurrency=limits.max_connections,
                timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
            )
        )
        self._gate = gate
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at the first signal, leave at the second; unlike uvicorn's, the end is a return."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begin to drain; the second call ends the server at once."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._gate.is_draining = True
        log("draining", active=self._gate.active)
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Keep listening, so that new requests hear why they are refused, until all is answered."""
        until = time.monotonic() + self._drain_seconds
        while self._gate.admission.count and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._engine.drain, max(0.0, until - time.monotonic()))
        self.should_exit = True
        log("stopped")


class _TimedProtocol(H11Protocol):
    """Closes connections that neither bring a request's headers nor take an answer in time."""

    header_seconds = 10.0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait_for_headers()

    def handle_events(self) -> None:
        """Read what has come; a request under way stops the clock."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._timer.cancel()
            # for answers that nobody reads: closing would wait for the reader
            self.cycle.scope["abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def on_response_complete(self) -> None:
        """Wait for the next request of the connection, which may be there already."""
        self._wait_for_headers()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.header_seconds, self._give_up)

    def _give_up(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            if not self.transport.is_closing():
                self.transport.close()
        elif self._unsent - unsent > _SLOWEST_READER * self.header_seconds:
            self._wait_for_headers()
        else:
            self.transport.abort()  # closing would wait for the reader
