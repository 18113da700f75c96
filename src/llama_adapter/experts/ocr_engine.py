"""RapidOCR behind one function: any picture in, lines of text out.

Pages that lie on their side or upside down are turned, small pictures enlarged, large ones read
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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llama_adapter.errors import ExpertError, MissingDependencyError
from llama_adapter.experts.reading_order import Line, Quad

TILE = 1600
"""Longest side of a tile in pixels; RapidOCR itself reduces whatever is larger than 2,000."""
SHORT_TILE = 1280
"""Longest side of a tile that is less than half as wide: in longer ones lines were missed."""
OVERLAP = 160
"""Pixels that neighbouring tiles share, so that a line is whole in one of them."""
MAX_TILES = 64
"""Beyond that a picture is reduced first."""
SMALL_SIDE = 96
"""A picture whose shorter side is smaller is read in several ways, enlarged among them."""
MAX_FACTOR = 6
THINNEST = 6
"""Pixels under which no letter fits."""
MARGIN = 24
"""White around an enlarged picture: text that touches the edge is not found."""
SMALL_LETTERS = 14
"""Pixels of height; a page of smaller letters is read again, enlarged."""

LANGUAGES = frozenset(
    """
    ch en chinese_cht japan af az bs ca cs cy da de es et eu fi fr ga gl hr hu id is it ku
    la lb lt lv mi ms mt nl no oc pi pl pt qu rm ro rs_latin sk sl sq sv sw tl tr uz vi
    """.split()  # noqa: SIM905
)
"""What the models inside the wheel read, by RapidOCR's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What a picture says."""

    lines: tuple[Line, ...]
    """In the picture's own pixels, in no particular order."""
    notes: tuple[str, ...] = ()
    complete: bool = True
    """Whether there was time for all of it."""
    upright: tuple[Line, ...] = ()
    """The same lines on the turned picture, for those who put them in order."""


