"""A base with an adapter of peft on it is recorded, loaded and compared as such."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from llama_adapter import (
    CheckpointError,
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    UnsupportedModelError,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

SAME = {"rtol": 0, "atol": 0}
load = LlamaAdapterForConditionalGeneration.from_pretrained


@pytest.fixture
def world(tmp_path, base):
    """A base and two LoRA of it on disk."""
    base().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("lora", "other")):
        torch.manual_seed(seed)
        put_on(tmp_path).save_pretrained(tmp_path / name)
    return tmp_path


def plain(world: Path):
    return AutoModelForCausalLM.from_pretrained(world / "base")


def put_on(world: Path, **changes):
    """The base with a fresh LoRA that does something."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**{**settings, "init_lora_weights": False, **changes})
    return peft.get_peft_model(plain(world), config)


def with_lora(world: Path, name: str = "lora"):
    return peft.PeftModel.from_pretrained(plain(world), world / name)


def adapt(language_model, stir):
    config = LlamaAdapterConfig.preset("v2-chat", prompt_length=3)
    model = LlamaAdapterForConditionalGeneration.from_base(language_model, config=config, seed=0)
    stir(model)
    return model.eval()


@pytest.mark.parametrize("given", ["directory", "peft model", "inner model", "transformers"])
@torch.no_grad()
def test_what_is_saved_on_lora_computes_the_same(world, stir, ids, given):
    wrapped = with_lora(world)
    expected = wrapped(ids).logits
    language_model = {
        "directory": lambda: str(world / "lora"),
        "peft model": lambda: wrapped,
        "inner model": lambda: wrapped.base_model.model,
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(world / "lora"),
    }[given]()
    model = adapt(language_model, stir)
    with model.adapters_disabled():
        assert_close(model(ids).logits, expected, **SAME)
    trained = model(ids).logits
    model.save_pretrained(world / "mine")
    described = json.loads((world / "mine/adapter_config.json").read_text())["base"]
    assert described["name_or_path"] == str(world / "base")
    assert described["peft"]["peft_type"] == "LORA"
    shutil.rmtree(world / "lora")  # the copy is enough
    assert_close(load(world / "mine")(ids).logits, trained, **SAME)
    again = load(world / "mine", language_model=peft.PeftModel.from_pretrained(
        plain(world), world / "mine/lora"))  # fmt: skip
    assert_close(again(ids).logits, trained, **SAME)
    again.save_pretrained(world / "again")
    assert_close(load(world / "again")(ids).logits, trained, **SAME)


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}, {"lora_alpha": 3},
     {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"}, {"lora_dropout": 0.5}],
)  # fmt: skip
@torch.no_grad()
def test_every_kind_of_lora_comes_back(world, stir, ids, changes):
    wrapped = put_on(world, **changes)
    for module in wrapped.modules():
        if type(module).__name__ == "ModulesToSaveWrapper":
            module.modules_to_save["default"].weight.mul_(1.5)
    model = adapt(wrapped, stir)
    expected = model(ids).logits
    model.save_pretrained(world / "mine")
    assert_close(load(world / "mine")(ids).logits, expected, **SAME)


