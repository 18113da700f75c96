from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llama_adapter.errors import CheckpointError, ImageError
from llama_adapter.processing.image_processors import (
    image_processor_from,
    load_image_processor,
    pixel_values,
)


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, SiglipImageProcessorPil])
def test_a_models_own_image_processor_is_read(kind: Any, tmp_path: Path) -> None:
    made = kind(image_mean=[0.1, 0.2, 0.3])
    made.save_pretrained(tmp_path)
    read = load_image_processor(str(tmp_path))
    assert type(read) is kind
    assert list(read.image_mean) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"]
)
def test_every_name_that_releases_gave_it_is_understood(name: str, tmp_path: Path) -> None:
    content = {"image_processor_type": name, "size": {"shortest_edge": 9}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert type(load_image_processor(str(tmp_path))) is CLIPImageProcessorPil


def test_one_that_is_missing_or_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no image processor"):
        load_image_processor(str(tmp_path))
    content = json.dumps({"image_processor_type": "MagicImageProcessor"})
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="'MagicImageProcessor' is none that works"):
        load_image_processor(str(tmp_path))


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, SiglipImageProcessorPil])
@pytest.mark.parametrize("size", [(640, 480), (2000, 20), (20, 2000), (1, 1)])
def test_pixels_are_the_processors_own(kind: Any, size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 60).convert("RGB")
    processor = kind()
    expected = processor(images=[image, image], return_tensors="pt")["pixel_values"]
    found = pixel_values(processor, [image, image])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(32_768, 1), (1, 32_768), (32_768, 20)])
def test_a_thin_image_that_would_grow_beyond_the_limit_is_refused(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336})
    image = Image.new("RGB", size)
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"32768.* pixels is too thin: .* edge of 336 it has"):
        pixel_values(processor, [Image.new("RGB", (8, 8)), image])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_thin_image_that_is_not_enlarged_is_read() -> None:
    found = pixel_values(SiglipImageProcessorPil(), [Image.new("RGB", (32_768, 1))])
    assert found.shape == (1, 3, 224, 224)


def test_a_shorter_edge_has_a_bound_whatever_the_longer_one_may_be() -> None:
    size = {"shortest_edge": 10_000, "longest_edge": 10**9}
    with pytest.raises(CheckpointError, match="size cannot have shortest_edge 10000"):
        image_processor_from(
            {"image_processor_type": "CLIPImageProcessor", "size": size}, where="here"
        )