class OcrEngine:
    """RapidOCR with the models of its wheel, or with the user's own."""

    def __init__(
        self, *, languages: Sequence[str] = (), models: str | None = None, threads: int = 1
    ) -> None:
        """Check the settings; models are loaded with the first picture.

        Args:
            languages: what the text is in, by RapidOCR's names; those the wheel's models cannot
                read need `models`.
            models: a folder with `rec.onnx` (its alphabet inside, or in `keys.txt` beside it)
                and perhaps `det.onnx`.
            threads: threads of the processor for one picture.
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
        from importlib.metadata import version

        models = [f"{p.name}-{p.stat().st_size}" for p in self._models.values()]
        return "-".join(["rapidocr", version("rapidocr"), *models, *self._languages])

    def read(self, image: Image.Image, *, deadline: float | None = None) -> Page:
        """Every line of the picture, or of those tiles that are read in time."""
        image = image.convert("RGB")
        if min(image.size) < THINNEST:
            size = f"{image.width}x{image.height}"
            return Page(lines=(), notes=(f"{size} pixels are too thin for letters",))
        page = self._read_upright(image, deadline=deadline)
        turn = self._turn(image, page.lines)
        if turn:
            turned = image.rotate(-turn, expand=True)
            page = self._read_upright(turned, deadline=deadline)
            lines = tuple(_turned_back(line, turn, image.size) for line in page.lines)
            notes = (f"turned by {turn} degrees", *page.notes)
            return replace(page, lines=lines, notes=notes, upright=page.lines)
        return replace(page, upright=page.lines)

    def _read_upright(self, image: Image.Image, *, deadline: float | None) -> Page:
        if len(_tiles(image.size, 1.0)) > 1:
            return self._tiled(image, deadline=deadline)
        if min(image.size) < SMALL_SIDE:
            return self._small(image)
        lines = self._lines(image)
        heights = sorted(_height(line) for line in lines)
        if heights and heights[len(heights) // 2] < SMALL_LETTERS and max(image.size) * 2 <= TILE:
            larger = self._enlarged(image, 2)
            if _letters(larger.lines) >= _letters(lines):
                return larger
        return Page(lines=tuple(lines))

    def _small(self, image: Image.Image) -> Page:
        """A cut-out word or a thumbnail: the surest of what it says as it is, enlarged, or
        taken for a single word, since a word that fills its picture is no region to a detector.
        """
        factor = max(2, min(MAX_FACTOR, math.ceil(SMALL_SIDE / min(image.size))))
        pages = [Page(lines=tuple(self._lines(image))), self._enlarged(image, factor)]
        if image.width >= 0.8 * image.height:
            pages.insert(0, Page(lines=tuple(self._words_alone(image))))
        return max(pages, key=lambda page: _letters(page.lines))

    def _enlarged(self, image: Image.Image, factor: int) -> Page:
        size = (image.width * factor, image.height * factor)
        # text that touches the edge is not found
        larger = Image.new("RGB", (size[0] + 2 * MARGIN, size[1] + 2 * MARGIN), (255, 255, 255))
        larger.paste(image.resize(size, Image.Resampling.BICUBIC), (MARGIN, MARGIN))
        lines = self._lines(larger)
        moved = tuple(_moved(line, dx=-MARGIN, dy=-MARGIN, scale=1 / factor) for line in lines)
        return Page(lines=moved, notes=(f"enlarged {factor} times",))

    def _tiled(self, image: Image.Image, *, deadline: float | None) -> Page:
        notes: list[str] = []
        scale = 1.0
        while len(_tiles(image.size, scale)) > MAX_TILES:
            scale *= 0.9
        original = image.size
        if scale < 1.0:
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.LANCZOS)
            notes.append(
                f"{original[0]}x{original[1]} pixels were reduced to {size[0]}x{size[1]}: "
                "small letters may be lost"
            )
        tiles = _tiles(image.size, 1.0)
        lines: list[Line] = []
        complete = True
        for done, (left, top, right, bottom) in enumerate(tiles):
            if deadline is not None and time.perf_counter() >= deadline:
                notes.append(f"time for {done} of {len(tiles)} tiles only")
                complete = False
                break
            tile = image.crop((left, top, right, bottom))
            if not _is_blank(tile):
                # a strip's tiles are as thin as it is
                thin = min(tile.size) < SMALL_SIDE
                read = self._small(tile).lines if thin else self._lines(tile)
                lines = _merged(lines, [_moved(line, dx=left, dy=top) for line in read])
        notes.insert(0, f"{original[0]}x{original[1]} pixels were read in {len(tiles)} tiles")
        back = 1 / scale
        moved = tuple(_moved(line, scale=back) for line in lines)
        return Page(lines=moved, notes=tuple(notes), complete=complete)

    def _turn(self, image: Image.Image, lines: Sequence[Line]) -> int:
        """Degrees, clockwise, that make the picture upright: 0, 90, 180 or 270."""
        long = [line for line in lines if len(line.text) >= 3]
        if not long:
            return 0
        tall = [line for line in long if _extent(line)[1] > 1.5 * _extent(line)[0]]
        sideways = len(tall) > len(long) / 2
        voters = sorted(tall if sideways else long, key=lambda p: -max(_extent(p)))[:7]
        crops = []
        for line in voters:
            left, top, right, bottom = line.box
            crop = image.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))
            crops.append(crop.rotate(-90, expand=True) if sideways else crop)
        flipped = sum(self._is_upside_down(crop) for crop in crops)
        upside_down = flipped > len(crops) / 2
        if sideways:
            return 270 if upside_down else 90
        return 180 if upside_down else 0

    def _is_upside_down(self, crop: Image.Image) -> bool:
        if min(crop.size) < 2:
            return False
        with self._lock:
            result = self._loaded()(_bgr(crop), use_det=False, use_cls=True, use_rec=False)
        label, score = result.cls_res[0]
        return label == "180" and float(score) > 0.8

    def _lines(self, image: Image.Image) -> list[Line]:
        with self._lock:
            # all three stages are named, for the engine remembers them from call to call
            result = self._loaded()(
                _bgr(image), use_det=True, use_cls=True, use_rec=True, text_score=0.0
            )
        if result.txts is None or result.boxes is None:
            return []
        return [
            Line(text=str(text), confidence=float(score), quad=_quad(box))
            for box, text, score in zip(result.boxes, result.txts, result.scores, strict=True)
            if str(text).strip()
        ]

    def _words_alone(self, image: Image.Image) -> list[Line]:
        """The whole picture as one line."""
        with self._lock:
            result = self._loaded()(_bgr(image), use_det=False, use_cls=False, use_rec=True)
        if result.txts is None:
            return []
        width, height = image.size
        quad = (
            (0.0, 0.0),
            (float(width), 0.0),
            (float(width), float(height)),
            (0.0, float(height)),
        )
        return [
            Line(text=str(text), confidence=float(score), quad=quad)
            for text, score in zip(result.txts, result.scores, strict=True)
            if str(text).strip()
        ]

    def _loaded(self) -> Any:
        if self._engine is None:
            engine = import_rapidocr()
            params: dict[str, Any] = {
                "Global.log_level": "critical",
                # smaller pictures than this are ours to enlarge, larger ones ours to cut
                "Global.max_side_len": 2000,
                "EngineConfig.onnxruntime.intra_op_num_threads": self._threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
            for key, path in self._models.items():
                params[key] = str(path)
            _quieten()
            self._engine = engine(params=params)
        return self._engine


def import_rapidocr() -> Any:
    """RapidOCR's class, or a message that says how to get it."""
    try:
        _quieten()
        from rapidocr import RapidOCR
    except ImportError as error:
        package = error.name or "rapidocr"
        raise MissingDependencyError(
            package, extra="ocr", purpose="reading text in pictures"
        ) from error
    return RapidOCR


