"""Where images may come from: nothing is fetched or read that the operator has not allowed."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llama_adapter.conversation import ImageRef
from llama_adapter.errors import ImageError, LlamaAdapterError, VideoError
from llama_adapter.serving.limits import Limits
from llama_adapter.serving.media import Media, is_public
from llama_adapter.serving.schema import ChatRequest

INNER = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1",
    "169.254.169.254", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1",
    "::ffff:10.0.0.1", "::ffff:7f00:1", "64:ff9b::a00:1", "64:ff9b::7f00:1", "2002:7f00:1::",
    "2002:a9fe:a9fe::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1",
    "64:ff9b:1::a9fe:a9fe", "fec0::1",
]  # fmt: skip


def png(size: tuple[int, int] = (4, 4)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, "red").save(content, "PNG")
    return content.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def load(media: Media, url: str) -> Any:
    return media.load(url, is_video=False, name="the image").source


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A web server on this machine: images, redirects, endless and slow answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return
            if self.path == "/missing":
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            try:
                if self.path == "/endless":
                    while True:
                        self.wfile.write(bytes(1 << 16))
                if self.path == "/slow":
                    while True:
                        self.wfile.write(b"x")
                        time.sleep(0.05)
                self.wfile.write(png())
            except OSError:
                pass

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"images.example:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def visiting(site: str, **options: Any) -> Media:
    """Images may come from the site, which a name leads to."""
    return Media(
        hosts=(site,),
        resolve=lambda _host, _port: ["127.0.0.1"],
        may_connect=lambda address: address == "127.0.0.1",
        **options,
    )


@pytest.mark.parametrize("address", INNER)
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are(address: str) -> None:
    assert is_public(address)


def test_data_urls_need_no_permission() -> None:
    assert load(Media(), data_url(png())).size == (4, 4)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://localhost/a.png",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher://example.org/a.png",
        "javascript:alert(1)",
        "/etc/passwd",
        "data:text/plain,hello",
        "data:image/png;base64,%%%",
        "http://[::1/a.png",
        "http://example.org:99999/",
        "",
    ],
)
def test_by_default_nothing_else_is_read(url: str) -> None:
    with pytest.raises(ImageError, match=r"^the image: |image the image"):
        load(Media(), url)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "[::1]",
     "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"],
)  # fmt: skip
def test_every_spelling_of_this_machine_is_refused_where_all_hosts_are_allowed(host: str) -> None:
    with pytest.raises(ImageError, match=r"no address of the public internet|cannot be fetched"):
        load(Media(hosts=("*",)), f"http://{host}/a.png")


def test_a_name_is_resolved_once_and_the_checked_address_is_used(site: str) -> None:
    asked = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)  # a second question would be answered with another address
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    media = Media(hosts=(site,), resolve=resolve, may_connect=lambda a: a == "127.0.0.1")
    assert load(media, f"http://{site}/a.png").size == (4, 4)
    assert asked == ["images.example"]


def test_one_inner_address_among_several_is_one_too_many(site: str) -> None:
    media = Media(hosts=(site,), resolve=lambda *_: ["93.184.216.34", "127.0.0.1"])
    with pytest.raises(ImageError, match=r"no address of the public internet"):
        load(media, f"http://{site}/a.png")


def test_redirects_are_followed_and_each_is_checked(site: str) -> None:
    media = visiting(site)
    assert load(media, f"http://{site}/to//a.png").size == (4, 4)
    port = site.partition(":")[2]
    anywhere = Media(
        hosts=(f"*:{port}",),
        resolve=lambda host, _port: ["127.0.0.1" if host == "images.example" else host],
        may_connect=lambda address: address == "127.0.0.1",
    )
    with pytest.raises(ImageError, match=r"'127\.0\.0\.2' has no address of the public internet"):
        load(anywhere, f"http://{site}/to/http://127.0.0.2:{port}/a.png")
    for there, words in {
        "http://127.0.0.1/a.png": "from host '127.0.0.1'; send .* data: URL, .* --image-host",
        f"http://other.example:{site.partition(':')[2]}/": "nothing from host 'other.example'",
        "file:///etc/passwd": "not http or https",
        "http://[": "cannot be fetched: ValueError",
        "ftp://images.example/": "not http or https",
        f"http://{site}/to//to//to//to//a.png": "more than 3 times",
        f"http://user@{site}/": "with a user name are not fetched",
    }.items():
        with pytest.raises(ImageError, match=words):
            load(media, f"http://{site}/to/{there}")


def test_what_is_fetched_is_bounded(site: str) -> None:
    media = visiting(site, limits=Limits(max_media_bytes=1 << 20))
    with pytest.raises(ImageError, match="more than 1048576 bytes"):
        load(media, f"http://{site}/endless")
    with pytest.raises(ImageError, match="status 404"):
        load(media, f"http://{site}/missing")
    hurried = visiting(site, limits=Limits(fetch_seconds=0.5))
    begun = time.monotonic()
    with pytest.raises(ImageError, match=r"longer than 0\.5 s|cannot be fetched"):
        load(hurried, f"http://{site}/slow")
    assert time.monotonic() - begun < 60


def test_hosts_are_matched_whole_and_with_their_ports() -> None:
    media = Media(hosts=("example.org", "*.images.net", "store.example:8443"))
    allowed = [
        ("example.org", 443, "https"),
        ("EXAMPLE.org.", 80, "http"),
        ("a.b.images.net", 443, "https"),
        ("store.example", 8443, "https"),
    ]
    refused = [
        ("evilexample.org", 443, "https"),
        ("example.org.evil.net", 443, "https"),
        ("images.net", 443, "https"),
        ("example.org", 8080, "http"),
        ("store.example", 443, "https"),
    ]
    assert all(media._is_listed(*where) for where in allowed)
    assert not any(media._is_listed(*where) for where in refused)


def test_files_are_read_below_one_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a b.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    media = Media(folder=folder)
    assert load(media, f"file://{folder}/a%20b.png").size == (4, 4)
    for path in (
        f"{tmp_path}/secret.png",
        f"{folder}/../secret.png",
        f"{folder}/%2e%2e/secret.png",
        f"{folder}/link.png",
        f"{folder}/a%00.png",
        "/etc/passwd",
    ):
        with pytest.raises(ImageError, match=r"not in the folder|does not name a file"):
            load(media, f"file://{path}")
    with pytest.raises(ImageError, match="does not name a file"):
        load(media, f"file://elsewhere{folder}/a%20b.png")
    with pytest.raises(ImageError, match=r"no file: URLs; send .* data: URL, .*--media-folder"):
        load(Media(), f"file://{folder}/a%20b.png")


def test_pixels_are_counted_before_they_are_decoded() -> None:
    media = Media(limits=Limits(max_pixels=100))
    with pytest.raises(ImageError, match="20x20 = 400 pixels"):
        load(media, data_url(png((20, 20))))


def test_what_is_not_a_video_is_refused() -> None:
    with pytest.raises(LlamaAdapterError, match="the clip"):
        Media().load(data_url(png()[:40]), is_video=True, name="the clip")


def test_a_video_is_decoded_in_time() -> None:
    """A few bytes may be minutes of large frames, which nobody waits for."""
    pytest.importorskip("av")
    shades = [Image.new("L", (8, 8), shade) for shade in range(0, 200, 20)]
    content = io.BytesIO()
    shades[0].save(content, "GIF", save_all=True, append_images=shades[1:], duration=100)
    url = data_url(content.getvalue())
    assert len(Media().load(url, is_video=True, name="the clip").source) == 8
    with pytest.raises(VideoError, match="the clip: takes too long"):
        Media().load(url, is_video=True, name="the clip", until=lambda: 0.0)


def test_what_a_client_has_left_is_decoded_no_further(server: Any) -> None:
    begun, ended = threading.Event(), threading.Event()

    class Decoder(Media):
        def load(self, *_: Any, until: Callable[[], float], **__: Any) -> ImageRef:
            begun.set()
            last = time.monotonic() + 20
            while time.monotonic() < min(until(), last):
                time.sleep(0.01)
            if time.monotonic() < last:
                ended.set()
            raise VideoError("takes too long")

    service = replace(server.service, media=Decoder())
    part = {"type": "video_url", "video_url": {"url": data_url(png())}}
    asked = ChatRequest.model_validate(
        {"model": "toy", "messages": [{"role": "user", "content": [part]}]}
    )

    async def leave() -> None:
        reading = asyncio.create_task(service.prepare(asked, "toy", until=float("inf")))
        await asyncio.to_thread(begun.wait, 20)
        reading.cancel()
        await asyncio.to_thread(ended.wait, 20)

    asyncio.run(leave())
    assert ended.is_set()


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port on which each client is given to `answer`, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):
                client, _ = server.accept()
                with client:
                    answer(client)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]


def test_a_handshake_that_drips_ends_when_its_time_is_up() -> None:
    """A byte now and then begins every time limit of a socket again."""
    over = threading.Event()

    def drip(client: socket.socket) -> None:
        client.sendall(b"\x16\x03\x03\x40\x00")  # the head of a long record
        while not over.wait(0.1):
            client.sendall(b"\x00")

    with listening(drip) as port:
        site = f"images.example:{port}"
        media = Media(
            hosts=(site,),
            resolve=lambda *_: ["127.0.0.1"],
            may_connect=lambda _: True,
            limits=Limits(fetch_seconds=0.5),
        )
        begun = time.monotonic()
        with pytest.raises(ImageError, match="cannot be fetched"):
            load(media, f"https://{site}/a.png")
        over.set()
    assert time.monotonic() - begun < 60
