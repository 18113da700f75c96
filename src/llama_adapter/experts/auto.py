"""`auto`: the experts that a question and its image call for, by signals that cost nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llama_adapter.errors import LlamaAdapterError
from llama_adapter.experts.base import Expert, Report, Request

AUTO = "auto"
TEXT_THRESHOLD = 0.5

_READS = re.compile(
    r"\b(?:read|reads|written|writing|say|says|said|text|texts|word|words|letters?|sign|label|title"
    r"|caption|spell(?:ed|t)?|price[sd]?|cost|costs|total|sum|receipt|invoice|bill|phone|address"
    r"|date|name[sd]?|number plate|licen[cs]e plate|brand|logo|page|document|menu|screen)\b",
    re.IGNORECASE,
)
_LOCATES = re.compile(
    r"\b(?:how many|count|where|left|right|above|below|next to|beside|behind|between|top|bottom"
    r"|position|located|(?:which|what) objects?|things? (?:are|is) there|is there|are there)\b",
    re.IGNORECASE,
)
_SEARCHES = re.compile(
    r"\b(?:according to|my (?:notes|documents|files|manual)|manual|handbook|documentation|why"
    r"|how do|how to|who (?:is|was|made|invented)|what is (?:a|an)|what does .* mean|explain"
    r"|tell me about|instructions? for|warranty|policy|recipe)\b",
    re.IGNORECASE,
)


class AutoRouter:
    """Chooses experts for a pool, and says why it chose them."""

    def __init__(
        self,
        candidates: Sequence[tuple[str, Callable[[], Expert]]],
        *,
        missing: Mapping[str, str] | None = None,
    ) -> None:
        """Set up.

        Args:
            candidates: names and makers; an expert is made when it is first chosen.
            missing: why experts that could be of use are not candidates.
        """
        self._candidates = candidates
        self._missing = missing or {}
        self._made: dict[int, Expert] = {}

    def choose(self, request: Request) -> tuple[list[Expert], Report]:
        """The experts to ask, and a report whose notes say why, or why not."""
        chosen: list[Expert] = []
        notes: list[str] = []
        for index, (name, make) in enumerate(self._candidates):
            reason = reason_for(name, request)
            if reason is None:
                notes.append(f"not {name}")
                continue
            try:
                if index not in self._made:
                    self._made[index] = make()
            except LlamaAdapterError as error:
                notes.append(f"not {name}: {error}")
                continue
            chosen.append(self._made[index])
            notes.append(f"{name}, since {reason}")
        for name, why in self._missing.items():
            if reason_for(name, request) is not None:
                notes.append(f"not {name}: {why}")
        return chosen, Report(expert=AUTO, notes=tuple(notes))


def reason_for(name: str, request: Request) -> str | None:
    """Why to ask an expert; None where there is no reason to. See docs/experts.md for numbers."""
    question = request.question
    if name in {"search", "web"}:
        return "the question asks for knowledge" if _SEARCHES.search(question) else None
    if not request.images:
        return None
    match name:
        # where there is text, too: in the miniature world a caption helps to read a sign
        case "caption":
            return "there is an image"
        case "ocr" if _READS.search(question):
            return "the question asks to read"
        case "ocr" if any(text_likelihood(image) >= TEXT_THRESHOLD for image in request.images):
            return "there seems to be text in the image"
        case "detection" if _LOCATES.search(question):
            return "the question asks where or how many"
        case "ocr" | "detection":
            return None
    return "it was named"


_SIDE = 384
"""Pixels to which the longer side of an image is reduced."""
_BAND, _WINDOW = 6, 24
"""Half of a band's height and of a window's width, in pixels."""
_EDGE = 40
"""Least step in brightness, of 255, that an edge of a letter has."""
_TURNS = 5
"""Changes between dark and light within a window, from which on a row of pixels may be writing."""


def text_likelihood(image: Image.Image) -> float:
    """From 0 to 1: whether some band of the image has the rhythm of writing.

    Writing crosses from dark to light and back many times within a short stretch, at sharp
    edges; so do grass and foliage. It takes some milliseconds.
    """
    small = image.convert("L")
    scale = min(1.0, _SIDE / max(small.size))
    size = [max(round(side * scale), 2 * _BAND) for side in small.size]
    pixels_HW = np.asarray(small.resize(size, Image.Resampling.BOX), dtype=np.float32)
    # text may run upwards, too
    return max(_rhythm(pixels_HW), _rhythm(pixels_HW.T))


def _rhythm(pixels_HW: NDArray[np.float32]) -> float:
    """The largest share of a band's rows that change sides as often as letters do."""
    step_HW = np.diff(pixels_HW, axis=1)
    windows = step_HW.shape[1] // _WINDOW + 2
    turns_HK = np.zeros((len(step_HW), windows), dtype=int)
    for turns_K, row in zip(turns_HK, step_HW, strict=True):
        edges = np.flatnonzero(np.abs(row) > _EDGE)
        turns = edges[1:][np.diff(np.sign(row[edges])) != 0]
        turns_K += np.bincount(turns // _WINDOW, minlength=windows)
    writes_HK = turns_HK[:, :-1] + turns_HK[:, 1:] >= _TURNS
    rows = len(writes_HK) // _BAND * _BAND
    bands = writes_HK[:rows].reshape(-1, _BAND, writes_HK.shape[1]).mean(axis=1)
    return float((bands[:-1] + bands[1:]).max() / 2)
