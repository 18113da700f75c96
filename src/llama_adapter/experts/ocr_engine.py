"""RapidOCR behind one function: any image in, lines of text out.

Pages that lie on their side or upside down are turned, small images enlarged, large ones read
in overlapping tiles, and what was done is said. The models are those inside RapidOCR's wheel;
nothing is downloaded.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llama_adapter.errors import ExpertError, import_extra
from llama_adapter.experts.reading_order import Line
from llama_adapter.files import expanded

TILE = 1600
"""Longest side of a tile in pixels; RapidOCR itself reduces whatever is larger than 2,000."""
SHORT_TILE = 1280
"""Longest side of a tile that is less than half as wide: in longer ones lines were missed."""
OVERLAP = 160
"""Pixels that neighboring tiles share, so that a line is whole in one of them."""
MAX_TILES = 64
"""Beyond that an image is reduced first."""
SMALL_SIDE = 96
"""An image whose shorter side is smaller is read in several ways, enlarged among them."""
MAX_FACTOR = 6
THINNEST = 6
"""Pixels under which no letter fits."""
MARGIN = 24
"""White around an enlarged image: text that touches the edge is not found."""
SMALL_LETTERS = 14
"""Pixels of height; a page of smaller letters is read again, enlarged."""
BLANK = 2.0
"""Standard deviation of brightness below which a tile is empty."""

LANGUAGES = frozenset(
    """
    ch en chinese_cht japan af az bs ca cs cy da de es et eu fi fr ga gl hr hu id is it ku
    la lb lt lv mi ms mt nl no oc pi pl pt qu rm ro rs_latin sk sl sq sv sw tl tr uz vi
    """.split()  # noqa: SIM905
)
"""What the models inside the wheel read, by RapidOCR's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What an image says."""

    lines: tuple[Line, ...]
    """In the image's own pixels, in no particular order."""
    notes: tuple[str, ...] = ()
    complete: bool = True
    """Whether there was time for all of it."""
    upright: tuple[Line, ...] = ()
    """The same lines on the image turned upright, for those who put them in order."""


