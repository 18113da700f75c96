"""API keys: read from files, kept as digests, compared in constant time, never logged."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path
from typing import Self

from llama_adapter.errors import ConfigError
from llama_adapter.files import read_text
from llama_adapter.serving.errors import ApiError

MIN_CHARACTERS = 16


class Keys:
    """The keys that open something; without any, nothing is opened by a key."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def read(cls, path: Path | None) -> Self:
        """One key a line; empty lines and lines that begin with # are passed over."""
        if path is None:
            return cls()
        lines = (line.strip() for line in read_text(path, error=ConfigError).splitlines())
        keys = tuple(line for line in lines if line and not line.startswith("#"))
        if not keys:
            raise ConfigError(f"{path} holds no key")
        short = next((n for n, key in enumerate(keys, 1) if len(key) < MIN_CHARACTERS), None)
        if short is not None:
            raise ConfigError(f"{path}: key {short} has fewer than {MIN_CHARACTERS} characters")
        odd = next((n for n, key in enumerate(keys, 1) if not key.isascii()), None)
        if odd is not None:
            raise ConfigError(f"{path}: key {odd} has characters beyond ASCII; no header brings it")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def holds(self, key: str) -> bool:
        """Whether it is one of them; takes equally long for every key."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def bearer(headers: dict[bytes, bytes]) -> str:
    """The key that a request brings, or an empty text."""
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def check_key(keys: Keys, headers: dict[bytes, bytes]) -> None:
    """ApiError 401 unless the request brings one of the keys, where there are any."""
    if keys and not keys.holds(bearer(headers)):
        raise ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def check_admin_key(keys: Keys, headers: dict[bytes, bytes]) -> None:
    """ApiError 403 unless the request brings an admin key."""
    if not keys:
        raise ApiError(403, "this server was started without --admin-keys", code="no_admin_keys")
    if not keys.holds(bearer(headers)):
        raise ApiError(403, "an admin key is needed", code="invalid_admin_key")


def is_loopback(host: str) -> bool:
    """Whether an address leads to this machine alone.

    >>> is_loopback("127.0.0.2"), is_loopback("127.example.org")
    (True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
