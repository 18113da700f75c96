"""Images and videos of requests: `data:` URLs, and from elsewhere only what the operator allows.

A host is resolved once; the connection goes to the address that was checked, so that a name which
resolves to something else a moment later leads nowhere. Every redirect is checked as if it were
asked for. Files are read below one folder.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from llama_adapter.conversation import ImageRef
from llama_adapter.errors import ImageError
from llama_adapter.files import can_be_path, read_bytes
from llama_adapter.processing.images import load_image
from llama_adapter.processing.video import load_video
from llama_adapter.serving.limits import Limits

MAX_REDIRECTS = 3
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, also where IPv6 wraps an IPv4 address.

    >>> is_public("93.184.216.34"), is_public("::ffff:127.0.0.1"), is_public("169.254.169.254")
    (True, False, False)
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found in _LOCAL_NAT64 or found.is_site_local:
            return False
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in _NAT64 or int(found) >> 32 == 0:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """Where images and videos may come from; `load` brings one."""

    limits: Limits = field(default_factory=Limits)
    hosts: Sequence[str] = ()
    """Hosts that http(s) URLs may name: `example.org`, `*.example.org`, `example.org:8443`, or `*`
    for all that are public."""
    folder: Path | None = None
    """Below which `file:` URLs are read."""
    resolve: Callable[[str, int], Sequence[str]] = _resolve
    may_connect: Callable[[str], bool] = is_public

    def load(
        self,
        url: str,
        *,
        is_video: bool,
        name: str,
        until: Callable[[], float] = lambda: float("inf"),
        pixels_left: int | None = None,
    ) -> ImageRef:
        """The image, or frames of the video, decoded by `until`, a time of the monotonic clock that
        may change meanwhile.

        With `pixels_left` it has at most so many, in all of its frames.
        Raises ImageError or VideoError for what cannot be had, is not allowed or cannot be read.
        """
        frames = self.limits.video_frames if is_video else 1
        max_pixels = self.limits.max_pixels
        if pixels_left is not None:
            max_pixels = max(1, min(max_pixels, pixels_left // frames))
        data = self._fetch(url, name=name, until=until())
        if is_video:
            video = load_video(
                data,
                frames=frames,
                name=name,
                max_seconds=self.limits.video_seconds,
                max_pixels=max_pixels,
                until=until,
            )
            return video.as_image_ref()
        image = load_image(data, name=name, max_pixels=max_pixels)
        return ImageRef(source=image, name=name)

    def _fetch(self, url: str, *, name: str, until: float) -> bytes:
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return _decode(url, name=name)
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018 (raises for what is not a number)
        except ValueError as error:
            raise ImageError(f"{name}: the URL cannot be read: {error}") from error
        if scheme == "file":
            return self._read(parts, name=name)
        if scheme in _PORTS:
            return self._download(url, name=name, until=until)
        raise ImageError(
            f"{name}: the URL must begin with data:, or with http:, https: or file: where the "
            "server allows it"
        )

    def _read(self, parts: SplitResult, *, name: str) -> bytes:
        if self.folder is None:
            raise ImageError(
                f"{name}: this server reads no file: URLs; send the content as a data: URL, or "
                "let the server's operator allow a folder with --media-folder"
            )
        text = unquote(parts.path)
        if parts.netloc not in {"", "localhost"} or not can_be_path(text):
            raise ImageError(f"{name}: the file: URL does not name a file")
        path = (self.folder / text).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ImageError(f"{name}: the file is not in the folder that this server reads")
        return read_bytes(path, error=ImageError, limit=self.limits.max_media_bytes, name=name)

    def _download(self, url: str, *, name: str, until: float) -> bytes:
        until = min(until, time.monotonic() + self.limits.fetch_seconds)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                found = self._get(urlsplit(url), until=until, name=name)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
                scheme = urlsplit(url).scheme
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = type(error).__name__
                raise ImageError(f"{name}: cannot be fetched: {reason}") from error
            if scheme not in _PORTS:
                raise ImageError(f"{name}: redirected to something that is not http or https")
        raise ImageError(f"{name}: redirected more than {MAX_REDIRECTS} times")

    def _get(self, parts: SplitResult, *, until: float, name: str) -> bytes | str:
        """The content, or where a redirect leads."""
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        if parts.username is not None:
            raise ImageError(f"{name}: URLs with a user name are not fetched")
        if not self._is_listed(host, port, parts.scheme):
            raise ImageError(
                f"{name}: this server fetches nothing from host {host[:100]!r}; send the content "
                "as a data: URL, or let the server's operator allow the host with --image-host"
            )
        addresses = self.resolve(host, port)
        if not addresses or not all(map(self.may_connect, addresses)):
            raise ImageError(f"{name}: host {host[:100]!r} has no address of the public internet")
        connection = _Connection(host, port, addresses[0], is_tls=parts.scheme == "https")
        connection.timeout = max(0.1, until - time.monotonic())
        # time limits of sockets begin again with each byte
        timer = threading.Timer(connection.timeout, connection.give_up)
        timer.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*, video/*"})
            response = connection.getresponse()
            if response.status in _REDIRECTS and (location := response.getheader("Location")):
                return location
            if response.status != 200:
                raise ImageError(f"{name}: fetching it gave status {response.status}")
            content = response.read(self.limits.max_media_bytes + 1)
        finally:
            timer.cancel()
            connection.close()
        if len(content) > self.limits.max_media_bytes:
            raise ImageError(f"{name}: has more than {self.limits.max_media_bytes} bytes")
        if time.monotonic() >= until:
            raise ImageError(
                f"{name}: fetching it takes longer than {self.limits.fetch_seconds:g} s"
            )
        return content

    def _is_listed(self, host: str, port: int, scheme: str) -> bool:
        host = host.rstrip(".").lower()
        is_usual = port == _PORTS[scheme]
        for entry in self.hosts:
            wanted, _, wanted_port = entry.lower().partition(":")
            matches = wanted in {"*", host} or (wanted[:2] == "*." and host.endswith(wanted[1:]))
            if matches and (wanted_port == str(port) if wanted_port else is_usual):
                return True
        return False


class _Connection(http.client.HTTPConnection):
    """A connection to an address that has been checked, for a host that was named."""

    def __init__(self, host: str, port: int, address: str, *, is_tls: bool) -> None:
        super().__init__(host, port)
        self._address = address
        self._is_tls = is_tls
        self._connected: socket.socket | None = None
        self._is_over = False

    def connect(self) -> None:
        """Connect to the address, whatever the name resolves to by now."""
        self.sock = self._connected = socket.create_connection(
            (self._address, self.port), self.timeout
        )
        if self._is_tls:
            context = ssl.create_default_context()
            tls = context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock = self._connected = tls
            self._refuse_if_over()
            tls.do_handshake()
        self._refuse_if_over()

    def _refuse_if_over(self) -> None:
        if self._is_over:
            raise TimeoutError

    def give_up(self) -> None:
        """End whatever is being waited for, from another thread."""
        self._is_over = True
        with suppress(OSError):  # not connected any more
            if self._connected is not None:
                self._connected.shutdown(socket.SHUT_RDWR)


def _decode(url: str, *, name: str) -> bytes:
    header, separator, payload = url.partition(",")
    if not separator or not header.lower().endswith(";base64"):
        raise ImageError(f"{name}: the data: URL must be base64, such as data:image/png;base64,…")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name}: the data: URL is not valid base64") from error
