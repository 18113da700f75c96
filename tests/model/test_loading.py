"""Bases and encoders load whole, as they are stored, or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.building import LARGEST_BUILT, built_tensors
from torch.testing import assert_close
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from llama_adapter import CheckpointError, LlamaAdapterForConditionalGeneration
from llama_adapter.model.references import load_language_model, load_vision

QUERY = "model.layers.1.self_attn.q_proj.weight"
EYES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture
def stored(base, tower, tmp_path):
    base().save_pretrained(tmp_path / "base")
    tower().save_pretrained(tmp_path / "encoder")
    return tmp_path


def change(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def poke(key, value):
    def edit(tensors):
        tensors[key].view(-1)[7] = value

    return edit


DAMAGE = {
    "missing": (lambda t: t.pop(QUERY), "lacks .*q_proj.weight"),
    "unexpected": (lambda t: t.update(extra=torch.ones(2)), "holds .*extra"),
    "unexpected bias": (
        lambda t: t.update({QUERY.replace("weight", "bias"): torch.ones(64)}),
        "holds .*q_proj.bias",
    ),
    "another shape": (
        lambda t: t.update({QUERY: torch.ones(64, 63)}),
        r"q_proj.weight has shape \[64, 63\], its config expects \[64, 64\]",
    ),
    "integers": (lambda t: t.update({QUERY: t[QUERY].to(torch.int32)}), "is stored as I32"),
    "truth values": (lambda t: t.update({QUERY: t[QUERY] > 0}), "is stored as BOOL"),
    "not a number": (poke(QUERY, float("nan")), "not finite in float32"),
    "infinite": (poke("lm_head.weight", float("inf")), "not finite in float32"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_base_is_refused(kind, stored):
    edit, message = DAMAGE[kind]
    change(stored / "base", edit)
    with pytest.raises(CheckpointError, match=message):
        load_language_model(str(stored / "base"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_encoder_is_refused(kind, stored):
    edit, _ = DAMAGE[kind]
    query = "encoder.layers.1.self_attn.q_proj.weight"

    def translated(tensors):
        [prefix] = {key.removesuffix(query) for key in tensors if key.endswith(query)}
        tensors[QUERY] = tensors.pop(prefix + query)
        tensors["lm_head.weight"] = tensors.pop(prefix + "encoder.layers.0.mlp.fc1.weight")
        edit(tensors)
        if QUERY in tensors:
            tensors[prefix + query] = tensors.pop(QUERY)
        tensors[prefix + "encoder.layers.0.mlp.fc1.weight"] = tensors.pop("lm_head.weight")

    change(stored / "encoder", translated)
    with pytest.raises(CheckpointError, match="vision encoder"):
        load_vision(str(stored / "encoder"))


def test_values_must_be_finite_in_the_dtype_they_end_in(stored):
    change(stored / "base", poke(QUERY, 1e5))
    assert torch.isfinite(load_language_model(str(stored / "base")).lm_head.weight).all()
    load_language_model(str(stored / "base"), dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds .* not finite in float16"):
        load_language_model(str(stored / "base"), dtype=torch.float16)


def test_the_visual_half_of_a_clip_model(tmp_path):
    sizes = {key: EYES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads")}  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 50}, vision_config=EYES)).eval()
    clip.save_pretrained(tmp_path)
    # checkpoints of earlier releases hold the numbers of positions too
    change(
        tmp_path,
        lambda t: t.update(
            {
                f"{half}_model.embeddings.position_ids": torch.arange(5)
                for half in ("text", "vision")
            }
        ),
    )
    encoder = load_vision(str(tmp_path))
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = clip.vision_model(pixel_values=pixels).last_hidden_state
        found = encoder(pixel_values=pixels).last_hidden_state
    assert_close(found, expected, rtol=0, atol=0)
    # a layer more than the config says is no part of another class
    change(tmp_path, lambda t: t.update({"vision_model.encoder.layers.2.x": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"layers\.2\.x"):
        load_vision(str(tmp_path))


def test_what_no_adapter_reads_may_be_missing(tmp_path):
    """A ViT classifier has a head that the plain model lacks, and no pooler."""
    ViTForImageClassification(ViTConfig(**EYES)).save_pretrained(tmp_path)
    encoder = load_vision(str(tmp_path))
    assert torch.isfinite(encoder(pixel_values=torch.zeros(1, 3, 16, 16))[0]).all()
    change(tmp_path, lambda t: t.pop("vit.layernorm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks .*layernorm\.weight"):
        load_vision(str(tmp_path))


def test_a_classifier_is_no_base(base, tmp_path):
    LlamaForSequenceClassification(base().config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks .*lm_head\.weight"):
        load_language_model(str(tmp_path))


def test_tied_weights_and_old_buffers_are_no_damage(base, tmp_path):
    tied = base(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    change(
        tmp_path / "tied",
        lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8)
                            for i in range(4)}),
    )  # fmt: skip
    again = load_language_model(str(tmp_path / "tied"))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16)
    )
    gpt2.save_pretrained(tmp_path / "gpt2")
    mask = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    change(tmp_path / "gpt2", lambda t: t.update({"transformer.h.0.attn.bias": mask}))
    load_language_model(str(tmp_path / "gpt2"))


def test_shards_must_fit_their_index(base, tmp_path):
    base().save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert len(set(content["weight_map"].values())) > 1
    load_language_model(str(tmp_path))
    for edit, message in (
        (lambda files: files.update({QUERY: "../model.safetensors"}), "is not next to it"),
        (lambda files: files.update(extra=files[QUERY]), r"names \['extra'\]"),
        (lambda files: files.update({QUERY: "nowhere.safetensors"}), "nowhere.safetensors"),
    ):
        files = dict(content["weight_map"])
        edit(files)
        index.write_text(json.dumps({**content, "weight_map": files}))
        with pytest.raises(CheckpointError, match=message):
            load_language_model(str(tmp_path))
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**12},
        {"vocab_size": 10**15},
        {"intermediate_size": 10**10},
        {"num_attention_heads": 10**9},
        {"head_dim": 10**9},
        {"max_position_embeddings": 10**12},
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(changes, stored):
    for name, load in (("base", load_language_model), ("encoder", load_vision)):
        if name == "encoder" and changes.keys() & {"vocab_size", "head_dim"}:
            continue
        configure(stored / name, **changes)
        with built_tensors() as built, pytest.raises(CheckpointError) as refused:
            load(str(stored / name))
        assert max(built, default=0) < LARGEST_BUILT
        assert next(iter(changes)).removeprefix("num_")[:9] in str(refused.value)
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"x" * 100])
def test_a_file_of_something_else(name, content, stored):
    (stored / "base" / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        load_language_model(str(stored / "base"))


def test_a_file_that_was_cut_short(stored):
    path = stored / "base/model.safetensors"
    whole = path.read_bytes()
    for kept in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError):
            load_language_model(str(stored / "base"))
    path.write_bytes(whole)
    model = LlamaAdapterForConditionalGeneration.from_base(str(stored / "base"))
    assert isinstance(model.language_model, LlamaForCausalLM)


def test_settings_that_only_point_at_layers_are_no_sizes(base, tmp_path):
    """A small Qwen has `max_window_layers` 28, however few layers there are."""
    base().save_pretrained(tmp_path)
    configure(tmp_path, max_window_layers=28, num_logits_to_keep=1, sliding_window=131072)
    load_language_model(str(tmp_path))
