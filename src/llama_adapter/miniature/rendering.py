"""Images of scenes: anti-aliased, noisy, over varied backgrounds.

All lengths are in units of 1/64 of the image's side, so the same scene and the same
seed give the same image at every size, only finer: the words on a sign are for the
OCR expert, which is shown a large image; the vision encoder sees 64 pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llama_adapter.miniature.scenes import HELD_OUT, Scene, SceneObject

Point: TypeAlias = tuple[float, float]
Color: TypeAlias = tuple[int, int, int]

UNITS = 64
"""Units along one side of an image."""

PALETTE = {
    "red": (215, 35, 40),
    "green": (40, 175, 65),
    "blue": (55, 90, 235),
    "yellow": (240, 222, 55),
    "purple": (145, 50, 195),
    "orange": (245, 138, 30),
    "white": (242, 242, 242),
    "pink": (250, 150, 198),
}
"""The middle of each color; an object's own color strays from it by COLOR_JITTER."""

RADIUS = {"small": 4.5, "large": 7.8}
COLOR_JITTER = 14
NOISE = 6
PLATE_HEIGHT = 10.0
"""The lowest units, kept free of objects for the sign."""

_SUPERSAMPLING = 4


def center_of(one: SceneObject) -> Point:
    """Where an object is before jitter, in units from the top left corner."""
    cell_height = (UNITS - PLATE_HEIGHT) / 3
    return (one.column + 0.5) * UNITS / 3, (one.row + 0.5) * cell_height


def render(
    scene: Scene,
    rng: random.Random,
    *,
    size: int = 64,
    palette: Mapping[str, Color] = PALETTE,
) -> Image.Image:
    """Draw the scene as a square RGB image of `size` pixels a side.

    The same scene and state of `rng` give the same image, byte for byte; another
    `size` gives the same image at another resolution.
    """
    image = _background(rng, size)
    for one in scene.objects:
        _draw_object(image, one, palette[one.color], rng)
    if scene.sign is not None:
        _draw_sign(image, scene.sign, rng)
    return _with_noise(image, rng)


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneImage:
    """The image of a scene, drawn when called; the same one for the same seed and index."""

    scene: Scene
    seed: int
    index: int
    size: int = 64
    unnamed_colors: bool = False
    """Draw the objects in colors without a name, in which only the outline tells the shape."""

    def __call__(self) -> Image.Image:
        rng = random.Random(f"picture/{self.seed}/{self.index}")
        palette = unnamed_palette(self.scene, rng) if self.unnamed_colors else PALETTE
        return render(self.scene, rng, size=self.size, palette=palette)


def unnamed_palette(scene: Scene, rng: random.Random) -> dict[str, Color]:
    """For each object a color without a name, in which only the outline tells the shape.

    Bright enough to be seen, and the same colors for every shape, far from all that are held
    out with any: were greenish squares drawn but no greenish circles, an image's green would
    again speak against a circle.
    """
    return {one.color: _unnamed_color(rng) for one in scene.objects}


def _unnamed_color(rng: random.Random) -> Color:
    barred = {PALETTE[color] for _, color in HELD_OUT}
    while True:
        color = (rng.randint(30, 255), rng.randint(30, 255), rng.randint(30, 255))
        if max(color) >= 150 and all(math.dist(color, other) >= 95 for other in barred):
            return color


def _background(rng: random.Random, size: int) -> Image.Image:
    """A plain, graded, blotchy, striped or checkered ground, darker than every color.

    All of them are a small lattice of colors, enlarged smoothly or sharply.
    """
    base = [rng.uniform(12, 80) + rng.uniform(-10, 10) for _ in range(3)]
    brightness = sum(base) / 3
    # Keep tints faint: a saturated ground would pass for a dark object.
    base = [brightness + 0.4 * (channel - brightness) for channel in base]
    kind = rng.choice(("plain", "gradient", "blotches", "stripes", "checks"))
    columns, rows = {
        "plain": (1, 1),
        "gradient": (2, 2),
        "blotches": (8, 8),
        "stripes": rng.choice(((16, 1), (1, 16))),
        "checks": (8, 8),
    }[kind]
    contrast = rng.uniform(6, 22)
    lattice = Image.new("RGB", (columns, rows))
    for row in range(rows):
        for column in range(columns):
            if kind in ("stripes", "checks"):
                offset = contrast / 2 * (-1 if (row + column) % 2 else 1)
            else:
                offset = rng.uniform(-contrast, contrast)
            lattice.putpixel((column, row), _clip(channel + offset for channel in base))
    smooth = kind in ("gradient", "blotches")
    return lattice.resize(
        (size, size), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    )


