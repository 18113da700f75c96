"""What an expert is: something that looks at pictures and reports findings in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


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
    """Which of the pictures or frames it was found in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one expert has to say about a question's pictures."""

    expert: str
    findings: tuple[Finding, ...]

    @property
    def text(self) -> str:
        """The findings as one paragraph for the prompt."""
        return " ".join(finding.text for finding in self.findings)


class Expert(Protocol):
    """Anything with a name that reports on pictures; it is never trained here."""

    name: str

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:
        """Findings about the pictures that may help with the question."""
        ...
