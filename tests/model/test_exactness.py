"""A fresh adapter changes nothing, a switched-off one is not there, a prepared one agrees."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from llama_adapter import ConfigError, TrainingError
from llama_adapter.families.structure import CACHE

SETTINGS = [
    ("v2", {}),
    ("v2", {"visual_layers": 2, "visual_scope": "placeholders"}),
    ("v2", {"visual_layers": 2, "visual_scope": "placeholders", "placeholder_attention": "own"}),
    ("v2", {"lora_rank": 3, "gate_scale": True}),
    ("v1", {}),
    ("v1-multimodal", {}),
    ("v2-chat", {}),
    ("released-v2-bias", {"prompt_layers": 3, "visual_prompt_length": 5, "projector_blocks": 1}),
    ("released-v2-chat", {"prompt_length": 0}),
]


def _inputs(model, ids, pictures):
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.adapter_config.is_multimodal:
        inputs["pixel_values"] = pictures
        if model.adapter_config.visual_scope == "placeholders":
            inputs["visual_mask"] = torch.zeros_like(ids, dtype=torch.bool)
            inputs["visual_mask"][:, 1:4] = True
    return inputs


def _vision(overrides, preset):
    return "clip" if preset.startswith("released") else "siglip"


@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
def test_a_fresh_adapter_changes_nothing(build, base, ids, pictures, preset, overrides):
    plain = base()
    expected = plain(ids, use_cache=True)
    expected_tokens = plain.generate(ids, max_new_tokens=5, do_sample=False)

    model = build(preset, vision=_vision(overrides, preset), stirred=False, **overrides)
    inputs = _inputs(model, ids, pictures)
    output = model(**inputs, use_cache=True)

    assert_close(output.logits, expected.logits, rtol=0, atol=0)
    for ours, theirs in zip(output[CACHE].layers, expected[CACHE].layers, strict=True):
        assert_close(ours.keys, theirs.keys, rtol=0, atol=0)
        assert_close(ours.values, theirs.values, rtol=0, atol=0)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert_close(tokens, expected_tokens)


@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
def test_prepared_agrees_and_is_undone(build, ids, pictures, preset, overrides):
    model = build(preset, vision=_vision(overrides, preset), **overrides)
    inputs = _inputs(model, ids, pictures)
    with torch.no_grad():
        learned = model(**inputs).logits
        model.prepare_for_inference()
        prepared = model(**inputs).logits
        assert_close(prepared, learned, rtol=1e-5, atol=1e-5)
        assert model.adapter.is_prepared
        model.prepare_for_training()
        assert_close(model(**inputs).logits, learned, rtol=0, atol=0)
    assert not model.adapter.is_prepared


@pytest.mark.parametrize("preset", ["v2", "v1-multimodal"])
def test_disabled_is_the_base_exactly(build, base, ids, pictures, preset):
    expected = base()(ids).logits
    model = build(preset)
    adapted = model(ids, pixel_values=pictures).logits
    assert (adapted - expected).abs().max() > 1e-3

    with model.adapters_disabled():
        assert_close(model(ids, pixel_values=pictures).logits, expected, rtol=0, atol=0)
        assert_close(
            model.generate(input_ids=ids, pixel_values=pictures, max_new_tokens=4),
            base().generate(ids, max_new_tokens=4),
        )
    assert_close(model(ids, pixel_values=pictures).logits, adapted, rtol=0, atol=0)

    model.prepare_for_inference()
    model.disable_adapters()
    assert_close(model(ids, pixel_values=pictures).logits, expected, rtol=0, atol=0)
    model.enable_adapters()
    assert_close(model(ids, pixel_values=pictures).logits, adapted, rtol=1e-5, atol=1e-5)


def test_disabled_and_prepared_gives_the_adapter_back(build, ids, pictures):
    model = build()
    adapted = model(ids, pixel_values=pictures).logits
    model.disable_adapters()
    model.prepare_for_inference()
    model.enable_adapters()
    assert_close(model(ids, pixel_values=pictures).logits, adapted, rtol=1e-5, atol=1e-5)


def test_a_prepared_model_refuses_to_train(build):
    model = build()
    model.prepare_for_inference()
    with pytest.raises(TrainingError, match="prepare_for_training"):
        model.train()
    model.prepare_for_training()
    assert model.train().training


def test_a_base_carries_one_set_of_adapters(build):
    model = build()
    with pytest.raises(ConfigError, match="carries an adapter already"):
        build(language_model=model.language_model)


def test_moving_reaches_what_is_merged_or_off(build, ids, pictures):
    model = build()
    model.prepare_for_inference()
    model.double()
    model.prepare_for_training()
    with torch.no_grad():
        assert model(ids, pixel_values=pictures.double()).logits.dtype == torch.float64
    assert {p.dtype for p in model.group_parameters("language")} == {torch.float64}


@pytest.mark.parametrize("preset", ["v2", "v2-chat", "v1"])
def test_a_bfloat16_base_keeps_float32_adapters(build, base, ids, pictures, preset):
    plain = base().to(torch.bfloat16)
    expected = plain(ids).logits
    model = build(preset, language_model=plain, stirred=False)
    inputs = _inputs(model, ids, pictures)
    output = model(**inputs, labels=ids)
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.logits, expected, rtol=0, atol=0)
    output.loss.backward()
    for group in ("vision", "language"):
        for parameter in model.group_parameters(group):
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None
    model.prepare_for_inference()
    assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
