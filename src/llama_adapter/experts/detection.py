"""What is where in an image: any object detector of transformers, its boxes put into words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image
from pydantic import Field

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import ExpertInfo, Finding, Report, Request, on_each_image
from llama_adapter.experts.options import ExpertContext, ExpertOptions, Share, Words
from llama_adapter.experts.pipelines import check_size, load_pipeline, pipeline_version
from llama_adapter.experts.wording import words_of

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
DEFAULT_CONFIDENCE = 0.5
ZERO_SHOT_CONFIDENCE = 0.15
"""Zero-shot detectors score lower: OWL-ViT's own examples take 0.1."""
MOST_OBJECTS = 40
SAME = 0.8
"""Intersection over union from which on two boxes of one label are one object."""

_WORD = re.compile(r"[a-z][a-z-]+")
_NOT_NOUNS = frozenset(
    """
    about above all any around below colour color colours colors count describe doing find here
    image kind large left list look looks lower made near next one over picture place right see
    seen shape show side size small thing things top two under upper
    """.split()  # noqa: SIM905
)


class DetectionOptions(ExpertOptions):
    """Lists the objects in the image and where they are."""

    name = "detection"
    main = "model"

    model: str = Field(
        min_length=1, description="the name or directory of an object-detection model"
    )
    labels: Words = ()
    """What a zero-shot detector looks for; without labels, the question's nouns."""
    confidence: Share | None = None

    def open(self, context: ExpertContext) -> DetectionExpert:
        return DetectionExpert(self, device=context.device)


class DetectionExpert:
    """Lists objects and their places: "2 x dog, left; ball, bottom right"."""

    name = "detection"

    def __init__(self, options: DetectionOptions, *, device: str | None = None) -> None:
        """Load a detector by name or directory; ExpertError where it cannot be loaded."""
        self._pipeline = load_pipeline(
            "zero-shot-object-detection",
            options.model,
            expert=self.name,
            other_task="object-detection",
            device=device,
        )
        self._is_zero_shot = str(self._pipeline.task).startswith("zero-shot")
        if options.labels and not self._is_zero_shot:
            raise ExpertError(
                f"{options.model!r} knows its own labels; labels are for zero-shot detectors"
            )
        self._labels = options.labels
        usual = ZERO_SHOT_CONFIDENCE if self._is_zero_shot else DEFAULT_CONFIDENCE
        self._confidence = usual if options.confidence is None else options.confidence
        version = pipeline_version(self._pipeline, self._labels, self._confidence, MOST_OBJECTS)
        asks = self._is_zero_shot and not self._labels
        self.info = ExpertInfo(version=version, uses_question=asks)

    def consult(self, request: Request) -> Report:
        """Objects in each image, the largest first; images not reached in time are noted."""
        labels = self._labels or nouns(request.question)
        if self._is_zero_shot and not labels:
            return Report(expert=self.name, notes=("the question names nothing to look for",))
        report = Report(expert=self.name, wording="In the image: {}.", between="; ")
        return on_each_image(request, lambda image: self._look(image, labels), report)

    def _look(self, image: Image.Image, labels: Sequence[str]) -> Report:
        found = sorted(self._objects(image, labels), key=_confidence, reverse=True)
        notes: tuple[str, ...] = ()
        if len(found) > MOST_OBJECTS:
            notes = (f"{len(found)} objects seen, the surest {MOST_OBJECTS} listed",)
        if not found:
            notes = (f"nothing seen with a confidence of {self._confidence:g} or more",)
        findings = grouped(found[:MOST_OBJECTS], size=image.size)
        return Report(expert=self.name, findings=tuple(findings), notes=notes)

    def _objects(self, image: Image.Image, labels: Sequence[str]) -> list[Finding]:
        """Each object with its label as text, its box within the image."""
        check_size(self._pipeline, image)
        options: dict[str, Any] = {"threshold": self._confidence}
        if self._is_zero_shot:
            options["candidate_labels"] = list(labels)
        sides = {"xmin": image.width, "ymin": image.height, "xmax": image.width,
                 "ymax": image.height}  # fmt: skip
        objects = []
        for found in self._pipeline(image, **options):
            box = [min(max(float(found["box"][key]), 0.0), side) for key, side in sides.items()]
            objects.append(
                Finding(
                    text=str(found["label"]),
                    kind="object",
                    confidence=float(found["score"]),
                    box=(box[0], box[1], box[2], box[3]),
                )
            )
        return objects


def _confidence(finding: Finding) -> float:
    return finding.confidence or 0.0


def nouns(question: str) -> tuple[str, ...]:
    """Words of a question that may name objects, for a detector that must be told what to find.

    >>> nouns("How many dogs are there, and where is the ball?")
    ('dog', 'ball')
    """
    kept = (word for word in _WORD.findall(question.lower()) if word not in _NOT_NOUNS)
    found = (word for word in words_of(" ".join(kept)) if len(word) > 2)
    return tuple(dict.fromkeys(found))


def place(box: Box, *, size: tuple[int, int]) -> str:
    """Where the middle of a box is: a cell of a three by three grid.

    >>> place((0, 0, 10, 10), size=(100, 100))
    'top left'
    >>> place((40, 80, 60, 100), size=(100, 100))
    'bottom'
    >>> place((0, 0, 95, 99), size=(100, 100))
    'filling the image'
    """
    width, height = size
    if _area(box) >= 0.8 * width * height:
        return "filling the image"
    x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    return f"{row} {column}".strip() or "center"


def grouped(objects: Sequence[Finding], *, size: tuple[int, int]) -> list[Finding]:
    """Objects of one label and place as one finding, such as `2 x dog, left`; largest first.

    Of boxes of one label that all but coincide the surest counts.
    """
    groups: dict[tuple[str, str], list[Finding]] = {}
    kept: list[Finding] = []
    for found_object in sorted(objects, key=_confidence, reverse=True):
        assert found_object.box is not None
        twins = (k.box for k in kept if k.text == found_object.text and k.box is not None)
        if all(intersection_over_union(box, found_object.box) < SAME for box in twins):
            kept.append(found_object)
            where = place(found_object.box, size=size)
            groups.setdefault((found_object.text, where), []).append(found_object)
    found = []
    for (label, where), members in groups.items():
        boxes = [member.box for member in members if member.box is not None]
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        count = f"{len(members)} x " if len(members) > 1 else ""
        finding = Finding(
            text=f"{count}{label}, {where}",
            kind="object",
            confidence=members[0].confidence,
            box=(min(lefts), min(tops), max(rights), max(bottoms)),
        )
        found.append((max(map(_area, boxes)), finding))
    return [finding for _, finding in sorted(found, key=lambda pair: -pair[0])]


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection_over_union(one: Box, other: Box) -> float:
    """Share of their common area in the area that either covers.

    >>> intersection_over_union((0, 0, 2, 1), (1, 0, 3, 1))
    0.3333333333333333
    """
    left, top = max(one[0], other[0]), max(one[1], other[1])
    common = _area((left, top, max(left, min(one[2], other[2])), min(one[3], other[3])))
    union = _area(one) + _area(other) - common
    return common / union if union > 0 else 0.0
