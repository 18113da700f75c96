"""What an expert is: something that looks at pictures and reports findings in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from llama_adapter.experts.wording import paragraph


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing an expert found."""

    text: str
    kind: str
    """What sort of finding it is: `caption`, `line`, `object`, `passage`, …"""
    confidence: float | None = None
    """From 0 to 1, where the expert has one."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom in pixels of the picture."""
    picture: int = 0
    """Which of the pictures it was found in; to an expert, which of the images it was given."""
    frame: int | None = None
    """Which frame, where the picture is a video."""
    row: int | None = None
    """Findings of one row stand side by side, such as the cells of a table; rows count on."""
    source: str | None = None
    """Where a text comes from, as `notes.md:12` or an address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one expert has to say about a question's pictures."""

    expert: str
    findings: tuple[Finding, ...] = ()
    """In the order in which they are to be read."""
    wording: str = "{}"
    """What stands around the findings in the prompt; `{}` is their place."""
    between: str = " "
    """What parts one finding from the next, where they are not cells of a row."""
    notes: tuple[str, ...] = ()
    """What a user should know: a picture was scaled, lines were left out. Never in a prompt."""
    problem: str | None = None
    """Why the expert has nothing to say, where it failed or ran out of time."""
    seconds: float | None = None
    """How long it took."""
    cached: bool = False
    """Whether the findings were remembered, not found anew."""
    complete: bool = True
    """Whether there was time for all of the pictures; what is cut short is not remembered."""

    @property
    def text(self) -> str:
        """The findings as one paragraph for the prompt, which they cannot break out of."""
        text = paragraph(self.findings, wording=self.wording, between=self.between)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """What whoever consults an expert has to know about it; its attribute `traits`, if any."""

    version: str | None = None
    """Changes whenever the findings could; None: they are never remembered."""
    asks: bool = True
    """Whether findings depend on the question, not on the pictures alone."""
    on_model: bool = False
    """Whether it uses the model that will answer, and must be done before anyone else does."""


class Expert(Protocol):
    """Anything with a name that reports on pictures; it is never trained here.

    `consult` may be called from any thread, one call at a time.
    """

    name: str

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:
        """Findings about the pictures that may help with the question."""
        ...


@runtime_checkable
class TimedExpert(Protocol):
    """An expert that can be told how long it has, and stops by itself."""

    def consult_within(
        self, images: Sequence[Image.Image], question: str, *, seconds: float
    ) -> Report:
        """As `consult`; what is not found in time is left out and noted, or ExpertError raised."""
        ...


@runtime_checkable
class FollowUpExpert(Protocol):
    """An expert that starts from what others found; it is asked without pictures too."""

    def consult_after(self, question: str, reports: Sequence[Report]) -> Report:
        """Findings that may help with the question, given what others reported."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """An expert that leaves the work to others, which it chooses for each question."""

    def choose(
        self, images: Sequence[Image.Image], question: str
    ) -> tuple[Sequence[Expert], Report]:
        """Whom to ask, and a report whose notes say why."""
        ...


def traits_of(expert: Expert) -> Traits:
    """The expert's traits; the most careful ones where it names none."""
    found = getattr(expert, "traits", None)
    return found if isinstance(found, Traits) else Traits()
