"""`auto`: the experts that a question and its picture call for, by signals that cost nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llama_adapter.errors import ExpertError, LlamaAdapterError
from llama_adapter.experts.base import Expert, Report

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Signals:
    """What tells which experts to ask."""

    asks_to_read: bool
    asks_where_or_how_many: bool
    asks_for_knowledge: bool
    text_present: bool


def signals_of(images: Sequence[Image.Image], question: str) -> Signals:
    """The signals of a question about pictures."""
    return Signals(
        asks_to_read=bool(_READS.search(question)),
        asks_where_or_how_many=bool(_LOCATES.search(question)),
        asks_for_knowledge=bool(_SEARCHES.search(question)),
        text_present=any(text_likelihood(image) >= TEXT_THRESHOLD for image in images),
    )


_REASONS: Mapping[str, Callable[[Signals], str | None]] = {
    # beside text, too: in the miniature world, signs are read better with a caption before them
    "caption": lambda s: "there is a picture",  # noqa: ARG005
    "ocr": lambda s: (
        "the question asks to read"
        if s.asks_to_read
        else "there seems to be text in the picture"
        if s.text_present
        else None
    ),
    "detection": lambda s: (
        "the question asks where or how many" if s.asks_where_or_how_many else None
    ),
    "search": lambda s: "the question asks for knowledge" if s.asks_for_knowledge else None,
    "web": lambda s: "the question asks for knowledge" if s.asks_for_knowledge else None,
}
"""When each of our experts is asked, and why; those of other packages always are."""

_WITHOUT_PICTURES = frozenset({"search", "web"})

TEXT_THRESHOLD = 0.5
_SIDE = 384
_BAND = 12


def text_likelihood(image: Image.Image) -> float:
    """From 0 to 1: whether some band of the picture has the rhythm of writing.

    Writing crosses from dark to light and back many times within a short stretch, at sharp
    edges. Grass and foliage do so too: this is made to miss no text, at the cost of a look at a
    picture without any. It takes some milliseconds.
    """
    small = image.convert("L")
    scale = _SIDE / max(small.size)
    if scale < 1:
        size = (max(_BAND, round(small.width * scale)), max(_BAND, round(small.height * scale)))
        small = small.resize(size, Image.Resampling.BOX)
    pixels_HW = np.asarray(small, dtype=np.float32)
    # text may run upwards, too
    return max(_rhythm(pixels_HW), _rhythm(pixels_HW.T))


def _rhythm(pixels_HW: NDArray[np.float32]) -> float:
    if min(pixels_HW.shape) < _BAND:
        return 0.0
    step_HW = np.diff(pixels_HW, axis=1)
    sharp_HW = np.where(np.abs(step_HW) > 40, np.sign(step_HW), 0).astype(np.int8)
    best = 0.0
    window = 4 * _BAND
    for top in range(0, sharp_HW.shape[0] - _BAND + 1, _BAND // 2):
        band = sharp_HW[top : top + _BAND]
        for left in range(0, max(1, band.shape[1] - window + 1), window // 2):
            best = max(best, _strokes(band[:, left : left + window]))
    return best


def _strokes(band: NDArray[np.int8]) -> float:
    """How many rows of a window cross strokes as often as letters do, as a share."""
    turns = []
    for row in band:
        edges = row[row != 0]
        turns.append(int((edges[1:] != edges[:-1]).sum()) if len(edges) else 0)
    return float(np.mean(np.asarray(turns) >= 5))


class AutomaticExpert:
    """Chooses experts for a panel, and says why it chose them."""

    name = "auto"

    def __init__(
        self,
        candidates: Mapping[str, Callable[[], Expert]],
        *,
        missing: Mapping[str, str] | None = None,
    ) -> None:
        """Set up.

        Args:
            candidates: makers by name; an expert is made when it is first chosen.
            missing: why experts that could be of use are no candidates.
        """
        self._candidates = candidates
        self._missing = dict(missing or {})
        self._made: dict[str, Expert] = {}

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:  # noqa: ARG002
        """Refused: whoever is chosen needs a panel's time limits."""
        raise ExpertError("expert 'auto' chooses for a panel; use Panel([expert])")

    def choose(self, images: Sequence[Image.Image], question: str) -> tuple[list[Expert], Report]:
        """The experts to ask, and a report whose notes say why, or why not."""
        signals = signals_of(images, question)
        chosen: list[Expert] = []
        notes: list[str] = []
        for name in self._candidates:
            reason = _reason(name, signals, has_images=bool(images))
            if reason is None:
                notes.append(f"not {name}")
                continue
            try:
                if name not in self._made:
                    self._made[name] = self._candidates[name]()
            except LlamaAdapterError as error:
                notes.append(f"not {name}: {error}")
                continue
            chosen.append(self._made[name])
            notes.append(f"{name}, since {reason}")
        for name, why in self._missing.items():
            if _reason(name, signals, has_images=bool(images)) is not None:
                notes.append(f"not {name}: {why}")
        return chosen, Report(expert=self.name, notes=tuple(notes))


def _reason(name: str, signals: Signals, *, has_images: bool) -> str | None:
    """Why to ask an expert; None where there is no reason to."""
    if not has_images and name not in _WITHOUT_PICTURES:
        return None
    rule = _REASONS.get(name)
    return "it was named" if rule is None else rule(signals)
