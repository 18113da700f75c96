"""Passages of the user's own texts that bear on the question and the image."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pydantic import Field

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import ExpertInfo, Finding, Report, Request
from llama_adapter.experts.options import Count, ExpertContext, ExpertOptions
from llama_adapter.experts.search_index import FolderIndex
from llama_adapter.files import expanded

QUERY_WORDS = 64
"""Words of other experts' findings that join the question: a page of text is not a query."""


class SearchOptions(ExpertOptions):
    """Finds passages in a folder of texts."""

    name = "search"
    main = "folder"
    needs = (("bm25s", "search"),)

    folder: str = Field(min_length=1, description="a folder of texts")
    passages: Count = 3
    """Most passages to show the model."""

    def open(self, context: ExpertContext) -> SearchExpert:  # noqa: ARG002
        return SearchExpert(self)


class SearchExpert:
    """Searches a folder by the question and by what other experts read and saw."""

    name = "search"
    # the folder may change at any time, and looking is fast
    info = ExpertInfo(version=None, reads_reports=True)

    def __init__(self, options: SearchOptions) -> None:
        """Set up; the folder is indexed with the first question."""
        folder = expanded(options.folder)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ExpertError(f"expert 'search': folder {options.folder!r} {what}")
        self._index = FolderIndex(folder)
        self._passages = options.passages
        self._lock = threading.Lock()

    def consult(self, request: Request) -> Report:
        """Passages that bear on the question and on what others reported."""
        query = query_of(request.question, request.reports)
        with self._lock:
            hits = self._index.search(query, count=self._passages)
            notes = self._index.notes
        if not hits:
            notes = (*notes, "no passage shares a word with the question or the image")
        return Report(
            expert=self.name,
            findings=tuple(
                Finding(text=hit.text, kind="passage", source=hit.source) for hit in hits
            ),
            wording='From the user\'s documents: "{}"',
            between="\n",
            notes=notes,
        )


def query_of(question: str, reports: Sequence[Report]) -> str:
    """The question, and the words of captions, text and objects in the image."""
    found = [
        word
        for report in reports
        for finding in report.findings
        if finding.kind != "passage"
        for word in finding.text.split()
    ]
    return " ".join([question, *found[:QUERY_WORDS]])
