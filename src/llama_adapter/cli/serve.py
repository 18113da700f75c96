"""`llama-adapter serve`: an OpenAI-compatible server, and a chat page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_adapter.cli.models import MODEL_HELP, TOY
from llama_adapter.cli.numbers import MAX_FRAMES, MAX_NEW_TOKENS, between
from llama_adapter.errors import ConfigError, MissingDependencyError, ServingError

if TYPE_CHECKING:
    from llama_adapter.cli.experts import ExpertChoice
    from llama_adapter.generation.requests import Engine
    from llama_adapter.serving.experts import ServedExperts
    from llama_adapter.serving.limits import Limits

_Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="A further adapter of the same base and its name for clients; may be repeated.",
        metavar="NAME=DIR",
        show_default=False,
    ),
]
_Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        help="An expert that describes images in words, as of `chat`; may be repeated.",
        metavar="NAME[=VALUE]",
        show_default=False,
    ),
]
_Keys = Annotated[
    Path | None,
    typer.Option(
        help="File of API keys, one a line; without it anybody who reaches the server may use it.",
        metavar="FILE",
        show_default=False,
    ),
]
_AdminKeys = Annotated[
    Path | None,
    typer.Option(
        help="File of keys that may load and unload adapters.", metavar="FILE", show_default=False
    ),
]
_AdapterFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder from which adapters may be loaded at run time.",
        metavar="DIR",
        show_default=False,
    ),
]
_ImageHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--image-host",
        help="Host from which http(s) image URLs are fetched, such as example.org, *.example.org "
        "or example.org:8443; `*` for all public ones; may be repeated.",
        metavar="HOST",
        show_default=False,
    ),
]
_MediaFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder below which file: image URLs are read.", metavar="DIR", show_default=False
    ),
]
_Origins = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        help="Site whose pages may use the server, such as https://example.org; may be repeated.",
        metavar="ORIGIN",
        show_default=False,
    ),
]


def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)],
    name: Annotated[
        str | None,
        typer.Option(help="MODEL's name for clients; by default that of its directory."),
    ] = None,
    adapter: _Adapters = None,
    expert: _Experts = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.", callback=between(0, 65535))] = 8000,
    api_keys: _Keys = None,
    admin_keys: _AdminKeys = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Serve other machines without API keys.")
    ] = False,
    adapter_folder: _AdapterFolder = None,
    image_host: _ImageHosts = None,
    media_folder: _MediaFolder = None,
    cors_origin: _Origins = None,
    max_requests: Annotated[
        int, typer.Option(help="Answers asked for at once; more are refused with 429.")
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option(help="Longest answer, in tokens.", callback=between(1, MAX_NEW_TOKENS))
    ] = 1024,
    max_body_mib: Annotated[
        int, typer.Option(help="Largest request body.", callback=between(1, 1024))
    ] = 32,
    max_images: Annotated[
        int, typer.Option(help="Images and videos of one conversation.", callback=between(1, 1000))
    ] = 16,
    video_frames: Annotated[
        int, typer.Option(help="Frames to take from a video.", callback=between(1, MAX_FRAMES))
    ] = 8,
    request_seconds: Annotated[
        float, typer.Option(help="Longest time for one request.", callback=between(0.1, 86400))
    ] = 120.0,
    drain_seconds: Annotated[
        float,
        typer.Option(help="Time for open requests after SIGTERM.", callback=between(0, 86400)),
    ] = 30.0,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, …; by default the best there is."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a base and its adapters behind OpenAI's protocol, with a chat page at /.

    \b
    Examples:
      llama-adapter serve toy
      llama-adapter serve toy --adapter caption=DIR --expert ocr --port 8080
      llama-adapter serve runs/mine/adapter --host 0.0.0.0 --api-keys keys.txt
    """
    _check_installed()
    from llama_adapter.cli.experts import ExpertChoice
    from llama_adapter.serving.auth import Keys
    from llama_adapter.serving.limits import Limits
    from llama_adapter.serving.metrics import set_up_logging
    from llama_adapter.serving.server import bind, is_loopback

    if log_level not in {"debug", "info", "warning", "error"}:
        raise ConfigError(f"--log-level must be debug, info, warning or error, got {log_level!r}")
    for option, folder in (("media", media_folder), ("adapter", adapter_folder)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--{option}-folder: {str(folder)!r} is not a folder")
    keys, admins = Keys.read(api_keys), Keys.read(admin_keys)
    if not (is_loopback(host) or keys or without_keys):
        raise ServingError(
            f"{host} can be reached by other machines: give --api-keys FILE, or --without-keys "
            "where something else keeps strangers out"
        )
    further = [_name_and_directory(text) for text in adapter or ()]
    experts = ExpertChoice(model=model, names=tuple(expert or ()))
    limits = Limits(
        max_requests=max_requests,
        max_tokens=max_tokens,
        max_body_bytes=max_body_mib << 20,
        max_images=max_images,
        video_frames=video_frames,
        request_seconds=request_seconds,
    )
    with bind(host, port) as bound:
        set_up_logging(log_level)
        engine, base, served = _start(
            model, name, further, experts=experts, limits=limits, device=device
        )
        _run(
            bound,
            engine=engine,
            limits=limits,
            drain_seconds=drain_seconds,
            service={"base_name": base, "experts": served, "adapter_folder": adapter_folder},
            media={"hosts": tuple(image_host or ()), "folder": media_folder},
            gate={
                "keys": keys,
                "admin_keys": admins,
                "origins": tuple(cors_origin or ()),
                "is_loopback": is_loopback(host),
            },
        )


def _check_installed() -> None:
    from importlib.util import find_spec

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingDependencyError(package, extra="serve", purpose="serving")


def _name_and_directory(text: str) -> tuple[str, Path]:
    """What `--adapter NAME=DIR` says."""
    name, separator, directory = text.partition("=")
    if not (separator and name and directory):
        raise ConfigError(f"--adapter must be NAME=DIR, got {text!r}")
    return name, Path(directory).expanduser()


def _start(
    model: str,
    name: str | None,
    further: Sequence[tuple[str, Path]],
    *,
    experts: ExpertChoice,
    limits: Limits,
    device: str | None,
) -> tuple[Engine, str, ServedExperts | None]:
    """The engine with every adapter, the base's name, and the experts."""
    from llama_adapter.cli.models import adapter_directory, load
    from llama_adapter.generation.sequential import SequentialEngine
    from llama_adapter.serving.experts import ServedExperts

    loaded, processor = load(model, device=device)
    name = name or (TOY if model == TOY else adapter_directory(model).resolve().name)
    engine = SequentialEngine(loaded, processor, name=name, max_queue=limits.max_requests)
    for other, directory in further:
        engine.load_adapter(other, directory)
    base = f"{name}-base"
    if not experts.names:
        return engine, base, None
    pool = experts.open(loaded=None, processor=processor, device=device)
    return engine, base, ServedExperts(pool)


def _run(
    bound: Any,
    *,
    engine: Engine,
    limits: Limits,
    drain_seconds: float,
    service: dict[str, Any],
    media: dict[str, Any],
    gate: dict[str, Any],
) -> None:
    """Serve on a bound socket until a signal says otherwise."""
    from llama_adapter.serving.app import make_app
    from llama_adapter.serving.media import Media
    from llama_adapter.serving.metrics import log
    from llama_adapter.serving.server import Server
    from llama_adapter.serving.service import Service

    whole = Service(engine=engine, limits=limits, media=Media(limits=limits, **media), **service)
    app, checked = make_app(whole, **gate)
    host, port = bound.getsockname()[:2]
    log("serving", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", models=whole.models)
    Server(app, checked, engine, limits, drain_seconds=drain_seconds).run(sockets=[bound])
