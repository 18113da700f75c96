"""Impossible settings are refused where they are written, with name, found and expected."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llama_adapter import AdapterConfig, ConfigError
from llama_adapter.config import PRESETS, as_version_1, from_version_1


def test_frozen_and_keyword_only():
    config = AdapterConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.prompt_length = 3
    with pytest.raises(TypeError):
        AdapterConfig(10)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    config = AdapterConfig.preset(name)
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_papers_setting_on_thirty_two_layers():
    config = AdapterConfig.preset("v2")
    assert (config.prompt_length, config.visual_prompt_length) == (10, 20)
    assert config.visual_layer_indices() == range(1)
    assert config.prompt_layer_indices(32) == range(1, 32)
    assert AdapterConfig.preset("released-v1").prompt_layer_indices(32) == range(2, 32)
    assert AdapterConfig.preset("v2-chat").prompt_layer_indices(32) == range(32)
    assert AdapterConfig.preset("released-v2-chat").prompt_layer_indices(32) == range(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_length": -1}, "prompt_length must be an integer of at least 0, got -1"),
        ({"prompt_length": True}, "prompt_length must be an integer of at least 0, got True"),
        ({"prompt_length": 2.0}, "prompt_length must be an integer of at least 0, got 2.0"),
        ({"prompt_layers": -2}, "prompt_layers must be an integer of at least 0, got -2"),
        ({"visual_layers": 0}, "visual_layers must be an integer of at least 1, got 0"),
        ({"fusion": "erly"}, "fusion must be one of 'early', .* 'erly'; did you mean 'early'"),
        ({"gate": 3}, "gate must be one of 'tanh', 'raw', got 3"),
        ({"train_norms": "yes"}, "train_norms must be true or false, got 'yes'"),
        ({"bias_targets": 3}, "bias_targets must be 'all', 'none' or names of linears, got 3"),
        ({"scale_targets": ()}, r"scale_targets must be 'all', 'none' or names .* got \(\)"),
        ({"vision_feature": "pooled"}, "must be a layer index or 'projected', got 'pooled'"),
        ({"vision_feature": False}, "must be a layer index or 'projected', got False"),
        ({"projector_width": 10}, "projector_width 10 is not a multiple of projector_heads 8"),
        ({"projector_mlp_ratio": 0}, "projector_mlp_ratio must be a number above 0 .* got 0"),
        ({"projector_mlp_ratio": 1e9}, "at most 64, got 1000000000.0"),
        ({"projector_mlp_ratio": float("nan")}, "projector_mlp_ratio must be .* got nan"),
        ({"projector_mlp_ratio": "4"}, "projector_mlp_ratio must be .* got '4'"),
        ({"projector_mlp_ratio": True}, "projector_mlp_ratio must be .* got True"),
        ({"fusion": "late"}, "visual_prompt_length must be 1 or 10, got 20"),
        ({"fusion": "late", "prompt_length": 0}, "adds to static prompts, but prompt_length is 0"),
    ],
)
def test_impossible_values(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**settings)


def test_unknown_names_come_with_a_suggestion():
    with pytest.raises(
        ConfigError, match=r"unknown preset 'v2chat'; did you mean 'v2-chat'.*known"
    ):
        AdapterConfig.preset("v2chat")
    with pytest.raises(ConfigError, match="'prompt_lenght'; did you mean 'prompt_length'"):
        AdapterConfig.preset("v1", prompt_lenght=3)
    with pytest.raises(ConfigError, match=r"unknown adapter setting 'zebra'$"):
        AdapterConfig.from_dict({"zebra": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual_layers": 5}, "visual_layers is 5, but the base has 4 layers"),
        (
            {"visual_layers": 2, "prompt_layers": 3},
            "visual_layers 2 . prompt_layers 3 exceed the base's 4 layers; .* not overlap",
        ),
        ({"fusion": "none", "prompt_layers": 5}, "prompt_layers is 5, but the base has 4 layers"),
    ],
)
def test_too_many_layers_for_the_base(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**settings).prompt_layer_indices(4)


def test_names_of_version_1() -> None:
    before = {"slot_reads": "own", "visual_scope": "slots", "gate": "raw"}
    now = {"placeholder_attention": "own", "visual_scope": "placeholders", "gate": "raw"}
    assert from_version_1(before) == now
    assert from_version_1(now) == now
    assert as_version_1(now) == before
    with pytest.raises(ConfigError, match="'slot_reads' is called 'placeholder_attention' now"):
        AdapterConfig.from_dict(before)