class OcrEngine:
    """RapidOCR with the models of its wheel, or with the user's own."""

    def __init__(
        self, *, languages: Sequence[str] = (), models: str | None = None, threads: int = 1
    ) -> None:
        """Check the settings; models are loaded with the first image.

        Args:
            languages: what the text is in, by RapidOCR's names; those the wheel's models cannot
                read need `models`.
            models: a folder with `rec.onnx` (its alphabet inside, or in `keys.txt` next to it)
                and perhaps `det.onnx`.
            threads: threads of the processor for one image.
        """
        self._models = _model_files(models)
        self._languages = tuple(languages)
        self._threads = threads
        self._lock = threading.Lock()
        self._engine: Any = None
        unknown = [name for name in self._languages if name not in LANGUAGES]
        if unknown and not self._models:
            raise ExpertError(
                f"expert 'ocr': language {unknown[0]!r} is not among what the installed models "
                f"read ({', '.join(sorted(LANGUAGES))}); name a folder with others: models=DIR"
            )

    @property
    def version(self) -> str:
        """Changes with the engine and its models."""
        models = [f"{p.name}-{p.stat().st_size}" for p in self._models.values()]
        return "-".join(["rapidocr", version("rapidocr"), *models, *self._languages])

    def read(self, image: Image.Image, *, deadline: float | None = None) -> Page:
        """Every line of the image, or of those tiles that are read before the deadline."""
        image = image.convert("RGB")
        if min(image.size) < THINNEST:
            note = f"{image.width}x{image.height} pixels are too thin for letters"
            return Page(lines=(), notes=(note,))
        page = self._read_upright(image, deadline)
        turn = self._turn(image, page.lines)
        if not turn:
            return replace(page, upright=page.lines)
        page = self._read_upright(image.rotate(-turn, expand=True), deadline)
        lines = tuple(_turned_back(line, turn, image.size) for line in page.lines)
        notes = (f"turned by {turn} degrees", *page.notes)
        return replace(page, lines=lines, notes=notes, upright=page.lines)

    def _read_upright(self, image: Image.Image, deadline: float | None) -> Page:
        if len(_tiles(image.size, 1.0)) > 1:
            return self._tiled(image, deadline)
        if min(image.size) < SMALL_SIDE:
            return self._small(image)
        lines = self._lines(image)
        heights = sorted(min(line.size) for line in lines)
        if heights and heights[len(heights) // 2] < SMALL_LETTERS and max(image.size) * 2 <= TILE:
            larger = self._enlarged(image, 2)
            if _letters(larger.lines) >= _letters(lines):
                return larger
        return Page(lines=tuple(lines))

    def _small(self, image: Image.Image) -> Page:
        """A cut-out word or a thumbnail: the surest of what it says as it is, enlarged, or
        taken for a single word, since a word that fills its image is not a region to a detector.
        """
        factor = max(2, min(MAX_FACTOR, math.ceil(SMALL_SIDE / min(image.size))))
        pages = [Page(lines=tuple(self._lines(image))), self._enlarged(image, factor)]
        if image.width >= 0.8 * image.height:
            pages.insert(0, Page(lines=tuple(self._lines(image, is_one_word=True))))
        return max(pages, key=lambda page: _letters(page.lines))

    def _enlarged(self, image: Image.Image, factor: int) -> Page:
        size = (image.width * factor, image.height * factor)
        # text that touches the edge is not found
        larger = Image.new("RGB", (size[0] + 2 * MARGIN, size[1] + 2 * MARGIN), (255, 255, 255))
        larger.paste(image.resize(size, Image.Resampling.BICUBIC), (MARGIN, MARGIN))
        lines = self._lines(larger)
        moved = tuple(line.moved(dx=-MARGIN, dy=-MARGIN, scale=1 / factor) for line in lines)
        return Page(lines=moved, notes=(f"enlarged {factor} times",))

    def _tiled(self, image: Image.Image, deadline: float | None) -> Page:
        original = f"{image.width}x{image.height} pixels"
        scale = 1.0
        while len(_tiles(image.size, scale)) > MAX_TILES:
            scale *= 0.9
        notes: list[str] = []
        if scale < 1.0:
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.LANCZOS)
            reduced = f"{original} were reduced to {size[0]}x{size[1]}"
            notes.append(f"{reduced}: small letters may be lost")
        tiles = _tiles(image.size, 1.0)
        notes.insert(0, f"{original} were read in {len(tiles)} tiles")
        lines: list[Line] = []
        complete = True
        for done, box in enumerate(tiles):
            if deadline is not None and time.monotonic() >= deadline:
                notes.append(f"time for {done} of {len(tiles)} tiles only")
                complete = False
                break
            tile = image.crop(box)
            if np.asarray(tile.convert("L").reduce(4)).std() < BLANK:
                continue
            # a strip's tiles are as thin as it is
            thin = min(tile.size) < SMALL_SIDE
            for line in self._small(tile).lines if thin else self._lines(tile):
                _take_in(line.moved(dx=box[0], dy=box[1]), lines)
        moved = tuple(line.moved(scale=1 / scale) for line in lines)
        return Page(lines=moved, notes=tuple(notes), complete=complete)

    def _turn(self, image: Image.Image, lines: Sequence[Line]) -> int:
        """Degrees, clockwise, that make the image upright: 0, 90, 180 or 270."""
        long = [line for line in lines if len(line.text) >= 3]
        if not long:
            return 0
        tall = [line for line in long if line.size[1] > 1.5 * line.size[0]]
        sideways = len(tall) > len(long) / 2
        voters = sorted(tall if sideways else long, key=lambda line: -max(line.size))[:7]
        flipped = 0
        for line in voters:
            left, top, right, bottom = line.box
            crop = image.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))
            flipped += self._is_upside_down(crop.rotate(-90, expand=True) if sideways else crop)
        return 90 * sideways + 180 * (flipped > len(voters) / 2)

    def _is_upside_down(self, crop: Image.Image) -> bool:
        if min(crop.size) < 2:
            return False
        result = self._run(crop, use_det=False, use_cls=True, use_rec=False)
        label, score = result.cls_res[0]
        return label == "180" and float(score) > 0.8

    def _lines(self, image: Image.Image, *, is_one_word: bool = False) -> list[Line]:
        """What the engine reads, all over the image or taking it as one word."""
        if is_one_word:
            result = self._run(image, use_det=False, use_cls=False, use_rec=True)
            right, bottom = float(image.width), float(image.height)
            boxes: Any = [((0.0, 0.0), (right, 0.0), (right, bottom), (0.0, bottom))]
        else:
            result = self._run(image, use_det=True, use_cls=True, use_rec=True, text_score=0.0)
            boxes = result.boxes
        if result.txts is None or boxes is None:
            return []
        return [
            Line(
                text=str(text),
                confidence=float(score),
                quad=tuple((float(x), float(y)) for x, y in box),
            )
            for box, text, score in zip(boxes, result.txts, result.scores, strict=True)
            if str(text).strip()
        ]

    def _run(self, image: Image.Image, **stages: Any) -> Any:
        """RapidOCR; all three stages must be named, for it remembers them from call to call."""
        with self._lock:
            if self._engine is None:
                settings: dict[str, Any] = {
                    "Global.log_level": "critical",
                    # smaller images than this are ours to enlarge, larger ones ours to cut
                    "Global.max_side_len": 2000,
                    "EngineConfig.onnxruntime.intra_op_num_threads": self._threads,
                    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                }
                paths = {key: str(path) for key, path in self._models.items()}
                self._engine = import_rapidocr()(params=settings | paths)
            return self._engine(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]), **stages)


