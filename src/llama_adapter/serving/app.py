"""The application: OpenAI's routes, the operator's, and the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from llama_adapter.errors import LlamaAdapterError
from llama_adapter.generation.requests import GenerationRequest
from llama_adapter.serving.answers import (
    DONE,
    ChatFormat,
    Choice,
    CompletionFormat,
    Format,
    ResponsesFormat,
    event,
)
from llama_adapter.serving.auth import Keys
from llama_adapter.serving.errors import ApiError, as_api_error, as_validation_error
from llama_adapter.serving.gate import Gate
from llama_adapter.serving.limits import Admission
from llama_adapter.serving.metrics import Metrics, log
from llama_adapter.serving.schema import (
    AdapterRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from llama_adapter.serving.service import Reader, Service, Waker, ends_when_client_leaves

PAGE = Path(__file__).parent / "page" / "index.html"
_NO_STORE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def make_app(
    service: Service,
    *,
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
    origins: Sequence[str] = (),
    is_loopback: bool = True,
) -> tuple[Any, Gate]:
    """The ASGI application, and its gate, which can be told to drain."""
    admission = Admission(service.limits)
    metrics = Metrics(service.engine, lambda: admission.count)
    routes = _Routes(service, admission, metrics)
    app = FastAPI(
        title="llama-adapter",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=routes.lifespan,
    )
    routes.add_to(app)
    app.add_exception_handler(LlamaAdapterError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(Exception, _refuse)
    gate = Gate(
        app=app,
        admission=admission,
        metrics=metrics,
        keys=keys or Keys(),
        admin_keys=admin_keys or Keys(),
        origins=tuple(origins),
        is_loopback=is_loopback,
    )
    routes.gate = gate
    if not origins:
        return gate, gate
    cors = CORSMiddleware(
        gate, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    return cors, gate


async def _refuse(request: Request, error: Exception) -> Response:
    """OpenAI's envelope around any error."""
    if isinstance(error, RequestValidationError):
        refusal = as_validation_error(error.errors())
    elif isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        message = str(error.detail)
        if error.status_code == 404:
            message = (
                f"there is no {request.url.path[:100]!r}; the paths of OpenAI's protocol begin "
                "with /v1, and /openapi.json lists all"
            )
        refusal = ApiError(error.status_code, message, code=code, headers=error.headers)
    else:
        refusal = as_api_error(error)
    request.scope["log"]["error"] = refusal.code
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


