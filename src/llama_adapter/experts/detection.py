"""What is where in a picture: any object detector of transformers, its boxes put into words."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Finding, Report, Traits
from llama_adapter.experts.pipelines import check_size, load_pipeline, pipeline_version
from llama_adapter.experts.positions import Box, Group, Seen, group
from llama_adapter.pretrained import load_pretrained

DEFAULT_CONFIDENCE = 0.5
ZERO_SHOT_CONFIDENCE = 0.15
"""Zero-shot detectors score lower: OWL-ViT's own examples take 0.1."""

_WORDS = re.compile(r"[a-z][a-z-]+")
_NO_THINGS = frozenset(
    """
    about above all and any are around below can colour color colours colors count describe
    does doing find for from has have here how image kind large left list look looks lower
    made many much near next not of on one or over picture place please right say see seen
    shape show side size small tell that the their there these they thing things this those
    to top two under upper was what when where which who whose why with you your
    """.split()  # noqa: SIM905
)


class DetectionExpert:
    """Lists things and their places: "two dogs, left; a ball, bottom right"."""

    name = "detection"

    def __init__(
        self,
        model: str,
        *,
        labels: Sequence[str] = (),
        confidence: float | None = None,
        max_things: int = 40,
        device: str | None = None,
    ) -> None:
        """Load a detector by name or directory.

        A zero-shot detector looks for the `labels`, or without them for the question's nouns.
        Raises ExpertError where it cannot be loaded; it says so where torchvision is missing.
        """
        if confidence is not None and not 0 <= confidence <= 1:
            raise ExpertError(f"confidence must be from 0 to 1, got {confidence}")
        self._pipeline, self._is_zero_shot = _load(model, device=device)
        if labels and not self._is_zero_shot:
            raise ExpertError(f"{model!r} knows its own labels; labels are for zero-shot detectors")
        self._labels = tuple(labels)
        usual = ZERO_SHOT_CONFIDENCE if self._is_zero_shot else DEFAULT_CONFIDENCE
        self._confidence = usual if confidence is None else confidence
        self._max_things = max_things
        version = pipeline_version(self._pipeline, self._labels, self._confidence, max_things)
        self.traits = Traits(version=version, asks=self._is_zero_shot and not labels)

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:
        """Things in each picture, the largest first."""
        return self._report(images, question, deadline=None)

    def consult_within(
        self, images: Sequence[Image.Image], question: str, *, seconds: float
    ) -> Report:
        """As `consult`; pictures that are not reached in time are noted."""
        return self._report(images, question, deadline=time.perf_counter() + seconds)

    def _report(
        self, images: Sequence[Image.Image], question: str, *, deadline: float | None
    ) -> Report:
        findings: list[Finding] = []
        notes: list[str] = []
        complete = True
        labels = self._labels or nouns(question)
        if self._is_zero_shot and not labels:
            notes.append("the question names nothing to look for")
            return Report(expert=self.name, notes=tuple(notes))
        for index, image in enumerate(images):
            if deadline is not None and time.perf_counter() >= deadline:
                notes.append(f"time for {index} of {len(images)} pictures only")
                complete = False
                break
            things = self._things(image, labels)
            if len(things) > self._max_things:
                notes.append(f"{len(things)} things seen, the surest {self._max_things} listed")
                things = sorted(things, key=lambda t: -t.confidence)[: self._max_things]
            for found in group(things, width=image.width, height=image.height):
                findings.append(_finding(found, picture=index))
            if not things:
                notes.append(f"nothing seen with a confidence of {self._confidence:g} or more")
        wording = "In the picture: {}."
        return Report(
            expert=self.name,
            findings=tuple(findings),
            wording=wording,
            between="; ",
            notes=tuple(dict.fromkeys(notes)),
            complete=complete,
        )

    def _things(self, image: Image.Image, labels: Sequence[str]) -> list[Seen]:
        check_size(self._pipeline, image)
        options: dict[str, Any] = {"threshold": self._confidence}
        if self._is_zero_shot:
            options["candidate_labels"] = list(labels)
        return [
            Seen(
                label=str(found["label"]),
                confidence=float(found["score"]),
                box=_within(found["box"], image.size),
            )
            for found in self._pipeline(image, **options)
        ]


def _within(box: Mapping[str, float], size: tuple[int, int]) -> Box:
    """A pipeline's box, as far as it lies in the picture."""
    width, height = size
    return (
        min(max(float(box["xmin"]), 0.0), width),
        min(max(float(box["ymin"]), 0.0), height),
        min(max(float(box["xmax"]), 0.0), width),
        min(max(float(box["ymax"]), 0.0), height),
    )


def nouns(question: str) -> tuple[str, ...]:
    """Words of a question that may name things, for a detector that must be told what to find.

    >>> nouns("How many dogs are there, and where is the ball?")
    ('dog', 'ball')
    """
    words = (w for w in _WORDS.findall(question.lower()) if w not in _NO_THINGS and len(w) > 2)
    singular = (w[:-1] if w.endswith("s") and not w.endswith("ss") else w for w in words)
    return tuple(dict.fromkeys(singular))


def _finding(found: Group, *, picture: int) -> Finding:
    boxes = [member.box for member in found.members]
    return Finding(
        text=found.text,
        kind="object",
        confidence=max(member.confidence for member in found.members),
        box=(
            min(box[0] for box in boxes),
            min(box[1] for box in boxes),
            max(box[2] for box in boxes),
            max(box[3] for box in boxes),
        ),
        picture=picture,
    )


def _load(model: str, *, device: str | None) -> tuple[Any, bool]:
    """The pipeline, and whether it is a zero-shot one."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES as ZERO_SHOT,
    )

    from llama_adapter.model.hub import why_missing

    reason = why_missing(model)
    if reason is not None:
        raise ExpertError(f"expert 'detection': {model!r} cannot be loaded: {reason}")
    config = load_pretrained(
        AutoConfig, model, what="model of expert 'detection'", error=ExpertError
    )
    kind = config.model_type
    task = "zero-shot-object-detection" if kind in ZERO_SHOT else "object-detection"
    return load_pipeline(task, model, expert="detection", device=device), kind in ZERO_SHOT
