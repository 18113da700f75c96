"""`llama-adapter serve`: an OpenAI-compatible server, and a chat page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer import Option

from llama_adapter.cli.experts import ExpertSettings
from llama_adapter.cli.models import BUILT_IN, MODEL
from llama_adapter.cli.numbers import MAX_FRAMES, MAX_NEW_TOKENS, between
from llama_adapter.cli.settings import Unread, given_options, refuse_unread
from llama_adapter.errors import (
    ConfigError,
    MissingDependencyError,
    ServingError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from llama_adapter.generation.requests import Engine
    from llama_adapter.serving.limits import Limits
    from llama_adapter.serving.service import Service


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessSettings:
    """Who may ask what."""

    section: ClassVar[str] = "Access"

    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Option(help="0: a free one.", callback=between(0, 65535))] = 8000
    api_keys: Annotated[
        Path | None,
        Option(help="File of API keys, one a line.", metavar="FILE", show_default=False),
    ] = None
    without_keys: Annotated[
        bool, Option("--without-keys", help="Serve other machines without API keys.")
    ] = False
    admin_keys: Annotated[
        Path | None,
        Option(
            help="File of keys that may load and unload adapters.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        Option(
            help="Site whose pages may use the server and by whose name a proxy may reach it, such "
            "as https://example.org; may be repeated.",
            metavar="ORIGIN",
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        for origin in self.cors_origin or ():
            if not re.fullmatch(r"https?://[^\s/?#@*]+", origin):
                raise ConfigError(
                    f"--cors-origin: {origin!r} must be a scheme and a host, and a port where it "
                    "has one, such as https://example.org"
                )

    def open(self) -> dict[str, Any]:
        """Options of the application; ServingError for an address that anybody could use."""
        from llama_adapter.serving.auth import Keys, is_loopback

        keys, is_local = Keys.read(self.api_keys), is_loopback(self.host)
        if not (is_local or keys or self.without_keys):
            raise ServingError(
                f"{self.host} can be reached by other machines: give --api-keys FILE, or "
                "--without-keys where something in front of the server checks who asks"
            )
        return {
            "keys": keys,
            "admin_keys": Keys.read(self.admin_keys),
            "origins": tuple(self.cors_origin or ()),
            "is_loopback": is_local,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSettings:
    """Where images and adapters may come from."""

    section: ClassVar[str] = "Sources"

    image_host: Annotated[
        list[str] | None,
        Option(
            help="Host from which http(s) image URLs are fetched, such as example.org, "
            "*.example.org or example.org:8443; `*` for all public ones; may be repeated.",
            metavar="HOST",
            show_default=False,
        ),
    ] = None
    media_folder: Annotated[
        Path | None,
        Option(
            help="Folder below which file: image URLs are read.", metavar="DIR", show_default=False
        ),
    ] = None
    adapter_folder: Annotated[
        Path | None,
        Option(
            help="Folder below which adapters may be loaded at run time.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        for option, folder in (("media", self.media_folder), ("adapter", self.adapter_folder)):
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"--{option}-folder: {str(folder)!r} is not a folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundSettings:
    """How much may be asked."""

    section: ClassVar[str] = "Bounds"

    rows: Annotated[int, Option(help="Answers worked on at once.", callback=between(1, 4096))] = 16
    context_length: Annotated[
        int,
        Option(
            help="Most tokens of a prompt and its answer, for which each row has memory.",
            callback=between(16, MAX_NEW_TOKENS),
        ),
    ] = 2048
    max_adapters: Annotated[
        int, Option(help="Adapters loaded at once.", callback=between(1, 10_000))
    ] = 16
    max_requests: Annotated[
        int,
        Option(
            help="Answers asked for at once; more are refused with 429.",
            callback=between(1, 100_000),
        ),
    ] = 64
    max_tokens: Annotated[
        int, Option(help="Longest answer, in tokens.", callback=between(1, MAX_NEW_TOKENS))
    ] = 1024
    max_body_mib: Annotated[int, Option(help="Largest body.", callback=between(1, 1024))] = 32
    max_images: Annotated[
        int, Option(help="Images and videos of one conversation.", callback=between(1, 1000))
    ] = 16
    video_frames: Annotated[
        int, Option(help="Frames to take from a video.", callback=between(1, MAX_FRAMES))
    ] = 8
    request_seconds: Annotated[
        float, Option(help="Longest time for one request.", callback=between(0.1, 86_400))
    ] = 120.0
    drain_seconds: Annotated[
        float, Option(help="Time for open requests after SIGTERM.", callback=between(0, 86_400))
    ] = 30.0

    @property
    def limits(self) -> Limits:
        """The server's limits."""
        from llama_adapter.serving.limits import Limits

        return Limits(
            max_requests=self.max_requests,
            max_tokens=self.max_tokens,
            max_body_bytes=self.max_body_mib << 20,
            max_images=self.max_images,
            video_frames=self.video_frames,
            request_seconds=self.request_seconds,
        )


