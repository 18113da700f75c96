"""What every request passes before it is read: origin, key, a free place, a bounded body.

Pure ASGI, so that it sees a client leave and the last byte go out.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from llama_adapter.errors import UnavailableError
from llama_adapter.serving.auth import Keys, check_admin_key, check_key, is_loopback
from llama_adapter.serving.errors import ENDING, ApiError, as_api_error
from llama_adapter.serving.limits import Admission, read_body
from llama_adapter.serving.metrics import Metrics, log

OPEN = frozenset(("/", "/health", "/ready"))
"""What needs no key."""
GENERATING = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses"))
ROUTES = OPEN | GENERATING | {
    "/metrics", "/openapi.json", "/detokenize", "/tokenize", "/v1/adapters", "/v1/models",
}  # fmt: skip
UNDER = ("/v1/adapters", "/v1/models")
"""Roots of routes that end in a name."""
_DISCARD_SECONDS = 5.0
_SEND_SECONDS = 30.0
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


@dataclass(kw_only=True, slots=True)
class Gate:
    """The application behind its checks; logs and counts each request once it is over."""

    app: Any
    admission: Admission
    metrics: Metrics
    keys: Keys
    admin_keys: Keys
    origins: Sequence[str] = ()
    """Other sites whose pages may talk to the server, and by whose names it may be reached."""
    is_loopback: bool = True
    """Whether only this machine is served: requests by another host's name are refused then."""
    is_draining: bool = False
    active: int = field(default=0, init=False)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        self.active += 1
        try:
            with ExitStack() as held:
                scope["held"] = held  # what is let go of when the request is over, however it ends
                receive = await self._admit(scope, receive, held)
                await self.app(scope, receive, exchange.send)
        except asyncio.CancelledError:
            exchange.fields["error"] = "cancelled"
            raise
        except Exception as error:
            has_left = isinstance(error, OSError | ClientDisconnect)
            refusal = (exchange.stalled if has_left else None) or as_api_error(error)
            exchange.fields["error"] = refusal.code
            if refusal.status == 500:
                log("failed", level=logging.ERROR, failed=True, request_id=exchange.id)
            if not exchange.status:
                response = JSONResponse(refusal.body, refusal.status, refusal.headers)
                with suppress(OSError):
                    await response(scope, receive, exchange.send)
                    await _discard(receive)
        finally:
            self.active -= 1
            self._report(exchange)

    async def _admit(self, scope: Any, receive: Any, held: ExitStack) -> Any:
        """Refuse what must not be served; else what the application receives."""
        path, headers = scope["path"], dict(scope["headers"])
        self._check_origin(headers)
        is_operators = path == "/v1/adapters" or path.startswith("/v1/adapters/")
        if is_operators:
            check_admin_key(self.admin_keys, headers)
        elif path not in OPEN:
            check_key(self.keys, headers)
        if scope["method"] in {"GET", "HEAD", "OPTIONS"} or path in OPEN:
            return receive  # nothing reads a body there
        if path in GENERATING and self.is_draining:
            raise UnavailableError(ENDING)
        if not is_operators:  # whatever a body is for, there is memory for so many
            held.enter_context(self.admission.enter())
        return _Replay(await read_body(scope, receive, self.admission.limits), receive)

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """ApiError 403 for pages of other sites, also where a name of theirs leads here."""
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        try:
            is_local = not host or is_loopback(urlsplit(f"//{host}").hostname or "")
            is_own = not origin or origin in self.origins or urlsplit(origin).netloc == host
            is_listed = any(urlsplit(listed).netloc == host for listed in self.origins)
        except ValueError:
            is_local = is_own = is_listed = False
        if self.is_loopback and not (is_local or is_listed):
            raise ApiError(
                403,
                "this server answers to localhost alone, not to other names; behind a proxy start "
                "it with --cors-origin and the site's address",
                code="bad_host",
            )
        if not is_own:
            raise ApiError(
                403,
                "this server takes no requests from other sites; its operator may let some in with "
                "--cors-origin",
                code="bad_origin",
            )

    def _report(self, exchange: _Exchange) -> None:
        path, seconds = exchange.path, time.monotonic() - exchange.started
        under = next((f"{r}/{{name}}" for r in UNDER if path.startswith(f"{r}/")), "other")
        route = path if path in ROUTES else under
        self.metrics.requests.labels(route, str(exchange.status or 499)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if code := exchange.fields.get("error"):
            self.metrics.errors.labels(code).inc()
        log(
            "request",
            request_id=exchange.id,
            method=exchange.method,
            route=route,
            status=exchange.status or 499,
            seconds=round(seconds, 4),
            **exchange.fields,
        )


class _Exchange:
    """One request and what is known of its answer."""

    def __init__(self, scope: Any, send: Any) -> None:
        self.id = uuid.uuid4().hex
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.started = time.monotonic()
        self.status = 0
        """0 until an answer begins."""
        self.stalled: ApiError | None = None
        """Set where the client does not take its answer."""
        self.fields: dict[str, Any] = {}
        """What the application adds to the log: counts and names, never contents."""
        scope["log"], scope["started"] = self.fields, self.started
        self._send = send
        self._scope = scope

    async def send(self, message: Any) -> None:
        """Send on, with headers of ours."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *_HEADERS]
            headers.append((b"x-request-id", self.id.encode()))
            message = {**message, "headers": headers}
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                await self._send(message)
        except TimeoutError as error:
            self._scope.get("abort", lambda: None)()
            self.stalled = ApiError(499, "the client does not read", code="client_stalled")
            # not of a class that the application answers to: its answer has begun
            raise ConnectionAbortedError from error


class _Replay:
    """Hands a body that has been read to the application, then what the client does."""

    def __init__(self, body: bytes, receive: Any) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Any:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


async def _discard(receive: Any) -> None:
    """Take for a moment what a refused client still sends, so that it reads why it was refused."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (await receive()).get("more_body", False):
                pass
