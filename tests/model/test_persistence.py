"""Adapter directories: what is saved comes back bit by bit, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.building import LARGEST_BUILT, built_tensors
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText

from llama_adapter import (
    CheckpointError,
    ConfigError,
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
)

LAYER = "layers.1.attention.prompt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, request):
    """A stirred V2 adapter beside its base and tower, and the logits it gives."""
    conftest = _conftest(request)
    root = tmp_path_factory.mktemp("saved")
    conftest.make_base().save_pretrained(root / "base")
    conftest.make_vision_encoder().save_pretrained(root / "tower")
    config = LlamaAdapterConfig.preset(
        "v2", prompt_length=5, visual_prompt_length=6, projector_width=32, projector_heads=4
    )
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(root / "base"), str(root / "tower"), config, seed=0
    )
    conftest.stir_adapter(model)
    model.save_pretrained(root / "adapter")
    return root, model


def _conftest(request):
    for plugin in request.config.pluginmanager.get_plugins():
        if getattr(plugin, "__file__", "") and plugin.__file__.endswith("model/conftest.py"):
            return plugin
    raise AssertionError("no conftest")


@pytest.fixture
def copy(saved, tmp_path):
    """A directory that a test may damage."""
    shutil.copytree(saved[0] / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def _tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


def _write(directory, tensors):
    save_file(tensors, directory / "adapter_model.safetensors")


def _edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(directory):
    return LlamaAdapterForConditionalGeneration.from_pretrained(directory)


def test_round_trip_is_bit_equal(saved, ids, pictures, tmp_path):
    root, model = saved
    again = load(root / "adapter")
    ours, theirs = model.adapter.state_dict(), again.adapter.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        expected = model(ids, pixel_values=pictures).logits
        assert_close(again(ids, pixel_values=pictures).logits, expected, rtol=0, atol=0)
    assert not again.training
    again.prepare_for_inference()
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (root / "adapter" / name).read_bytes()


def test_the_directory_holds_what_was_trained_and_nothing_else(saved):
    root, model = saved
    names = set(_tensors(root / "adapter"))
    assert names == {name for name, _ in model.adapter.named_parameters()}
    assert {
        "layers.1.attention.prompt",
        "layers.1.attention.gate",
        "layers.0.attention.visual_gate",
        "layers.3.mlp.up_proj.scale",
        "layers.3.mlp.up_proj.bias",
        "norm.weight",
    } <= names
    assert any(name.startswith("visual.") for name in names)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_auto_classes_load_it(saved, ids, pictures, options):
    """Also where peft is installed, which looks for a file of the same name."""
    root, model = saved
    again = AutoModelForImageTextToText.from_pretrained(root / "adapter", **options)
    assert isinstance(again, LlamaAdapterForConditionalGeneration)
    with torch.no_grad():
        expected = model(ids, pixel_values=pictures).logits
        assert_close(again(ids, pixel_values=pictures).logits, expected, rtol=0, atol=0)
    config = AutoConfig.from_pretrained(root / "adapter")
    assert isinstance(config, LlamaAdapterConfig)
    assert config.adapter_config == model.adapter_config


def test_dtype_is_the_bases(saved, ids, pictures):
    again = AutoModelForImageTextToText.from_pretrained(
        saved[0] / "adapter", dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert again.dtype == torch.bfloat16
    assert {p.dtype for p in again.group_parameters("language")} == {torch.float32}
    assert again.language_model.config._attn_implementation.endswith("eager")
    assert again(ids, pixel_values=pictures).logits.dtype == torch.bfloat16


def test_references_may_be_relative(saved, tmp_path, ids):
    root, _ = saved
    shutil.copytree(root / "adapter", tmp_path / "moved")
    content = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    for what, name in (("base", "base"), ("vision", "tower")):
        shutil.copytree(root / name, tmp_path / "moved" / name)
        content[what]["name_or_path"] = name
    _edit_config(tmp_path / "moved", **content)
    assert load(tmp_path / "moved").language_model.name_or_path == str(tmp_path / "moved" / "base")


def test_a_missing_tensor_is_named(copy):
    tensors = _tensors(copy)
    del tensors[LAYER]
    _write(copy, tensors)
    with pytest.raises(CheckpointError, match=rf"lacks \['{LAYER}'\]"):
        load(copy)


def test_an_extra_tensor_is_named(copy):
    _write(copy, {**_tensors(copy), "layers.9.attention.gate": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"unexpected \['layers.9.attention.gate'\]"):
        load(copy)


def test_a_misshapen_tensor_is_named(copy):
    _write(copy, {**_tensors(copy), LAYER: torch.zeros(4, 64)})
    with pytest.raises(CheckpointError, match=rf"{LAYER} has shape \[4, 64\].*expects \[5, 64\]"):
        load(copy)


def test_a_tensor_of_no_numbers_is_named(copy):
    _write(copy, {**_tensors(copy), LAYER: torch.full((5, 64), float("nan"))})
    with pytest.raises(CheckpointError, match=rf"{LAYER} .*not finite"):
        load(copy)


def test_a_damaged_or_missing_file(copy):
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged"):
        load(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99, this package reads 1 to 2"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"model_type": "lora"}, "does not describe a llama_adapter model"),
        ({"adapter": {"prompt_lenght": 3}}, "prompt_lenght.*did you mean 'prompt_length'"),
        ({"adapter": {"prompt_length": -1}}, "prompt_length must be .* at least 0, got -1"),
        ({"adapter": 7}, "adapter must be an object"),
        ({"base": {"model_type": "gpt2"}}, "base lacks name_or_path, revision"),
    ],
)
def test_a_wrong_configuration(copy, changes, message):
    _edit_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_what_is_no_adapter_directory(copy, tmp_path):
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(copy)
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="unknown option 'colour'"):
        LlamaAdapterForConditionalGeneration.from_pretrained(copy, colour="red")


def test_another_base_is_refused(saved, base, tower):
    directory = saved[0] / "adapter"
    again = LlamaAdapterForConditionalGeneration.from_pretrained
    for wrong, message in (
        (base(num_hidden_layers=3), "num_hidden_layers 4, this base has 3"),
        (base(hidden_size=32), "hidden_size 64, this base has 32"),
        (base(seed=9), "another base of the same shape: its fingerprint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            again(directory, language_model=wrong)
        # a refused base stays usable
        assert_close(wrong(torch.ones(1, 2, dtype=torch.long)).logits.shape[-1], 97)
    with pytest.raises(CheckpointError, match="another vision encoder of the same shape"):
        again(directory, language_model=base(), vision=tower(seed=8))
    with pytest.raises(CheckpointError, match="vision encoder with model_type siglip_vision_model"):
        again(directory, language_model=base(), vision=tower("clip"))


def test_a_base_that_is_gone(copy):
    content = json.loads((copy / "adapter_config.json").read_text())
    content["base"]["name_or_path"] = str(copy / "gone")
    _edit_config(copy, **content)
    with pytest.raises(CheckpointError, match="cannot load the base"):
        load(copy)


def test_adapters_of_different_structure_share_a_base(saved, build, base, tmp_path, ids, pictures):
    root, v2 = saved
    other = build("v1-multimodal")
    other.save_pretrained(tmp_path / "v1")
    with torch.no_grad():
        expected = {
            "default": v2(ids, pixel_values=pictures).logits,
            "v1": other(ids, pixel_values=pictures).logits,
            "base": base()(ids).logits,
        }
        model = load(root / "adapter")
        model.load_adapter(tmp_path / "v1", "v1")
        assert model.adapters == ("default", "v1")
        assert model.active_adapter == "default"
        for name in ("default", "v1", "default"):
            model.set_adapter(name)
            assert_close(model(ids, pixel_values=pictures).logits, expected[name], rtol=0, atol=0)
        model.prepare_for_inference()
        model.set_adapter("v1")
        assert_close(model(ids, pixel_values=pictures).logits, expected["v1"], rtol=0, atol=0)
        with model.adapters_disabled():
            assert_close(model(ids).logits, expected["base"], rtol=0, atol=0)
        model.set_adapter("default")
        assert_close(
            model(ids, pixel_values=pictures).logits, expected["default"], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ConfigError, match="no adapter 'v3'; loaded: default, v1"):
        model.set_adapter("v3")
    with pytest.raises(ConfigError, match="'v1' is loaded already"):
        model.load_adapter(tmp_path / "v1", "v1")


def test_a_refused_adapter_leaves_the_model_as_it_was(saved, copy, ids, pictures):
    root, _ = saved
    model = load(root / "adapter")
    with torch.no_grad():
        expected = model(ids, pixel_values=pictures).logits
    tensors = _tensors(copy)
    del tensors[LAYER]
    _write(copy, tensors)
    with pytest.raises(CheckpointError, match="lacks"):
        model.load_adapter(copy, "broken")
    assert model.adapters == ("default",)
    with torch.no_grad():
        assert_close(model(ids, pixel_values=pictures).logits, expected, rtol=0, atol=0)


def test_a_visual_adapter_needs_a_tower(saved, build, ids):
    model = build("v2-chat", language_model=None)
    with pytest.raises(ConfigError, match="needs a vision encoder"):
        model.load_adapter(saved[0] / "adapter", "v2")
    assert torch.isfinite(model(ids).logits).all()


# --- what is loaded is what was saved -----------------------------------------------------------


def _config(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def _places(content):
    """Every key of the file, as a path."""
    for key, value in content.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


def test_a_missing_key_is_damage_and_no_default(saved, copy):
    whole = _config(copy)
    places = list(_places(whole))
    assert len(places) > 35
    for first, *rest in places:
        content = json.loads(json.dumps(whole))
        if rest:
            del content[first][rest[0]]
        else:
            del content[first]
        (copy / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError) as refused:
            load(copy)
        assert str(copy) in str(refused.value)


def test_directories_without_newer_settings_load(copy):
    """What version 0.1 wrote: neither the newer settings nor checksums."""
    content = _config(copy)
    del content["adapter"]["projector_mlp_ratio"]
    (copy / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="saved with other settings"):
        load(copy)
    _write(copy, _tensors(copy))  # without metadata
    load(copy)


@pytest.mark.parametrize("place", ["", "adapter", "base"])
def test_a_key_that_stands_twice(copy, place):
    path = copy / "adapter_config.json"
    text = path.read_text()
    key = f'"{place}": {{' if place else "{"
    path.write_text(text.replace(key, f'{key} "x": 1, "x": 2, ', 1))
    with pytest.raises(CheckpointError, match="'x' occurs twice"):
        load(copy)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_no_weights(copy, dtype):
    _write(copy, {**_tensors(copy), LAYER: torch.ones(5, 64, dtype=dtype)})
    with pytest.raises(CheckpointError, match=rf"{LAYER} is stored as .*expected a floating dtype"):
        load(copy)


def test_half_types_load_and_overflow_does_not(copy):
    tensors = {name: tensor.bfloat16() for name, tensor in _tensors(copy).items()}
    _write(copy, tensors)
    assert torch.equal(load(copy).adapter.state_dict()[LAYER], tensors[LAYER].float())
    _write(copy, {**tensors, LAYER: torch.full((5, 64), 1e300, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match=rf"{LAYER} .*not finite"):
        load(copy)


def test_every_flipped_bit_is_found(copy):
    path = copy / "adapter_model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole), len(whole) // 20):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"the checksum it states|not finite"):
            load(copy)


def test_settings_of_another_adapter_are_found(copy):
    """All of these load without a word where nothing compares the two files."""
    whole = _config(copy)
    for change in ({"gate": "raw"}, {"frame_rule": "mean"}, {"vision_feature": -2},
                   {"channel_order": "bgr"}, {"projector_heads": 2}):  # fmt: skip
        _edit_config(copy, adapter={**whole["adapter"], **change})
        with pytest.raises(CheckpointError, match="saved with other settings"):
            load(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"visual_layers": 10**12},
        {"visual_layers": 9_000},
        {"prompt_layers": 10**12},
        {"prompt_length": 10**12},
        {"prompt_length": 60_000},
        {"visual_prompt_length": 10**12},
        {"visual_prompt_length": 60_000},
        {"projector_blocks": 10**12},
        {"projector_blocks": 500},
        {"projector_width": 10**12},
        {"projector_width": 100_000, "projector_heads": 1},
        {"projector_heads": 10**12},
        {"lora_rank": 10**12},
        {"lora_rank": 30_000},
    ],
)
def test_sizes_are_compared_with_the_file_before_anything_is_built(copy, changes):
    _write(copy, _tensors(copy))  # without checksums, which would tell as well
    _edit_config(copy, adapter={**_config(copy)["adapter"], **changes})
    with built_tensors() as built, pytest.raises((CheckpointError, ConfigError)):
        load(copy)
    assert max(built, default=0) < LARGEST_BUILT
    assert sum(built) < 100 * LARGEST_BUILT


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("base", {"hidden_size": True}),
        ("base", {"hidden_size": 64.0}),
        ("base", {"num_hidden_layers": None}),
        ("base", {"name_or_path": 3}),
        ("base", {"name_or_path": "x" * 300}),
        ("vision", {"name_or_path": "a\x00b"}),
        ("vision", {"name_or_path": "\ud800"}),
        ("base", {"fingerprint": []}),
        ("base", {"more": 1}),
        ("adapter", {"prompt_length": 5.0}),
        ("adapter", {"train_norms": 1}),
        ("adapter", {"gate": ["tanh"]}),
        ("adapter", {"bias_targets": [1]}),
        ("adapter", {"lora_targets": None}),
        ("adapter", {"caption_instruction": None}),
        ("adapter", {"caption_instruction": "x" * 10_000}),
    ],
)
def test_values_of_another_type(copy, section, changes):
    _edit_config(copy, **{section: {**_config(copy)[section], **changes}})
    with pytest.raises(CheckpointError) as refused:
        load(copy)
    assert len(str(refused.value)) < 500