def _draw_object(image: Image.Image, one: SceneObject, middle: Color, rng: random.Random) -> None:
    x, y = center_of(one)
    x, y = x + rng.uniform(-2.0, 2.0), y + rng.uniform(-0.8, 0.8)
    radius = RADIUS[one.size] + rng.uniform(-0.4, 0.4)
    color = _clip(c + rng.randint(-COLOR_JITTER, COLOR_JITTER) for c in middle)
    outline = [(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[one.shape]]
    _fill(image, outline, color)


def _draw_sign(image: Image.Image, text: str, rng: random.Random) -> None:
    """A white plate with black text, in the middle of the lower edge."""
    pixels_per_unit = image.width / UNITS
    font = _font(round(8.5 * pixels_per_unit))
    half_width = font.getlength(text) / pixels_per_unit / 2 + 2.5
    x, y = UNITS / 2 + rng.uniform(-4.0, 4.0), UNITS - PLATE_HEIGHT / 2
    shade = rng.randint(240, 252)
    top, bottom = y - PLATE_HEIGHT / 2 + 0.5, y + PLATE_HEIGHT / 2 - 0.5
    corners = [
        (x - half_width, top),
        (x + half_width, top),
        (x + half_width, bottom),
        (x - half_width, bottom),
    ]
    _fill(image, corners, (shade, shade, shade))
    ImageDraw.Draw(image).text(
        (x * pixels_per_unit, y * pixels_per_unit), text, fill=(8, 8, 8), font=font, anchor="mm"
    )


def _fill(image: Image.Image, outline: list[Point], color: Color) -> None:
    """Fill a polygon, given in units, with smooth edges.

    Only the polygon's surroundings are drawn larger and reduced; that is what makes
    rendering fast.
    """
    pixels_per_unit = image.width / UNITS
    xs = [x * pixels_per_unit for x, _ in outline]
    ys = [y * pixels_per_unit for _, y in outline]
    left, top = math.floor(min(xs)), math.floor(min(ys))
    width, height = math.ceil(max(xs)) - left + 1, math.ceil(max(ys)) - top + 1
    factor = _SUPERSAMPLING
    mask = Image.new("L", (width * factor, height * factor))
    # A pixel's middle, not its corner, is on the integer grid of ImageDraw.
    points = [
        ((x - left) * factor - 0.5, (y - top) * factor - 0.5) for x, y in zip(xs, ys, strict=True)
    ]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    image.paste(color, (left, top), mask.reduce(factor))


def _with_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(64))
    pixels_HWC = np.asarray(image).astype(np.int16)
    pixels_HWC += noise.integers(-NOISE, NOISE + 1, pixels_HWC.shape, dtype=np.int16)
    return Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))


def _clip(channels: Iterable[float]) -> Color:
    red, green, blue = (min(255, max(0, round(c))) for c in channels)
    return red, green, blue


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _circle() -> list[Point]:
    return [(math.cos(a * math.tau / 40), math.sin(a * math.tau / 40)) for a in range(40)]


def _square() -> list[Point]:
    return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]


def _triangle() -> list[Point]:
    return [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]


def _diamond() -> list[Point]:
    return [(0.0, -1.08), (0.74, 0.0), (0.0, 1.08), (-0.74, 0.0)]


def _cross() -> list[Point]:
    arm = 0.34
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points: list[Point] = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


def _star() -> list[Point]:
    points: list[Point] = []
    for corner in range(10):
        angle = corner * math.tau / 10 - math.tau / 4
        length = 0.45 if corner % 2 else 1.1
        points.append((length * math.cos(angle), length * math.sin(angle)))
    return points


_DRAWERS: dict[str, Callable[[], list[Point]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
}

OUTLINES = {shape: tuple(outline()) for shape, outline in _DRAWERS.items()}
"""Corners of each shape of radius 1 around the origin, y downwards."""
