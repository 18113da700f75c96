"""Words in images, in reading order, with columns and tables kept legible."""

from __future__ import annotations

import re

from PIL import Image
from pydantic import field_validator

from llama_adapter.experts.base import ExpertInfo, Finding, Report, Request, on_each_image
from llama_adapter.experts.ocr_engine import OcrEngine
from llama_adapter.experts.options import Count, ExpertContext, ExpertOptions, Share, Words
from llama_adapter.experts.reading_order import rows_of

_LAYOUT = "4"
"""Counts up when what is done with the engine's lines changes."""
_EAST_ASIAN = frozenset({"ch", "chinese_cht", "japan"})
_IDEOGRAPHS = re.compile("[\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f]")


class OcrOptions(ExpertOptions):
    """Reads the words in the image."""

    name = "ocr"
    needs = (("rapidocr", "ocr"), ("onnxruntime", "ocr"))

    confidence: Share = 0.5
    """Lines that the engine is less sure of are left out, and counted in a note."""
    languages: Words = ()
    """What the text is in; where none of them is written in ideographs, a cross is not taken for
    one. None: whatever the models read."""
    models: str | None = None
    """A folder with other models; see `OcrEngine`."""
    threads: Count = 1
    """Threads of the processor for one image."""
    wording: str = 'Text in the picture: "{}"'
    """What stands around the text in a prompt; `{}` is its place."""

    @field_validator("wording")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if "{}" not in value:
            raise ValueError("must have a place for the text, {}")
        return value

    def open(self, context: ExpertContext) -> OcrExpert:  # noqa: ARG002
        return OcrExpert(self)


class OcrExpert:
    """Reads images with RapidOCR, offline, with the models in its wheel."""

    name = "ocr"

    def __init__(self, options: OcrOptions | None = None) -> None:
        """Set up; models are loaded with the first image."""
        options = options or OcrOptions()
        languages = options.languages
        self._engine = OcrEngine(
            languages=languages, models=options.models, threads=options.threads
        )
        self._without_ideographs = bool(languages) and _EAST_ASIAN.isdisjoint(languages)
        self._options = options
        version = f"{self._engine.version}-{_LAYOUT}-{options.confidence}-{options.wording}"
        self.info = ExpertInfo(version=version, uses_question=False)

    def consult(self, request: Request) -> Report:
        """Every line of every image; what is not read in time is noted."""
        deadline, seconds = request.deadline, request.seconds_left
        if deadline is not None and seconds is not None:
            # the last tile must be done when time is up
            deadline -= 0.2 * seconds
        report = Report(expert=self.name, wording=self._options.wording, between="\n")
        return on_each_image(request, lambda image: self._read(image, deadline), report)

    def _read(self, image: Image.Image, deadline: float | None) -> Report:
        """Findings in reading order; what was left out as unclear is noted."""
        page = self._engine.read(image, deadline=deadline)
        least = self._options.confidence
        words = [i for i, line in enumerate(page.lines) if self._says_something(line.text)]
        clear = [i for i in words if page.lines[i].confidence >= least]
        findings = []
        for row, members in enumerate(rows_of([page.upright[i] for i in clear])):
            for line in (page.lines[clear[member]] for member in members):
                left, top, right, bottom = (round(side, 1) for side in line.box)
                findings.append(
                    Finding(
                        text=line.text.strip(),
                        kind="line",
                        confidence=round(line.confidence, 4),
                        box=(left, top, right, bottom),
                        row=row,
                    )
                )
        notes = list(page.notes)
        if unsure := len(words) - len(clear):
            lines = "line" if unsure == 1 else "lines"
            notes.append(f"{unsure} unclear {lines} left out (confidence below {least:g})")
        if not findings:
            notes.append("no legible text" if unsure else "no text found")
        return Report(
            expert=self.name, findings=tuple(findings), notes=tuple(notes), complete=page.complete
        )

    def _says_something(self, text: str) -> bool:
        """Whether a line holds a letter or figure: rules, bullets and crosses say nothing."""
        if self._without_ideographs:
            text = _IDEOGRAPHS.sub("", text)
        return any(c.isalnum() for c in text)