def import_rapidocr() -> Any:
    """RapidOCR's class, or a message that says how to get it."""
    # its own logger alone is set, for sys.stdout belongs to the threads that print an answer
    # meanwhile; importing it sets the level back
    logger = logging.getLogger("RapidOCR")
    logger.setLevel(logging.CRITICAL)
    rapidocr = import_extra("rapidocr", extra="ocr", purpose="reading text")
    logger.setLevel(logging.CRITICAL)
    return rapidocr.RapidOCR


def _model_files(models: str | None) -> dict[str, Path]:
    if models is None:
        return {}
    folder = expanded(models)
    names = {
        "Rec.model_path": "rec.onnx",
        "Rec.rec_keys_path": "keys.txt",
        "Det.model_path": "det.onnx",
    }
    files = {key: folder / name for key, name in names.items() if (folder / name).is_file()}
    if "Rec.model_path" not in files:
        raise ExpertError(f"expert 'ocr': models folder {models!r} holds no rec.onnx")
    return files


def _letters(lines: Sequence[Line]) -> float:
    """How much was read, unsure letters counting much less."""
    return sum(len(line.text) * line.confidence**2 for line in lines)


def _turned_back(line: Line, turn: int, size: tuple[int, int]) -> Line:
    """A line of the turned image in the pixels of the image of that size."""
    width, height = size
    undo = {
        90: lambda x, y: (y, height - x),
        180: lambda x, y: (width - x, height - y),
        270: lambda x, y: (width - y, x),
    }[turn]
    return replace(line, quad=tuple(undo(x, y) for x, y in line.quad))


def _tiles(size: tuple[int, int], scale: float) -> list[tuple[int, int, int, int]]:
    """Overlapping tiles that cover an image of that size, reduced by a scale."""
    sides = [max(1, round(side * scale)) for side in size]
    longest = min(TILE, max(SHORT_TILE, 2 * min(sides)))
    across, down = (_spans(side, longest) for side in sides)
    return [(left, top, right, bottom) for top, bottom in down for left, right in across]


def _spans(length: int, longest: int) -> list[tuple[int, int]]:
    """Even, overlapping stretches of at most a tile's side."""
    if length <= longest:
        return [(0, length)]
    count = math.ceil((length - OVERLAP) / (longest - OVERLAP))
    step = (length - longest) / (count - 1)
    return [(round(i * step), round(i * step) + longest) for i in range(count)]


def _take_in(line: Line, lines: list[Line]) -> None:
    """Add a tile's line to those of other tiles; of two that lie over each other the longer one."""
    rivals = [other for other in lines if _overlap(line, other) > 0.5]
    if all(max(other.size) < max(line.size) for other in rivals):
        lines[:] = [other for other in lines if other not in rivals]
        lines.append(line)


def _overlap(one: Line, other: Line) -> float:
    """Share of the smaller box that the two have in common."""
    a, b = one.box, other.box
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min(math.prod(one.size), math.prod(other.size))
    return width * height / smaller if min(width, height, smaller) > 0 else 0.0
