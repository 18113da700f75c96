"""A model of the wrong kind is refused in one clear line, before its weights are read."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from llama_adapter import (
    CheckpointError,
    ConfigError,
    LlamaAdapterConfig,
    LlamaAdapterError,
    LlamaAdapterForConditionalGeneration,
)
from llama_adapter.model.references import load_language_model, load_vision

Ours = LlamaAdapterForConditionalGeneration
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=96,
    )
    return LlavaForConditionalGeneration(config)


def clip():
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION))


def t5():
    settings = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48}
    return T5ForConditionalGeneration(T5Config(**settings, num_layers=2, num_heads=4))


def refused(call, where, *words, kind: type[LlamaAdapterError] = LlamaAdapterError):
    """The weights are gone: what is said is said before they are read."""
    for path in where.glob("model*.safetensors"):
        path.unlink()
    with pytest.raises(kind) as fault:
        call(str(where))
    message = str(fault.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in (str(where), *words):
        assert word in message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (clip, ["'clip'", "images and text", "must be a text decoder"]),
        (lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)), ["'clip_vision_model'", "encoder"]),
        (lambda: ViTModel(ViTConfig(**VISION)), ["'vit'", "a vision encoder", "text decoder"]),
        (t5, ["'t5'", "another kind of model", "text decoder"]),
    ],
    ids=["clip", "clip-vision", "vit", "t5"],
)
def test_what_is_not_a_text_decoder_is_not_a_base(make, words, tmp_path):
    make().save_pretrained(tmp_path)
    refused(load_language_model, tmp_path, *words, kind=CheckpointError)
    refused(Ours.from_base, tmp_path, *words)


def test_of_a_multimodal_model_the_text_decoder_is_taken(tmp_path):
    whole = llava().eval()
    whole.save_pretrained(tmp_path)
    ids = torch.arange(2, 8).unsqueeze(0)
    for base in (load_language_model(str(tmp_path)), Ours.from_base(whole).language_model):
        assert type(base).__name__ == "LlamaForCausalLM"
        assert not any("vision" in name for name, _ in base.named_parameters())
        with torch.no_grad():
            assert torch.equal(base(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_what_takes_no_pixels_is_not_a_vision_encoder(base, tmp_path):
    base().save_pretrained(tmp_path / "decoder")
    words = ["'llama'", "a text decoder", "vision encoder must take pixel_values"]
    refused(load_vision, tmp_path / "decoder", *words)
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(tmp_path / "text")
    refused(load_vision, tmp_path / "text", "'clip_text_model'", "must take pixel_values")


@pytest.mark.parametrize("make", [clip, lambda: ViTModel(ViTConfig(**VISION))])
def test_encoders_of_every_kind_load_as_before(make, tmp_path):
    make().save_pretrained(tmp_path)
    assert load_vision(str(tmp_path)).main_input_name == "pixel_values"


def test_an_adapter_is_neither_a_base_nor_a_vision_encoder(base, tower, tmp_path):
    base().save_pretrained(tmp_path / "base")
    tower().save_pretrained(tmp_path / "tower")
    model = Ours.from_base(str(tmp_path / "base"), str(tmp_path / "tower"))
    model.save_pretrained(tmp_path / "adapter")
    for call, name in ((load_language_model, "base"), (load_vision, "tower")):
        refused(
            call, tmp_path / "adapter", "is an adapter directory", repr(str(tmp_path / name)),
            "adapter.start",
        )  # fmt: skip


def test_what_is_not_our_adapter_is_not_loaded_as_one(tmp_path):
    content = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    refused(Ours.from_pretrained, tmp_path, "adapter directory of peft ('LORA')", "as the base")


def test_a_vocabulary_of_another_size_is_named(build, base, tmp_path):
    build("v2-chat").save_pretrained(tmp_path)
    larger = base()
    with torch.random.fork_rng():
        larger.resize_token_embeddings(105, mean_resizing=False)

    def load(where):
        Ours.from_pretrained(where, language_model=larger)

    with pytest.raises(CheckpointError, match="vocab_size 97, this base has 105") as fault:
        load(tmp_path)
    assert len(str(fault.value)) < 500


def test_options_without_a_meaning_for_adapters_are_refused(build, base, tmp_path):
    model = build("v2-chat")
    model.save_pretrained(tmp_path, max_shard_size="5GB", token="mine")
    for size, message in ((100, "one file, which is larger"), ("much", "a size as 5GB")):
        with pytest.raises(ConfigError, match=message):
            model.save_pretrained(tmp_path / "none", max_shard_size=size)
    assert not (tmp_path / "none").exists()

    own = LlamaAdapterConfig.from_pretrained(tmp_path)
    other = LlamaAdapterConfig.preset("v1")
    for options in (
        {"trust_remote_code": False, "code_revision": None, "config": None, "adapter_kwargs": {}},
        {"trust_remote_code": True, "config": own, "adapter_kwargs": {"token": None}},
    ):
        again = Ours.from_pretrained(tmp_path, language_model=base(), **options)
        assert again.adapter_config == model.adapter_config
        again = AutoModelForImageTextToText.from_pretrained(
            tmp_path, language_model=base(), **options
        )
        assert again.adapter_config == model.adapter_config
    for arguments, options, message in (
        ((base(),), {}, "one positional argument"),
        ((), {"code_revision": "v1"}, "code from files is never run"),
        ((), {"config": other}, "config is not that of"),
        ((), {"config": "other"}, "config is not that of"),
        ((), {"adapter_kwargs": {"adapter_name": "mine"}}, "adapter_kwargs 'adapter_name'"),
        ((), {"adapter_kwargs": {"revision": "v1"}}, "adapter_kwargs 'revision'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Ours.from_pretrained(tmp_path, *arguments, language_model=base(), **options)


def test_an_adapter_in_a_subfolder_is_loaded_by_the_auto_class(build, base, tmp_path):
    model = build("v2-chat")
    model.add_adapter(LlamaAdapterConfig.preset("v1", prompt_length=3), "second", seed=1)
    model.save_pretrained(tmp_path, selected_adapters=["default", "second"])
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path, subfolder="second", language_model=base()
    )
    assert again.adapter_config.prompt_length == 3
