"""An index of a folder of texts, kept beside it and brought up to date file by file.

    .NAME.llama-adapter-index/
        files.json       each file's size and time, and its passages
        checksums.json   format version and a checksum; an index that does not match is made anew

Only files that changed are read again. bm25s's own tables are made from the passages when the
index is opened (a second for some 20,000): every one of them changes with any file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.errors import DataError, ExpertError, MissingDependencyError
from llama_adapter.experts.passages import Passage, as_rows, passages_of, text_files
from llama_adapter.files import parse_json, read_bytes, read_json

FORMAT = 1
MAX_INDEX_BYTES = 1 << 30
"""A larger index is made anew."""
_FILES, _CHECKSUMS = "files.json", "checksums.json"
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """What is looked up: words in lower case, without the endings that a plural has.

    >>> words_of("Two Batteries, charged")
    ['two', 'battery', 'charged']
    """
    return [_singular(word) for word in _WORD.findall(text.casefold()) if word not in _STOPPED]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


_STOPPED = frozenset(
    """
    a an and are as at be but by can could did do does for from had has have he how i if in into
    is it its many me much my no not of on or our say says she should so tell than that the their
    them then there these they this to us was we were what when where which who whose why will
    with would you your
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A passage that was found."""

    passage: Passage
    score: float
    """BM25: comparable within one search only."""


class FolderIndex:
    """Finds passages in a folder; ExpertError where it holds no text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = folder.resolve().parent / f".{folder.resolve().name}.llama-adapter-index"
        self.notes: tuple[str, ...] = ()
        """What happened when the index was last brought up to date."""
        self._passages: list[Passage] = []
        self._engine: Any = None
        self._state: dict[str, list[int]] = {}

    def search(self, query: str, *, count: int) -> list[Hit]:
        """The best passages, best first; none that share no word with the query."""
        self.update()
        tokens = list(dict.fromkeys(words_of(query)))
        if not tokens or not self._passages:
            return []
        scores = self._engine.get_scores(tokens)
        best = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]
        return [
            Hit(passage=self._passages[i], score=float(scores[i]))
            for i in best
            if float(scores[i]) > 0
        ]

    def update(self) -> None:
        """Read what changed since the last time; nothing where nothing did."""
        files = {str(p.relative_to(self.folder)): p for p in text_files(self.folder)}
        if not files:
            raise ExpertError(
                f"expert 'search': folder {str(self.folder)!r} holds no txt, md, json, jsonl or "
                "pdf file"
            )
        state = {name: _stamp(path) for name, path in files.items()}
        if state == self._state and self._engine is not None:
            return
        notes: list[str] = []
        stored = self._stored(notes)
        fresh = {name: rows for name, (stamp, rows) in stored.items() if state.get(name) == stamp}
        changed = [name for name in files if name not in fresh]
        for name in changed:
            try:
                fresh[name] = as_rows(passages_of(files[name], name=name))
            except (DataError, MissingDependencyError) as error:
                notes.append(f"left out: {error}")
                fresh[name] = []
        if changed or set(stored) != set(files) or self._engine is None:
            self._take({name: fresh[name] for name in sorted(files)})
            if changed or set(stored) != set(files):
                self._store(state, fresh, notes)
                gone = len(set(stored) - set(files))
                notes.append(
                    f"index brought up to date: {len(changed)} of {len(files)} files read"
                    + (f", {gone} gone" if gone else "")
                )
        if not self._passages:
            raise ExpertError(
                f"expert 'search': no text in the {len(files)} files of {str(self.folder)!r}"
                + (f" ({notes[0]})" if notes else "")
            )
        self._state, self.notes = state, tuple(notes)

    def _take(self, rows: Mapping[str, Sequence[Sequence[str]]]) -> None:
        bm25s = import_bm25s()
        self._passages = [
            Passage(text=text, source=source) for some in rows.values() for text, source in some
        ]
        tokens = [words_of(passage.text) or ["-"] for passage in self._passages]
        if self._passages:
            self._engine = bm25s.BM25()
            self._engine.index(tokens, show_progress=False)

    def _stored(self, notes: list[str]) -> dict[str, tuple[list[int], list[list[str]]]]:
        """Stamps and passages by file as they were stored; nothing where that is damaged."""
        path = self.directory / _FILES
        if not path.exists():
            return {}
        try:
            checksums = read_json(self.directory / _CHECKSUMS, error=DataError)
            content = read_bytes(path, error=DataError, limit=MAX_INDEX_BYTES)
            if checksums != {"format": FORMAT, _FILES: hashlib.sha256(content).hexdigest()}:
                raise ValueError("checksums differ")
            return {
                name: (list(entry["stamp"]), [[text, place] for text, place in entry["passages"]])
                for name, entry in parse_json(content, name=_FILES, error=DataError).items()
            }
        except (DataError, ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"the index {self.directory.name} was damaged and is made anew")
            return {}

    def _store(
        self,
        state: Mapping[str, list[int]],
        rows: Mapping[str, Sequence[Sequence[str]]],
        notes: list[str],
    ) -> None:
        """Write the index whole, or say that it cannot be kept."""
        content = json.dumps(
            {name: {"stamp": state[name], "passages": rows[name]} for name in state}
        ).encode()
        checksums = {"format": FORMAT, _FILES: hashlib.sha256(content).hexdigest()}
        try:
            stage = Path(tempfile.mkdtemp(prefix=self.directory.name, dir=self.directory.parent))
        except OSError as error:
            notes.append(f"the index cannot be kept beside the folder ({error.strerror})")
            return
        try:
            (stage / _FILES).write_bytes(content)
            (stage / _CHECKSUMS).write_text(json.dumps(checksums))
            shutil.rmtree(self.directory, ignore_errors=True)
            stage.replace(self.directory)
        except OSError as error:
            # another process may just have put its own there, which is as good
            notes.append(f"the index could not be stored ({error.strerror})")
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def import_bm25s() -> Any:
    """bm25s, or a message that says how to get it."""
    try:
        import bm25s
    except ImportError as error:
        raise MissingDependencyError("bm25s", extra="search", purpose="searching texts") from error
    return bm25s
