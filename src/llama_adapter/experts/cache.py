"""What experts found, remembered on disk: bounded, shared by processes, and never in the way.

Entries are JSON in one SQLite file, so a file from elsewhere can at worst be wrong, never run code.
The least recently used go first. A file that cannot be read is replaced by an empty one.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from llama_adapter.experts.base import Expert, Report, Request
from llama_adapter.home import home

T = TypeVar("T")

DEFAULT_BYTES = 64 * 2**20
_REPORT = TypeAdapter(Report)
_FRESH = 60.0
"""Seconds for which a use need not be noted again."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS reports
    (key TEXT PRIMARY KEY, value TEXT NOT NULL, bytes INTEGER NOT NULL, used REAL NOT NULL)
"""
_FORGET = """
DELETE FROM reports WHERE key IN (SELECT key FROM (
    SELECT key, sum(bytes) OVER (ORDER BY used DESC, key) AS total FROM reports
) WHERE total > ?)
"""
"""Keeps the last used entries, of so many bytes in all."""


def default_cache_file() -> Path:
    """`experts.sqlite` in `home()`."""
    return home() / "experts.sqlite"


class ReportCache:
    """Reports by what they depend on: the images' pixels, the expert, its version, perhaps the
    question. May be used from several threads and processes.
    """

    def __init__(self, path: Path, *, max_bytes: int = DEFAULT_BYTES) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def key(self, expert: Expert, request: Request) -> str | None:
        """What a report is found by; None where it must not be remembered."""
        info = expert.info
        if info.version is None or info.reads_reports:
            return None
        digest = hashlib.blake2b(digest_size=32)
        asked = request.question if info.uses_question else ""
        digest.update(json.dumps([expert.name, info.version, asked]).encode())
        for image in request.images:
            digest.update(f"{image.mode}{image.size}".encode())
            digest.update(image.tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> Report | None:
        """The report and how long finding it took; None where it is not known."""
        started = time.perf_counter()

        def find(file: sqlite3.Connection) -> Report | None:
            asked = "SELECT value, used FROM reports WHERE key = ?"
            found = file.execute(asked, (key,)).fetchone()
            if found is None:
                return None
            report = _REPORT.validate_json(_unsealed(found[0]))
            if time.time() - found[1] > _FRESH:
                file.execute("UPDATE reports SET used = ? WHERE key = ?", (time.time(), key))
            return replace(report, cached=True, seconds=time.perf_counter() - started)

        return self._use(find)

    def put(self, key: str, report: Report) -> None:
        """Remember a report; forget the longest unused ones where there is no room."""
        text = json.dumps(asdict(report), ensure_ascii=False)
        # lone surrogates, which no JSON file takes, become question marks, as in prompts
        value = _sealed(text.encode("utf-8", "replace").decode())
        if len(value) > self.max_bytes:
            return

        def store(file: sqlite3.Connection) -> None:
            entry = (key, value, len(value), time.time())
            file.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?)", entry)
            [total] = file.execute("SELECT sum(bytes) FROM reports").fetchone()
            if total > self.max_bytes:
                # some room for the next ones, so that not every entry costs a search
                file.execute(_FORGET, (0.9 * self.max_bytes,))

        self._use(store)

    def __len__(self) -> int:
        count = "SELECT count(*) FROM reports"
        return self._use(lambda file: int(file.execute(count).fetchone()[0])) or 0

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _use(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """What comes of some work with the file; None where that fails, which raises nothing.

        A damaged file is replaced; one that is busy or read-only is left alone.
        """
        with self._lock:
            try:
                return work(self._open())
            except (sqlite3.DatabaseError, OSError, ValueError) as error:
                self._close()
                if not isinstance(error, sqlite3.OperationalError | OSError):
                    self.path.unlink(missing_ok=True)
                return None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # what was read in somebody's images is nobody else's business
            self.path.touch(mode=0o600)
            # each statement is committed by itself
            self._connection = sqlite3.connect(
                self.path, timeout=2.0, check_same_thread=False, isolation_level=None
            )
            # what a power cut takes away can be found again
            self._connection.execute("PRAGMA synchronous = OFF")
            self._connection.execute(_SCHEMA)
        return self._connection


def _sealed(text: str) -> str:
    """The text behind its checksum, since SQLite keeps none."""
    return hashlib.sha256(text.encode()).hexdigest() + text


def _unsealed(value: str) -> str:
    """What `_sealed` put away; ValueError where a bit of it has changed."""
    if _sealed(value[64:]) != value:
        raise ValueError("checksum differs")
    return value[64:]
