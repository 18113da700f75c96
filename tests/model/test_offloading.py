"""A base whose numbers wait on disk or in memory computes, learns, saves as one that does not."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration

LAYERS = [f"model.layers.{n}" for n in range(4)]
ENDS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
MAPS = [
    {"": "disk"},
    {**dict.fromkeys(LAYERS, "disk"), **dict.fromkeys(ENDS, "cpu")},
    {**dict.fromkeys(ENDS, "disk"), **dict.fromkeys(LAYERS, "cpu"), "model.layers.2": "disk"},
]
SAME = {"rtol": 0, "atol": 0}
SMALL = {"prompt_length": 5, "projector_width": 32, "projector_heads": 4}


@pytest.fixture
def stored(tmp_path, base, tower):
    base().save_pretrained(tmp_path / "base")
    tower().save_pretrained(tmp_path / "vision")
    return tmp_path


def _load(stored, stir, device_map, preset="v2", **overrides):
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(stored / "base"),
        str(stored / "vision"),
        LlamaAdapterConfig.preset(preset, **{**SMALL, **overrides}),
        seed=0,
        device_map=device_map,
        offload_folder=stored / "offload",
    )
    stir(model)
    return model


@pytest.mark.parametrize("device_map", MAPS)
@pytest.mark.parametrize("preset", ["v2", "v1-multimodal"])
def test_an_offloaded_base_is_as_in_memory(stored, stir, ids, pictures, device_map, preset):
    expected = _load(stored, stir, None, preset)
    model = _load(stored, stir, device_map, preset)
    assert any(p.is_meta for p in model.language_model.parameters())
    assert model.device == torch.device("cpu")
    assert not any(p.is_meta for p in model.vision.parameters())
    ours, theirs = (dict(m.adapter.named_parameters()) for m in (model, expected))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert_close(parameter, theirs[name], msg=name, **SAME)

    inputs = {"input_ids": ids, "pixel_values": pictures}
    for each in (model, expected):
        each(**inputs, labels=ids).loss.backward()
    for name, parameter in ours.items():
        assert_close(parameter.grad, theirs[name].grad, msg=name, **SAME)
    with torch.no_grad():
        logits = expected(**inputs).logits
        assert_close(model(**inputs).logits, logits, **SAME)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(
            model.generate(**inputs, **options), expected.generate(**inputs, **options)
        )
        with model.adapters_disabled(), expected.adapters_disabled():
            assert_close(model(ids).logits, expected(ids).logits, **SAME)
        model.prepare_for_inference()
        assert_close(model(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
        model.prepare_for_training()
        assert_close(model(**inputs).logits, logits, **SAME)


@pytest.mark.parametrize("device_map", MAPS)
def test_saved_from_disk_and_loaded_to_disk(stored, stir, ids, pictures, device_map):
    expected, model = _load(stored, stir, None), _load(stored, stir, device_map)
    model.save_pretrained(stored / "ours")
    expected.save_pretrained(stored / "theirs")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (stored / "ours" / name).read_bytes() == (stored / "theirs" / name).read_bytes()
    assert json.loads((stored / "ours" / "adapter_config.json").read_text())["base"]["fingerprint"]
    loaded = LlamaAdapterForConditionalGeneration.from_pretrained(
        stored / "ours", device_map=device_map, offload_folder=stored / "again"
    )
    assert not any(p.is_meta for p in loaded.vision.parameters())
    loaded.load_adapter(stored / "theirs", adapter_name="second")
    with torch.no_grad():
        logits = expected(ids, pixel_values=pictures).logits
        for name in ("default", "second"):
            loaded.set_adapter(name)
            assert_close(loaded(ids, pixel_values=pictures).logits, logits, **SAME)


def test_linears_on_disk_merge_as_in_memory(stored, stir):
    expected, model = _load(stored, stir, None), _load(stored, stir, {"": "disk"})
    theirs = dict(expected.adapter.modules())
    for name, module in model.adapter.modules():
        if hasattr(module, "merged_weights"):
            for ours, other in zip(
                module.merged_weights(), theirs[name].merged_weights(), strict=True
            ):
                assert_close(ours, other, **SAME)


def test_the_example(stored, tmp_path, monkeypatch, capsys):
    """The script as users run it; the same adapter as with all layers in memory."""
    script = Path(__file__).resolve().parents[2] / "examples" / "device_map_disk.py"
    for out, resident in (("disk", "1"), ("memory", "4")):
        arguments = [str(stored / "base"), str(stored / "vision"), str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--resident", resident])
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out.split("tokens:")
    assert printed[0].count("loss") == 3
    found, expected = (
        load_file(tmp_path / out / "adapter_model.safetensors") for out in ("disk", "memory")
    )
    assert_close(found, expected, **SAME)
