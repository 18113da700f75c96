"""Real servers on free ports of this machine, in threads of the test process."""

from __future__ import annotations

import base64
import io
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
from tests.threads import becomes, before_each_pass

from llama_adapter.generation.engine import EngineSettings, RowEngine
from llama_adapter.miniature.bundled import bundled_adapter, load_bundled
from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import Scene, SceneObject
from llama_adapter.serving.app import make_app
from llama_adapter.serving.limits import Limits
from llama_adapter.serving.media import Media
from llama_adapter.serving.server import Server, bind
from llama_adapter.serving.service import Service


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    port: int
    service: Service
    gate: Any
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def is_idle(self, connections: int = 1000) -> bool:
        """Whether every place and row becomes free soon, and at most so many connections stay."""

        def is_idle_now() -> bool:
            stats = self.service.engine.stats
            too_many = len(self.server.server_state.connections) > connections
            return not (self.gate.admission.count or stats.busy_rows or stats.queued or too_many)

        return becomes(is_idle_now)


@pytest.fixture(scope="session")
def slowed() -> Callable[[Any], Any]:
    """A context in which answers last: 30 ms a pass at first, half a second after forty.

    However busy the machine is, a long answer is not over before a test is.
    """

    @contextmanager
    def run(model: Any) -> Iterator[None]:
        passes = itertools.count()

        def wait() -> None:
            time.sleep(0.03 if next(passes) < 40 else 0.5)

        with before_each_pass(model, wait):
            yield

    return run


@pytest.fixture(scope="session")
def bundled() -> Any:
    """The built-in model and its processor, which the session's engine computes with."""
    return load_bundled()


@pytest.fixture
def slow(slowed: Callable[[Any], Any], bundled: Any) -> Iterator[None]:
    """The session's engine takes its time."""
    with slowed(bundled[0]):
        yield


@pytest.fixture(scope="session")
def engine(bundled: Any) -> Iterator[Any]:
    """The built-in model with two adapters: `toy` and `caption`."""
    engine = RowEngine(*bundled, name="toy", settings=EngineSettings(rows=4))
    engine.load_adapter("caption", bundled_adapter("caption"))
    assert becomes(lambda: engine.health.state != "starting")
    yield engine
    engine.drain(0)


@pytest.fixture(scope="session")
def serving(engine: Any) -> Callable[..., Any]:
    """A context in which a server runs with the given limits and options."""

    @contextmanager
    def run(
        *,
        limits: Limits | None = None,
        media: dict[str, Any] | None = None,
        service: dict[str, Any] | None = None,
        engine: Any = engine,
        send_buffer: int | None = None,
        **options: Any,
    ) -> Iterator[Running]:
        limits = limits or Limits()
        whole = Service(
            engine=engine,
            base_name="toy-base",
            limits=limits,
            media=Media(limits=limits, **(media or {})),
            **(service or {}),
        )
        app, gate = make_app(whole, **options)
        bound = bind("127.0.0.1", 0)
        if send_buffer is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        port = bound.getsockname()[1]
        server = Server(app, gate, engine, limits, drain_seconds=1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        running = Running(port=port, service=whole, gate=gate, server=server)
        try:
            assert becomes(lambda: server.started or not thread.is_alive())
            # until then it refuses what it is asked
            assert becomes(lambda: engine.health.state != "starting")
            yield running
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

    return run


@pytest.fixture(scope="session")
def server(serving: Callable[..., Any]) -> Iterator[Running]:
    """A server as it is started by default."""
    with serving() as running:
        yield running


def data_url(image: Any) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


@pytest.fixture(scope="session")
def red_star() -> str:
    """A picture of a red star as a `data:` URL."""
    star = SceneObject(shape="star", color="red", size="large", place="center")
    return data_url(render(Scene(objects=(star,)), random.Random(5), size=256))


@pytest.fixture(scope="session")
def blue_square() -> str:
    """A picture of a blue square as a `data:` URL."""
    square = SceneObject(shape="square", color="blue", size="large", place="center")
    return data_url(render(Scene(objects=(square,)), random.Random(5), size=256))
