"""What an expert is: `consult(request)` looks at images and gives a report of findings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

from PIL import Image
from pydantic import AliasChoices, Field


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What an expert found: a line, an object, a passage."""

    text: str
    kind: str
    """What sort of finding it is: `caption`, `line`, `object`, `passage`, …"""
    confidence: float | None = None
    """From 0 to 1, where the expert has one."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom in pixels of the image."""
    image: Annotated[int, Field(validation_alias=AliasChoices("image", "picture"))] = 0
    """Index of the image: of the request's to an expert, of the question's in a pool's report.

    Caches of earlier versions hold it under its older name.
    """
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
    """Whatever reports on images; it is never trained here.

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
            findings=(*report.findings, *(replace(f, image=index) for f in found.findings)),
            notes=tuple(dict.fromkeys((*report.notes, *found.notes))),
            complete=report.complete and found.complete,
        )
    return report