def _quieten() -> None:
    """RapidOCR logs which models it loads; that is nobody's concern here.

    Its own logger alone: sys.stdout belongs to the threads that print an answer meanwhile.
    """
    logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)


def _model_files(models: str | None) -> dict[str, Path]:
    if models is None:
        return {}
    folder = Path(models).expanduser()
    names = {
        "Rec.model_path": "rec.onnx",
        "Rec.rec_keys_path": "keys.txt",
        "Det.model_path": "det.onnx",
    }
    files = {key: folder / name for key, name in names.items() if (folder / name).is_file()}
    if "Rec.model_path" not in files:
        raise ExpertError(f"expert 'ocr': models folder {models!r} holds no rec.onnx")
    return files


def _bgr(image: Image.Image) -> Any:
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def _quad(box: Any) -> Quad:
    return tuple((float(x), float(y)) for x, y in box)


def _extent(line: Line) -> tuple[float, float]:
    left, top, right, bottom = line.box
    return right - left, bottom - top


def _height(line: Line) -> float:
    return min(_extent(line))


def _letters(lines: Sequence[Line]) -> float:
    """How much was read, unsure letters counting much less."""
    return sum(len(line.text) * line.confidence**2 for line in lines)


def _moved(line: Line, *, dx: float = 0.0, dy: float = 0.0, scale: float = 1.0) -> Line:
    return replace(line, quad=tuple(((x + dx) * scale, (y + dy) * scale) for x, y in line.quad))


def _turned_back(line: Line, turn: int, size: tuple[int, int]) -> Line:
    """A line of the turned picture in the pixels of the picture of that size."""
    width, height = size
    undo = {
        90: lambda x, y: (y, height - x),
        180: lambda x, y: (width - x, height - y),
        270: lambda x, y: (width - y, x),
    }[turn]
    return replace(line, quad=tuple(undo(x, y) for x, y in line.quad))


def _tiles(size: tuple[int, int], scale: float) -> list[tuple[int, int, int, int]]:
    """Overlapping tiles that cover a picture of that size, reduced by a scale."""
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


def _is_blank(tile: Image.Image) -> bool:
    return float(np.asarray(tile.convert("L").reduce(4)).std()) < 2.0


def _merged(lines: Sequence[Line], more: Sequence[Line]) -> list[Line]:
    """Both tiles' lines, of two that lie over each other the longer one."""
    kept = list(lines)
    for line in more:
        rivals = [other for other in kept if _overlap(line, other) > 0.5]
        if any(_width(other) >= _width(line) for other in rivals):
            continue
        kept = [other for other in kept if other not in rivals]
        kept.append(line)
    return kept


def _width(line: Line) -> float:
    return max(_extent(line))


def _overlap(one: Line, other: Line) -> float:
    """Share of the smaller box that the two have in common."""
    a, b = one.box, other.box
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min(math.prod(_extent(one)), math.prod(_extent(other)))
    return width * height / smaller if smaller > 0 else 0.0
