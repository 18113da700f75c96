"""Images: the same for the same seed, true to the scene, legible where they should be."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from llama_adapter.miniature.rendering import (
    COLOR_JITTER,
    PALETTE,
    PLATE_HEIGHT,
    UNITS,
    center_of,
    render,
    unnamed_palette,
)
from llama_adapter.miniature.scenes import (
    COLORS,
    HELD_OUT,
    PLACES,
    SHAPES,
    Scene,
    SceneObject,
    Split,
    scene_stream,
)


def one_object(**changes: str) -> Scene:
    attributes = {"shape": "square", "color": "red", "size": "large", "place": "center"}
    return Scene(objects=(SceneObject(**{**attributes, **changes}),))


def color_at(scene: Scene, *, seed: int = 0) -> np.ndarray:
    """The mean color around the first thing's middle, 4 by 4 pixels."""
    x, y = (round(c) for c in center_of(scene.objects[0]))
    pixels = np.asarray(render(scene, random.Random(seed))).astype(float)
    return pixels[y - 2 : y + 2, x - 2 : x + 2].mean((0, 1))


def test_same_seed_same_image() -> None:
    scene = next(scene_stream(3, split=Split.TRAIN, sign_probability=1.0))
    first, again, other = (render(scene, random.Random(seed)) for seed in (7, 7, 8))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_size_changes_resolution_only() -> None:
    scene = next(scene_stream(3, split=Split.TRAIN, sign_probability=0.0))
    small = np.asarray(render(scene, random.Random(7))).astype(float)
    large = render(scene, random.Random(7), size=256)
    assert large.size == (256, 256)
    reduced = np.asarray(large.reduce(4)).astype(float)
    # Only noise and edges differ.
    assert np.median(np.abs(reduced - small)) < 6


def test_colors_are_far_apart_and_drawn_as_named() -> None:
    for one, other in itertools.combinations(COLORS, 2):
        assert math.dist(PALETTE[one], PALETTE[other]) > 3 * COLOR_JITTER
    for color in COLORS:
        seen = color_at(one_object(color=color))
        assert min(COLORS, key=lambda name: math.dist(PALETTE[name], seen)) == color


@pytest.mark.parametrize("place", PLACES)
def test_thing_stands_in_its_cell(place: str) -> None:
    seen = color_at(one_object(place=place, color="yellow", shape="circle"))
    assert math.dist(seen, PALETTE["yellow"]) < 3 * COLOR_JITTER


def test_background_is_darker_than_every_color() -> None:
    for seed in range(60):
        empty = np.asarray(render(Scene(objects=()), random.Random(seed)))
        assert empty.mean() < 110
        assert empty.max() < min(max(color) for color in PALETTE.values())


def test_shapes_and_sizes_cover_different_areas() -> None:
    def area(shape: str, size: str) -> int:
        scene = one_object(shape=shape, size=size, color="white")
        return int((np.asarray(render(scene, random.Random(0))).min(-1) > 150).sum())

    assert all(area(shape, "large") > 1.8 * area(shape, "small") for shape in SHAPES)
    images = {render(one_object(shape=s), random.Random(0)).tobytes() for s in SHAPES}
    assert len(images) == len(SHAPES)


@pytest.mark.parametrize("size", [64, 384])
def test_sign_is_a_white_plate_with_dark_text_below_the_grid(size: int) -> None:
    one = one_object(place="south").objects[0]
    plain, signed, other = (
        np.asarray(render(Scene(objects=(one,), sign=sign), random.Random(5), size=size))
        for sign in (None, "hotel", "48")
    )
    edge = round(size * (1 - PLATE_HEIGHT / UNITS))
    plate = signed[edge:].min(-1)
    assert (plate > 220).mean() > 0.15 > (plain[edge:].min(-1) > 220).mean()
    middle = plate[:, int(size * 0.42) : int(size * 0.58)]
    assert middle.min() < 120
    assert not np.array_equal(signed[edge:], other[edge:])


def test_another_palette_paints_the_named_colors_otherwise() -> None:
    image = render(one_object(), random.Random(0), palette={"red": (0, 255, 255)})
    x, y = (round(c) for c in center_of(one_object().objects[0]))
    assert math.dist(image.getpixel((x, y)), (0, 255, 255)) < 3 * COLOR_JITTER


def test_unnamed_colors_say_nothing_about_the_shape() -> None:
    """One distribution for all shapes, far from every color that is held out with any."""
    palettes = {
        shape: [unnamed_palette(one_object(shape=shape), random.Random(i)) for i in range(50)]
        for shape in SHAPES
    }
    assert all(palette == palettes["circle"] for palette in palettes.values())
    barred = [PALETTE[color] for _, color in HELD_OUT]
    for palette in palettes["circle"]:
        assert min(math.dist(palette["red"], color) for color in barred) > COLOR_JITTER * 3**0.5
