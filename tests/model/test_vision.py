"""CLIP and SigLIP towers, any feature layer, three projectors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel

from llama_adapter import ConfigError, UnsupportedModelError
from llama_adapter.model.projection import PROJECTORS


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_every_projector_on_every_tower(build, ids, pictures, projector, tower):
    model = build(projector=projector, vision=tower).train()
    model(ids, pixel_values=pictures, labels=ids).loss.backward()
    assert model.encode_visual(pictures).prompts_IMd.shape == (3, 6, 64)
    assert all(p.grad.abs().sum() > 0 for p in model.group_parameters("vision"))
    assert not model.vision.training


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_any_feature_layer(build, pictures, tower):
    states = None
    for layer in (0, 1, -2, -1):
        model = build(vision=tower, vision_feature=layer)
        if states is None:
            output = model.vision(pixel_values=pictures, output_hidden_states=True)
            states = output.hidden_states
            last = output.last_hidden_state
        expected = last if layer == -1 else states[layer]
        ours = model.encode_visual(pictures).prompts_IMd
        theirs = model.encode_visual(visual_features=expected).prompts_IMd
        assert_close(ours, theirs, rtol=0, atol=0)


def test_projected_features_are_every_token_after_clips_projection(build, pictures):
    model = build(vision="clip", vision_feature="projected")
    tower = model.vision
    # CLIP itself projects the first token: ours must hold it as its first
    expected = tower(pixel_values=pictures).image_embeds
    hidden = tower(pixel_values=pictures).last_hidden_state
    inner = getattr(tower, "vision_model", tower)
    features = tower.visual_projection(inner.post_layernorm(hidden))
    assert features.shape == (3, 5, 24)
    assert_close(features[:, 0], expected)
    assert_close(
        model.encode_visual(pictures).prompts_IMd,
        model.encode_visual(visual_features=features).prompts_IMd,
        rtol=0,
        atol=0,
    )


def test_a_layer_or_projection_that_is_not_there(build, pictures):
    with pytest.raises(ConfigError, match="layer 7, but the vision encoder has 3 hidden states"):
        build(vision_feature=7).encode_visual(pictures)
    with pytest.raises(ConfigError, match="needs a CLIP encoder with its projection"):
        build(vision="siglip", vision_feature="projected")


def test_the_visual_half_of_a_clip_model(build, base, ids, pictures):
    from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration

    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    clip = CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": 20},
            vision_config={**small, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    )
    model = LlamaAdapterForConditionalGeneration.from_base(
        base(), clip, LlamaAdapterConfig.preset("v2", projector="linear"), seed=0
    )
    assert model.generate(input_ids=ids, pixel_values=pictures, max_new_tokens=2).shape == (3, 9)


def test_a_text_model_is_no_tower(build, base):
    from llama_adapter import LlamaAdapterForConditionalGeneration

    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is not a vision model"):
        LlamaAdapterForConditionalGeneration.from_base(base(), base())


def test_without_a_tower_the_adapter_is_text_only(build, ids):
    from llama_adapter import LlamaAdapterForConditionalGeneration

    model = LlamaAdapterForConditionalGeneration.from_base(
        build("v2-chat").language_model.__class__(build("v2-chat").language_model.config)
    )
    assert model.adapter_config.fusion == "none"
    assert model.group_parameters("vision") == []
    assert torch.isfinite(model(ids).logits).all()
