"""Seven vision encoders as they are read, and what is refused by name; the sweep runs them all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from benchmarks.family_sweep import randomize
from benchmarks.family_vision import check_vision_type
from benchmarks.tiny_models import tiny_base, tiny_vision, tiny_vision_encoder
from torch.testing import assert_close

from llama_adapter import (
    ConfigError,
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    UnsupportedModelError,
)
from llama_adapter.config import AdapterConfig
from llama_adapter.families.vision import (
    pixel_size,
    vision_encoder_of,
    vision_feature_size,
    vision_features,
)

READ = {
    "clip_vision_model": (50, 49, 1, 64, 5),
    "siglip_vision_model": (196, 196, 0, 64, 5),
    "siglip2_vision_model": (16, 16, 0, 64, 5),
    "dinov2_with_registers": (201, 196, 1, 64, 5),
    "dinov3_vit": (201, 196, 1, 64, 5),
    "dinov3_convnext": (5, 4, 1, 64, 5),
    "vit": (197, 196, 1, 64, 5),
}
"""Tokens of an image, patches, class tokens, width, hidden states."""


@pytest.mark.parametrize("model_type", READ)
def test_what_is_read_of_an_encoder(model_type):
    row = check_vision_type(model_type)
    assert row["status"] == "accepted", row["reason"]
    found = tuple(row[name] for name in ("tokens", "patches", "class", "width", "layers"))
    assert found == READ[model_type]
    assert row["sizes"], "images of another size are interpolated"


def test_patches_and_class_token_are_those_of_the_encoder():
    vision = tiny_vision("dinov2_with_registers")
    images = torch.randn(2, 3, *pixel_size(vision))
    expected = vision(pixel_values=images).last_hidden_state
    read = {
        kind: vision_features(vision, images, AdapterConfig(vision_tokens=kind))
        for kind in ("all", "patches", "class")
    }
    assert_close(read["all"], expected, rtol=0, atol=0)
    assert_close(read["class"], expected[:, :1], rtol=0, atol=0)
    assert_close(read["patches"], expected[:, 5:], rtol=0, atol=0)
    frames = vision_features(vision, images[None], AdapterConfig(vision_tokens="class"))
    assert frames.shape == (1, 2, 1, 64)


def test_an_encoder_without_a_class_token():
    vision = tiny_vision_encoder()
    with pytest.raises(ConfigError, match="'class', but SiglipVisionModel has no class token"):
        vision_features(vision, torch.zeros(1, 3, 16, 16), AdapterConfig(vision_tokens="class"))


@pytest.mark.parametrize("model_type", ["dinov2_with_registers", "dinov3_convnext"])
def test_an_adapter_that_reads_patches_is_saved_and_loaded(tmp_path, model_type):
    base, vision = tiny_base("llama"), tiny_vision(model_type)
    vision.save_pretrained(tmp_path / "vision")
    config = LlamaAdapterConfig.preset("v2", vision_tokens="patches", projector="linear")
    model = LlamaAdapterForConditionalGeneration.from_base(
        base, str(tmp_path / "vision"), config, seed=0
    )
    randomize(model)
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    inputs["pixel_values"] = torch.randn(1, 3, *pixel_size(vision))
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    again = LlamaAdapterForConditionalGeneration.from_pretrained(
        tmp_path / "adapter", language_model=tiny_base("llama")
    )
    assert again.adapter_config.vision_tokens == "patches"
    assert_close(again(**inputs).logits, expected, rtol=0, atol=0)


class Encoder(torch.nn.Module):
    """As much of an encoder as is looked at, with an output of a given shape."""

    config = SimpleNamespace(image_size=8)
    dtype = torch.float32

    def __init__(self, config=None, *, shape=(4, 6)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.shape = shape

    def forward(self, pixel_values):
        states = pixel_values.new_ones(len(pixel_values), *self.shape)
        return SimpleNamespace(last_hidden_state=states)


@pytest.mark.parametrize("shape", [(6, 2, 2), (2, 2, 6), (4, 6)])
def test_feature_maps_are_tokens_whichever_dimension_comes_first(shape):
    assert vision_features(Encoder(shape=shape), torch.ones(2, 3, 8, 8), AdapterConfig()).shape == (
        2,
        4,
        6,
    )


def test_an_output_that_is_no_map_of_the_image():
    vision = Encoder(shape=(2, 3, 6))
    with pytest.raises(UnsupportedModelError, match=r"a feature map of the image's proportions"):
        vision_features(vision, torch.ones(2, 3, 8, 8), AdapterConfig())


def test_an_encoder_that_hides_patches_at_random():
    vision = tiny_vision("vit_mae")
    with pytest.raises(UnsupportedModelError, match=r"ViTMAEModel cannot .* draws random numbers"):
        vision_feature_size(vision, AdapterConfig())


def test_an_encoder_that_needs_more_than_pixels():
    class Videos(Encoder):
        def forward(self, pixel_values, grid_thw):
            return super().forward(pixel_values)

    with pytest.raises(UnsupportedModelError, match=r"Videos cannot .* it needs grid_thw with its"):
        vision_encoder_of(Videos())


def test_images_of_a_size_that_an_encoder_cannot_read():
    class Fixed(Encoder):
        def forward(self, pixel_values):
            if pixel_values.shape[-1] != 8:
                raise ValueError("Input image size doesn't match")
            return super().forward(pixel_values)

    with pytest.raises(UnsupportedModelError, match="an image of 16x16 pixels, expected 8x8"):
        vision_features(Fixed(), torch.ones(1, 3, 16, 16), AdapterConfig())
