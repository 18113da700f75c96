"""An index of a folder of texts, kept next to it and brought up to date file by file.

`.NAME.llama-adapter-index/files.json` holds a checksum of what follows, then each file's size,
time and passages; where the checksum differs the index is rebuilt. Only files that changed are
read again. bm25s's own tables are made from the passages when the index is opened (a second for
some 20,000): every one of them changes with any file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llama_adapter.errors import DataError, ExpertError, MissingDependencyError, import_extra
from llama_adapter.experts.passages import Passage, passages_of, text_files
from llama_adapter.experts.wording import words_of
from llama_adapter.files import read_bytes, write_atomically

MAX_INDEX_BYTES = 1 << 30
"""A larger index is rebuilt."""

Stamp = list[int]
"""Size and time of a file."""
Rows = list[tuple[str, str]]
"""Text and source of each passage."""
_STORED = TypeAdapter(dict[str, tuple[Stamp, Rows]])


class FolderIndex:
    """Finds passages in a folder; ExpertError where it holds no text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = folder.resolve().parent / f".{folder.resolve().name}.llama-adapter-index"
        self.notes: tuple[str, ...] = ()
        """What happened when the index was last brought up to date."""
        self._path = self.directory / "files.json"
        self._passages: list[Passage] = []
        self._engine: Any = None
        self._stamps: dict[str, Stamp] = {}

    def search(self, query: str, *, count: int) -> list[Passage]:
        """The best passages, best first; none that share no word with the query."""
        self.update()
        tokens = list(dict.fromkeys(words_of(query)))
        if not tokens:
            return []
        scores = [float(score) for score in self._engine.get_scores(tokens)]
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
        return [self._passages[i] for i in best if scores[i] > 0]

    def update(self) -> None:
        """Read what changed since the last time; nothing where nothing did."""
        files = {str(p.relative_to(self.folder)): p for p in text_files(self.folder)}
        if not files:
            raise ExpertError(
                f"expert 'search': folder {str(self.folder)!r} holds no txt, md, json, jsonl or "
                "pdf file"
            )
        stamps = {name: _stamp(path) for name, path in files.items()}
        if stamps == self._stamps:
            return
        notes: list[str] = []
        stored = self._stored(notes)
        rows = {name: rows for name, (stamp, rows) in stored.items() if stamps.get(name) == stamp}
        changed = [name for name in files if name not in rows]
        for name in changed:
            try:
                rows[name] = [(p.text, p.source) for p in passages_of(files[name], name=name)]
            except (DataError, MissingDependencyError) as error:
                notes.append(f"left out: {error}")
                rows[name] = []
        gone = len(set(stored) - set(files))
        if changed or gone:
            self._store({name: (stamps[name], rows[name]) for name in files}, notes)
            more = f", {gone} gone" if gone else ""
            notes.append(
                f"index brought up to date: {len(changed)} of {len(files)} files read{more}"
            )
        self._passages = [
            Passage(text=text, source=source)
            for name in sorted(files)
            for text, source in rows[name]
        ]
        if not self._passages:
            why = f" ({notes[0]})" if notes else ""
            raise ExpertError(
                f"expert 'search': no text in the {len(files)} files of {str(self.folder)!r}{why}"
            )
        self._engine = import_extra("bm25s", extra="search", purpose="searching texts").BM25()
        tokens = [words_of(passage.text) or ["-"] for passage in self._passages]
        self._engine.index(tokens, show_progress=False)
        self._stamps, self.notes = stamps, tuple(notes)

    def _stored(self, notes: list[str]) -> dict[str, tuple[Stamp, Rows]]:
        """Stamps and passages by file as they were stored; nothing where that is damaged."""
        if not self._path.exists():
            return {}
        try:
            content = read_bytes(self._path, error=DataError, limit=MAX_INDEX_BYTES)
            checksum, _, rest = content.partition(b"\n")
            if checksum.decode() != hashlib.sha256(rest).hexdigest():
                raise ValueError("checksum differs")
            return _STORED.validate_json(rest)
        except (DataError, ValueError):
            notes.append(f"the index {self.directory.name} was damaged and is rebuilt")
            return {}

    def _store(self, files: dict[str, tuple[Stamp, Rows]], notes: list[str]) -> None:
        """Write the index whole, or say that it cannot be kept."""
        content = json.dumps(files).encode()
        try:
            self.directory.mkdir(exist_ok=True)
            checksum = hashlib.sha256(content).hexdigest().encode()
            write_atomically(self._path, checksum + b"\n" + content)
        except OSError as error:
            notes.append(f"the index cannot be kept next to the folder ({error.strerror})")


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