def test_another_base_is_refused_in_words(world, stir):
    adapt(with_lora(world), stir).save_pretrained(world / "mine")
    adapt(plain(world), stir).save_pretrained(world / "on-plain")
    torch.manual_seed(4)
    scaled = put_on(world, lora_alpha=5)
    for directory, wrong, message in (
        ("mine", plain(world), r"saved for a base with a peft adapter \(LORA\) on it, this base"),
        ("mine", with_lora(world).merge_and_unload(), r"this base has none \(or one that is merg"),
        ("mine", with_lora(world, "other"), "with another peft adapter on it: its fingerprint"),
        ("mine", scaled, "with another peft adapter on it: its fingerprint"),
        ("on-plain", with_lora(world), r"for a plain base, this base has a peft adapter \(LORA\)"),
        ("on-plain", with_lora(world).merge_and_unload(), "another base of the same shape"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(world / directory, language_model=wrong)
    # and as a further adapter
    with pytest.raises(CheckpointError, match="on it, this base has none"):
        load(world / "on-plain").load_adapter(world / "mine", "second")
    with pytest.raises(CheckpointError, match="saved for a plain base"):
        load(world / "mine").load_adapter(world / "on-plain", "second")
    shutil.copytree(world / "mine", world / "twin")
    model = load(world / "mine")
    model.load_adapter(world / "twin", "second")
    assert model.adapters == ("default", "second")


def test_damage_is_refused_in_words(world, stir):
    adapt(with_lora(world), stir).save_pretrained(world / "mine")
    settings, weights = world / "mine/lora/adapter_config.json", world / "mine/lora"
    content = json.loads(settings.read_text())
    for changes, message in (
        ({"r": 8}, r"has shape \[4, "),
        ({"lora_alpha": 1}, "another peft adapter on it"),
        ({"target_modules": ["q_proj"]}, "has unexpected"),
        ({"target_modules": ["nothing"]}, "does not fit the base"),
        ({"peft_type": "PREFIX_TUNING"}, "cannot be read|adds tokens or keys"),
        ({"peft_type": "NOTHING"}, "cannot be read"),
    ):
        settings.write_text(json.dumps({**content, **changes}))
        with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
            load(world / "mine")
    settings.write_text(json.dumps(content))
    shutil.copy(world / "other/adapter_model.safetensors", weights)
    with pytest.raises(CheckpointError, match="another peft adapter on it"):
        load(world / "mine")
    (weights / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load(world / "mine")
    shutil.rmtree(weights)
    with pytest.raises(CheckpointError, match=r"lora is missing: .* a peft adapter was"):
        load(world / "mine")


def test_what_could_not_be_loaded_again_is_refused(world, stir):
    several = with_lora(world)
    several.load_adapter(world / "other", "other")
    adapt(several, stir)  # one of two is active
    several = with_lora(world)
    several.load_adapter(world / "other", "other")
    several.base_model.set_adapter(["default", "other"])
    off = with_lora(world)
    off.base_model.disable_adapter_layers()
    merged = with_lora(world)
    merged.merge_adapter()
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for wrong, message in (
        (several, r"several at once \(default, other\)"),
        (off, "is switched off"),
        (merged, "is merged in place"),
        (peft.get_peft_model(plain(world), prompts), "PROMPT_TUNING cannot be adapted"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            adapt(wrong, stir)


@torch.no_grad()
def test_a_merged_base_must_be_saved(world, stir, ids):
    merged = with_lora(world).merge_and_unload()
    model = adapt(merged, stir)
    expected = model(ids).logits
    with pytest.warns(UserWarning, match=r"base is not what .*base' holds: its .* is another one"):
        model.save_pretrained(world / "mine")
    with pytest.raises(CheckpointError, match="does not say where its base is"):
        load(world / "mine")
    merged = with_lora(world).merge_and_unload()
    assert_close(load(world / "mine", language_model=merged)(ids).logits, expected, **SAME)
    with_lora(world).merge_and_unload().save_pretrained(world / "merged")
    model = adapt(str(world / "merged"), stir)
    model.save_pretrained(world / "saved")
    assert_close(load(world / "saved")(ids).logits, expected, **SAME)
    with pytest.raises(CheckpointError, match="another base of the same shape"):
        load(world / "saved", language_model=plain(world))


def test_a_base_as_it_is_stored_is_no_other(world, stir, recwarn):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=dtype)
        adapt(base, stir).save_pretrained(world / str(dtype))
        load(world / str(dtype), dtype=dtype)
    assert not [w for w in recwarn if "is not what" in str(w.message)]


def test_the_example(world, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples/lora_base.py"
    monkeypatch.setattr(sys, "argv", ["lora_base.py", str(world / "lora"), str(world / "out")])
    runpy.run_path(str(script), run_name="__main__")
    *steps, last = capsys.readouterr().out.splitlines()
    assert len(steps) == 3
    assert last == "largest difference after loading: 0.0"
    assert (world / "out/lora/adapter_model.safetensors").is_file()
