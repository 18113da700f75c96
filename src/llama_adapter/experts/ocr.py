"""The reader: words in pictures, in reading order, with columns and tables kept legible."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from PIL import Image

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Finding, Report, Traits
from llama_adapter.experts.ocr_engine import OcrEngine, Page
from llama_adapter.experts.reading_order import rows_of

DEFAULT_WORDING = 'Text in the picture: "{}"'
_LAYOUT = "4"
"""Counts up when what is done with the engine's lines changes."""

_EAST_ASIAN = frozenset({"ch", "chinese_cht", "japan"})
_IDEOGRAPHS = re.compile("[\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f]")


class OcrExpert:
    """Reads pictures with RapidOCR, offline, with the models in its wheel."""

    name = "ocr"

    def __init__(
        self,
        *,
        confidence: float = 0.5,
        languages: Sequence[str] = (),
        models: str | None = None,
        threads: int = 1,
        wording: str = DEFAULT_WORDING,
    ) -> None:
        """Set up; see `OcrEngine` for languages and models.

        Args:
            confidence: what the engine is less sure of is left out, and counted in a note.
            languages: what the text is in; where none of them is written in ideographs, a cross
                is not taken for one. None: whatever the models read.
            models: a folder with other models.
            threads: threads of the processor for one picture.
            wording: what stands around the text in a prompt; `{}` is its place.
        """
        if not 0 <= confidence <= 1:
            raise ExpertError(f"expert 'ocr': confidence must be from 0 to 1, got {confidence}")
        if threads < 1:
            raise ExpertError(f"expert 'ocr': threads must be at least 1, got {threads}")
        if "{}" not in wording:
            raise ExpertError(
                f"expert 'ocr': wording must have a place for the text, {{}}, got {wording!r}"
            )
        self._engine = OcrEngine(languages=languages, models=models, threads=threads)
        self._without_ideographs = bool(languages) and _EAST_ASIAN.isdisjoint(languages)
        self._confidence = confidence
        self._wording = wording
        version = f"{self._engine.version}-{_LAYOUT}-{confidence}-{wording}"
        self.traits = Traits(version=version, asks=False)

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:  # noqa: ARG002
        """Every line of every picture."""
        return self._report(images, deadline=None)

    def consult_within(
        self,
        images: Sequence[Image.Image],
        question: str,  # noqa: ARG002
        *,
        seconds: float,
    ) -> Report:
        """As `consult`; what is not read in time is noted."""
        # the last tile must be done when time is up
        return self._report(images, deadline=time.perf_counter() + 0.8 * seconds)

    def _report(self, images: Sequence[Image.Image], *, deadline: float | None) -> Report:
        findings: list[Finding] = []
        notes: list[str] = []
        complete = True
        for index, image in enumerate(images):
            if deadline is not None and time.perf_counter() >= deadline:
                notes.append(f"time for {index} of {len(images)} pictures only")
                complete = False
                break
            page = self._engine.read(image, deadline=deadline)
            complete = complete and page.complete
            found, unsure = self._findings(page, picture=index)
            findings += found
            notes += page.notes
            if unsure:
                notes.append(
                    f"{unsure} unclear line{'s' * (unsure > 1)} left out "
                    f"(confidence below {self._confidence:g})"
                )
            if not found:
                notes.append("no legible text" if unsure else "no text found")
        return Report(
            expert=self.name,
            findings=tuple(findings),
            wording=self._wording,
            between="\n",
            notes=tuple(dict.fromkeys(notes)),
            complete=complete,
        )

    def _findings(self, page: Page, *, picture: int) -> tuple[list[Finding], int]:
        """Findings in reading order, and how many lines were left out as unclear."""
        words = [i for i, line in enumerate(page.lines) if self._says_something(line.text)]
        clear = [i for i in words if page.lines[i].confidence >= self._confidence]
        upright = [page.upright[i] for i in clear]
        findings = []
        for row, members in enumerate(rows_of(upright)):
            for member in members:
                line = page.lines[clear[member]]
                box = tuple(round(side, 1) for side in line.box)
                findings.append(
                    Finding(
                        text=line.text.strip(),
                        kind="line",
                        confidence=round(line.confidence, 4),
                        box=(box[0], box[1], box[2], box[3]),
                        picture=picture,
                        row=row,
                    )
                )
        return findings, len(words) - len(clear)

    def _says_something(self, text: str) -> bool:
        """Whether a line holds a letter or figure: rules, bullets and crosses say nothing."""
        if self._without_ideographs:
            text = _IDEOGRAPHS.sub("", text)
        return any(c.isalnum() for c in text)