class _Routes:
    """The routes of one service."""

    gate: Gate
    waker: Waker

    def __init__(self, service: Service, admission: Admission, metrics: Metrics) -> None:
        self.service = service
        self.engine = service.engine
        self.admission = admission
        self.metrics = metrics
        self.started = int(time.time())
        page = PAGE.read_text(encoding="utf-8")
        self._page = HTMLResponse(
            page, headers={"Content-Security-Policy": _policy(page), "Cache-Control": "no-cache"}
        )

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self.waker = Waker()
        yield
        self.service.threads.shutdown(wait=False, cancel_futures=True)

    def add_to(self, app: FastAPI) -> None:
        shown: dict[str, Callable[..., Any]] = {
            "/": self.page,
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.prometheus,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/v1/adapters": self.adapters,
        }
        for path, route in shown.items():
            app.add_api_route(path, route, methods=["GET"], response_model=None)
        asked: dict[str, Callable[..., Any]] = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/v1/responses": self.respond,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/v1/adapters": self.load_adapter,
        }
        for path, route in asked.items():
            app.add_api_route(path, route, methods=["POST"], response_model=None)
        app.add_api_route(
            "/v1/adapters/{name}", self.unload_adapter, methods=["DELETE"], response_model=None
        )

    # --- answers ------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation, with its images."""
        format_of = partial(ChatFormat, logprobs=body.logprobs)
        return await self._answer(body, request, format_of)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """A text that goes on."""
        format_of = partial(CompletionFormat, logprobs=body.logprobs is not None)
        return await self._answer(body, request, format_of)

    async def respond(self, body: ResponsesRequest, request: Request) -> Response:
        """An answer in the form of OpenAI's newer interface; nothing is stored."""

        def format_of(*, model: str, **_: Any) -> ResponsesFormat:
            return ResponsesFormat(model=model)

        try:
            chat = body.as_chat()
        except ValidationError as error:
            raise as_validation_error(error.errors()) from error
        return await self._answer(chat, request, format_of)

    async def _answer(
        self,
        asked: ChatRequest | CompletionRequest,
        request: Request,
        format_of: Callable[..., Format],
    ) -> Response:
        adapter = self.service.adapter(asked.model)
        self.service.check_answers(asked.n)
        request.scope["log"] |= {"model": asked.model, "stream": asked.stream}
        options = asked.stream_options
        form = format_of(
            model=asked.model,
            tokenizer=self.engine.processor(adapter).tokenizer,
            include_usage=options is not None and options.include_usage,
        )
        held = request.scope["held"]
        async with ends_when_client_leaves(request.receive):
            held.enter_context(self.admission.enter(asked.n - 1))
            reader = Reader(self.engine, await self._request(asked, adapter, request), self.waker)
            held.callback(reader.generation.cancel)
            # the error of a stream that cannot even begin has a status too
            if not asked.stream or await reader.has_failed():
                choices = await self._choices(reader, asked.n, request)
                return JSONResponse(form.whole(choices, reader.generation.usage))
        return StreamingResponse(
            self._events(reader, form, request), media_type="text/event-stream", headers=_NO_STORE
        )

    async def _request(
        self, asked: ChatRequest | CompletionRequest, adapter: str | None, request: Request
    ) -> GenerationRequest:
        """What the engine is asked, with the prompt made in a thread."""
        begun = time.monotonic()
        started = request.scope["started"]
        until = started + self.service.limits.request_seconds
        prompt, processor = await self.service.prepare(asked, adapter, until=until)
        self.metrics.prepare.observe(time.monotonic() - begun)
        return self.service.request(
            prompt, adapter, asked.sampling, started=started, encoded_by=processor
        )

    async def _choices(self, reader: Reader, answers: int, request: Request) -> list[Choice]:
        """The answers, once all of them have ended."""
        choices = [Choice() for _ in range(answers)]
        try:
            async for part in reader.increments():
                choices[part.choice].add(part)
        finally:
            self._count(reader, choices, request)
        return choices

    async def _events(self, reader: Reader, form: Format, request: Request) -> AsyncIterator[bytes]:
        """The answers as server-sent events; an error becomes the last event."""
        choices = [Choice() for _ in range(reader.generation.request.sampling.n)]
        try:
            for piece in form.first(len(choices)):
                yield piece
            async for part in reader.increments():
                choices[part.choice].add(part)
                for piece in form.next(part):
                    yield piece
            for piece in form.last(choices, reader.generation.usage):
                yield piece
        except asyncio.CancelledError:
            request.scope["log"]["error"] = "client_gone"
            raise
        except Exception as error:
            refusal = as_api_error(error)
            request.scope["log"]["error"] = refusal.code
            if refusal.status == 500:
                log("failed", level=logging.ERROR, failed=True)
            yield event(refusal.body)
            yield DONE
        finally:
            self._count(reader, choices, request)

    def _count(self, reader: Reader, choices: Sequence[Choice], request: Request) -> None:
        """Add an answered request to metrics and log."""
        usage, fields = reader.generation.usage, request.scope["log"]
        fields |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        self.metrics.count_usage(fields["model"], usage)
        for choice in choices:
            self.metrics.answers.labels(fields["model"], choice.finish or "unfinished").inc()
        if reader.first_at is not None:
            seconds = reader.first_at - request.scope["started"]
            fields["first_token_seconds"] = round(seconds, 4)
            self.metrics.first_token.observe(seconds)

    # --- tokens and models --------------------------------------------------------------------

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """The tokens of a text, or of the prompt that messages become."""
        adapter = self.service.adapter(body.model)
        self.service.check_letters(body)
        if body.messages is not None:
            tokens = await asyncio.to_thread(self.service.tokens, body.messages, adapter)
        else:
            tokenizer = self.engine.processor(adapter).tokenizer
            found = await asyncio.to_thread(tokenizer, body.prompt)
            tokens = tuple(found["input_ids"])
        context = self.engine.context_length
        found = {"count": len(tokens), "max_model_len": context, "tokens": list(tokens)}
        # a long list would hold up everybody on the event loop
        return await asyncio.to_thread(JSONResponse, found)

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens."""
        tokenizer = self.engine.processor(self.service.adapter(body.model)).tokenizer
        if max(body.tokens, default=0) >= len(tokenizer):
            raise ApiError(
                400,
                f"tokens must be below {len(tokenizer)}",
                code="invalid_value",
                param="tokens",
            )
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}

    async def models(self) -> dict[str, Any]:
        """The base and every adapter."""
        return {"object": "list", "data": [self._model(name) for name in self.service.models]}

    async def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        self.service.adapter(name)
        return self._model(name)

    def _model(self, name: str) -> dict[str, Any]:
        is_adapter = name in self.engine.adapters
        experts = self.service.experts.names if self.service.experts is not None else ()
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "llama-adapter",
            "parent": self.service.base_name if is_adapter else None,
            "max_model_len": self.engine.context_length,
            "experts": list(experts),
        }

    async def adapters(self) -> dict[str, Any]:
        """Names of the loaded adapters, for clients that may change them."""
        return {"adapters": list(self.engine.adapters)}

    async def load_adapter(self, body: AdapterRequest) -> JSONResponse:
        """Load an adapter while others answer."""
        await asyncio.to_thread(self.service.load_adapter, body.name, body.directory)
        log("adapter loaded", adapter=body.name)
        return JSONResponse(self._model(body.name), 201)

    async def unload_adapter(self, name: str) -> dict[str, Any]:
        """Remove an adapter."""
        if name not in self.engine.adapters:
            raise ApiError(404, f"no adapter {name[:100]!r}", code="model_not_found")
        await asyncio.to_thread(self.engine.unload_adapter, name)
        log("adapter unloaded", adapter=name)
        return {"id": name, "deleted": True}

    # --- for operators, and the page ----------------------------------------------------------

    async def health(self) -> JSONResponse:
        """Whether the process is alive: 503 once its engine is dead."""
        found = self.engine.health
        status = 503 if found.state == "dead" else 200
        return JSONResponse({"status": found.state, "reason": found.reason}, status)

    async def ready(self) -> JSONResponse:
        """Whether requests are taken: not before warm-up, and not while draining."""
        state = "draining" if self.gate.is_draining else self.engine.health.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def prometheus(self) -> Response:
        """Metrics in Prometheus' format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """The chat page."""
        return self._page


def _policy(page: str) -> str:
    """A content security policy under which the page's own script and style run, nothing else."""

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found)
        return " ".join(f"'sha256-{value.decode()}'" for value in hashes)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "img-src data: blob:; media-src data: blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
