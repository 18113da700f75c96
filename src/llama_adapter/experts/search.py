"""The librarian: passages of the user's own texts that bear on the question and the picture."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Finding, Report, Traits
from llama_adapter.experts.search_index import FolderIndex, import_bm25s

WORDING = 'From the user\'s documents: "{}"'
QUERY_WORDS = 64
"""Words of other experts' findings that join the question: a page of text is no query."""


class SearchExpert:
    """Searches a folder by the question and by what other experts read and saw."""

    name = "search"
    # the folder may change at any time, and looking is fast
    traits = Traits(version=None)

    def __init__(self, folder: Path | str, *, passages: int = 3) -> None:
        """Set up; the folder is indexed with the first question."""
        if passages < 1:
            raise ExpertError(f"expert 'search': passages must be at least 1, got {passages}")
        import_bm25s()
        self._index = FolderIndex(Path(folder))
        self._passages = passages
        self._lock = threading.Lock()

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:  # noqa: ARG002
        """Passages that bear on the question alone."""
        return self.consult_after(question, ())

    def consult_after(self, question: str, reports: Sequence[Report]) -> Report:
        """Passages that bear on the question and on what others reported."""
        with self._lock:
            hits = self._index.search(query_of(question, reports), count=self._passages)
            notes = self._index.notes
        findings = tuple(
            Finding(text=hit.passage.text, kind="passage", source=hit.passage.source)
            for hit in hits
        )
        if not findings:
            notes = (*notes, "no passage shares a word with the question or the picture")
        return Report(
            expert=self.name, findings=findings, wording=WORDING, between="\n", notes=notes
        )


def query_of(question: str, reports: Sequence[Report]) -> str:
    """The question, and the words of captions, text and things in the picture."""
    found = [
        word
        for report in reports
        for finding in report.findings
        if finding.kind != "passage"
        for word in finding.text.split()
    ]
    return " ".join([question, *found[:QUERY_WORDS]])
