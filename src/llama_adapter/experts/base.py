"""What an expert is: `consult(request)` looks at images and gives a report of findings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from PIL import Image

from llama_adapter.experts.wording import QUOTES, harmless

LONGEST_PARAGRAPH = 12_000
"""Characters of a report's text, whatever the budget in tokens."""
CELLS = " | "
"""What parts the cells of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing an expert found."""

    text: str
    kind: str
    """What sort of finding it is: `caption`, `line`, `object`, `passage`, …"""
    confidence: float | None = None
    """From 0 to 1, where the expert has one."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom in pixels of the image."""
    picture: int = 0
    """Index of the image: of the request's to an expert, of the question's in a pool's report."""
    frame: int | None = None
    """Index of the frame, where the image is a video."""
    row: int | None = None
    """Findings of one row stand side by side, such as the cells of a table; rows count on."""
    source: str | None = None
    """Where a text comes from, as `notes.md:12` or an address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one expert found out about a question's images."""

    expert: str
    findings: tuple[Finding, ...] = ()
    """In the order in which they are to be read."""
    wording: str = "{}"
    """What stands around the findings in the prompt; `{}` is their place."""
    between: str = " "
    """Separates the findings, except for the cells of a row."""
    notes: tuple[str, ...] = ()
    """What a user should know: an image was scaled, lines were left out. Never in a prompt."""
    problem: str | None = None
    """Why there are no findings, where the expert failed or ran out of time."""
    seconds: float | None = None
    """How long it took."""
    cached: bool = False
    """Whether the findings come from the cache."""
    complete: bool = True
    """Whether there was time for all images; incomplete reports are not cached."""

    @property
    def text(self) -> str:
        """The findings as one paragraph for the prompt; images are numbered if there are several.

        No finding can end the paragraph or a quotation in it.
        """
        quoted = any(mark in self.wording for mark in "\"'")
        several = any(finding.picture > 0 for finding in self.findings)
        parts: list[str] = []
        for picture, group in groupby(self.findings, lambda finding: finding.picture):
            cells = [[harmless(finding.text) for finding in row] for row in rows_of(list(group))]
            rows = (CELLS.join(cell for cell in row if cell) for row in cells)
            text = self.between.join(row for row in rows if row)
            if quoted:
                text = QUOTES.sub("'", text)
            if text:
                said = self.wording.replace("{}", text)
                parts.append(f"Picture {picture + 1}: {said}" if several else said)
        text = ("\n" if several else " ").join(parts)[:LONGEST_PARAGRAPH]
        # a PDF or JSON file may hold lone surrogates, which no prompt may
        return text.encode("utf-8", "replace").decode()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the text, the findings behind it and how they came about."""
        return {
            "expert": self.expert,
            "text": self.text,
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
            "problem": self.problem,
            "seconds": None if self.seconds is None else round(self.seconds, 4),
            "cached": self.cached,
        }


def rows_of(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings in rows: the cells of a row together, one without a row alone."""

    def key(item: tuple[int, Finding]) -> tuple[object, ...]:
        index, found = item
        return (found.picture, found.frame, found.row, index if found.row is None else None)

    return [[found for _, found in group] for _, group in groupby(enumerate(findings), key)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What an expert is asked."""

    images: Sequence[Image.Image] = ()
    question: str = ""
    deadline: float | None = None
    """When the report must be there, by `time.monotonic`; None: any time."""
    reports: Sequence[Report] = ()
    """What other experts found; only experts with `reads_reports` get them."""

    @property
    def seconds_left(self) -> float | None:
        """Time until the deadline, negative after it; None where there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertInfo:
    """What has to be known to consult an expert."""

    version: str | None = None
    """Changes whenever the findings could; None: they are never cached."""
    uses_question: bool = True
    """Whether findings depend on the question, not on the images alone."""
    uses_model: bool = False
    """Whether it runs the model that will answer, which no other thread may do meanwhile."""
    reads_reports: bool = False
    """Whether it starts from what others found; it comes last and needs no image."""


class Expert(Protocol):
    """Anything that reports on images; it is never trained here.

    `consult` may be called from any thread, one call at a time. It should stop by itself at the
    request's deadline: what is not found in time is left out and noted, or ExpertError raised.
    """

    @property
    def name(self) -> str: ...

    @property
    def info(self) -> ExpertInfo: ...

    def consult(self, request: Request) -> Report:
        """Findings about the request's images that may help with its question."""
        ...


def on_each_image(
    request: Request, look: Callable[[Image.Image], Report], report: Report
) -> Report:
    """The report with what `look` reports of each image; those not reached in time are noted."""
    for index, image in enumerate(request.images):
        if request.is_late:
            note = f"time for {index} of {len(request.images)} images only"
            return replace(report, notes=(*report.notes, note), complete=False)
        found = look(image)
        report = replace(
            report,
            findings=(*report.findings, *(replace(f, picture=index) for f in found.findings)),
            notes=tuple(dict.fromkeys((*report.notes, *found.notes))),
            complete=report.complete and found.complete,
        )
    return report