def serve(
    command: typer.Context,
    model: Annotated[str, MODEL],
    name: Annotated[
        str | None,
        Option(
            help="MODEL's name for clients; by default that of its directory.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        Option(
            help="A further adapter of the same base and its name for clients; may be repeated.",
            metavar="NAME=DIR",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        Option(help="cpu, cuda, cuda:1, …; by default the best there is.", show_default=False),
    ] = None,
    log_level: Annotated[str, Option(help="debug, info, warning or error.")] = "info",
    *,
    access: AccessSettings,
    sources: SourceSettings,
    bounds: BoundSettings,
    experts: ExpertSettings,
) -> None:
    """Serve a base and its adapters behind OpenAI's protocol, with a chat page at /.

    \b
    Examples:
      llama-adapter serve toy
      llama-adapter serve toy --adapter caption=DIR --expert ocr --port 8080
      llama-adapter serve runs/mine/adapter --name mine --host 0.0.0.0 --api-keys keys.txt
    """
    from importlib.util import find_spec

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingDependencyError(package, extra="serve", purpose="serving")
    if log_level not in {"debug", "info", "warning", "error"}:
        raise ConfigError(f"--log-level must be debug, info, warning or error, got {log_level!r}")
    options = access.open()
    further = [_name_and_directory(text) for text in adapter or ()]
    if "auto" in (experts.expert or ()):
        raise ConfigError("--expert auto chooses for `chat`; a server takes experts by name")
    refuse_unread(given_options(command), _unread(experts, access))
    experts.check(model)

    from llama_adapter.serving.metrics import set_up_logging
    from llama_adapter.serving.server import bind

    with bind(access.host, access.port) as bound:
        set_up_logging(log_level)
        service = _open(
            model,
            name,
            further,
            experts=experts,
            sources=sources,
            bounds=bounds,
            device=device,
        )
        _run(bound, service, options, drain_seconds=bounds.drain_seconds)


def _unread(experts: ExpertSettings, access: AccessSettings) -> Unread:
    yield from experts.unread()
    if access.admin_keys is None:  # which do without a folder: they unload adapters, too
        yield frozenset(("adapter_folder",)), "it needs --admin-keys"


def _name_and_directory(text: str) -> tuple[str, Path]:
    """What `--adapter NAME=DIR` says."""
    name, separator, directory = text.partition("=")
    if not (separator and name and directory):
        raise ConfigError(f"--adapter must be NAME=DIR, got {text!r}")
    from llama_adapter.cli.models import adapter_directory

    return name, adapter_directory(directory)


def _open(
    model: str,
    name: str | None,
    further: Sequence[tuple[str, Path]],
    *,
    experts: ExpertSettings,
    sources: SourceSettings,
    bounds: BoundSettings,
    device: str | None,
) -> Service:
    """The engine with every adapter, and everything around it."""
    from llama_adapter.cli.models import adapter_directory
    from llama_adapter.serving.experts import EngineCaptions, ServedExperts
    from llama_adapter.serving.media import Media
    from llama_adapter.serving.service import Service

    name = name or (model if model in BUILT_IN else adapter_directory(model).resolve().name)
    engine = _start(model, name, bounds=bounds, device=device)
    with _ending(engine):
        limits = bounds.limits
        for other, directory in further:
            engine.load_adapter(other, directory)
        served = None
        if experts.expert:
            pool = experts.open(
                model,
                loaded=None,
                processor=engine.processor(name),
                device=device,
                caption_expert=partial(EngineCaptions, engine),
            )
            served = ServedExperts(pool)
        return Service(
            engine=engine,
            base_name=f"{name}-base",
            limits=limits,
            media=Media(
                limits=limits, hosts=tuple(sources.image_host or ()), folder=sources.media_folder
            ),
            experts=served,
            adapter_folder=sources.adapter_folder,
        )


@contextmanager
def _ending(engine: Engine) -> Iterator[None]:
    """The engine ends where the block fails: Python must not leave while its thread computes."""
    try:
        yield
    except BaseException:
        engine.drain(0)
        raise


def _start(model: str, name: str, *, bounds: BoundSettings, device: str | None) -> Engine:
    """The engine that MODEL's base can have: with rows, or one request after another."""
    from llama_adapter.cli.models import load
    from llama_adapter.generation.engine import EngineSettings, RowEngine
    from llama_adapter.generation.sequential import SequentialEngine
    from llama_adapter.serving.metrics import log

    loaded, processor = load(model, device=device)
    settings = EngineSettings(
        rows=bounds.rows,
        context_length=bounds.context_length,
        max_queue=bounds.max_requests,
        adapters=bounds.max_adapters,
    )
    try:
        return RowEngine(loaded, processor, name=name, settings=settings)
    except UnsupportedModelError as error:
        log("one request at a time", reason=str(error))
        loaded.enable_adapters()
        return SequentialEngine(loaded, processor, name=name, max_queue=bounds.max_requests)


def _run(bound: Any, service: Service, options: dict[str, Any], *, drain_seconds: float) -> None:
    """Serve on a bound socket until a signal says otherwise."""
    from llama_adapter.serving.app import make_app
    from llama_adapter.serving.metrics import log
    from llama_adapter.serving.server import Server

    with _ending(service.engine):
        app, gate = make_app(service, **options)
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log("serving", url=url, models=service.models)
    server = Server(app, gate, service.engine, service.limits, drain_seconds=drain_seconds)
    server.run(sockets=[bound])
