"""A base is known again in every dtype, and any other base is told from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config
from transformers.models.gemma2 import Gemma2Config

from llama_adapter import CheckpointError, LlamaAdapterForConditionalGeneration
from llama_adapter.model.fingerprints import describe_rule, fingerprints
from llama_adapter.model.references import check_reference, describe_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
load = LlamaAdapterForConditionalGeneration.from_pretrained


def noisy(model):
    """Values with more digits than any half type has."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.fixture
def saved(base, tower, build, tmp_path):
    noisy(base()).save_pretrained(tmp_path / "base")
    tower().save_pretrained(tmp_path / "tower")
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(tmp_path / "base"), str(tmp_path / "tower"), seed=0
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def reload(where, **options):
    return AutoModelForCausalLM.from_pretrained(where, **options)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_it_survives_a_change_of_dtype(base, tmp_path, stored, loaded):
    model = noisy(base()).to(stored)
    described = describe_model(model)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path, dtype=loaded)
    check_reference(again, json.loads(json.dumps(described)), what="base", directory=Path("x"))


def test_between_half_types_of_one_file(base, tmp_path):
    """Neither rounding tells what the other was: not compared, and said."""
    noisy(base()).save_pretrained(tmp_path)
    described = describe_model(reload(tmp_path, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="saved in bfloat16 cannot be compared in float16"):
        check_reference(
            reload(tmp_path, dtype=torch.float16), described, what="base", directory=Path("x")
        )


@pytest.mark.parametrize("part", ["q_proj.weight", "o_proj.weight", "up_proj.weight",
                                  "down_proj.weight", "lm_head.weight", "embed_tokens.weight",
                                  "input_layernorm.weight"])  # fmt: skip
def test_every_tensor_counts(saved, part):
    model = reload(saved / "base")
    named = dict(model.named_parameters())
    with torch.no_grad():
        next(p for n, p in reversed(named.items()) if n.endswith(part)).mul_(1.01)
    with pytest.raises(CheckpointError, match="another base of the same shape: its fingerprint"):
        load(saved / "adapter", language_model=model)


@pytest.mark.parametrize("begin", [0.0, 0.3, 0.6, 0.9])
def test_a_tenth_of_a_tensor_counts_wherever_it_is(saved, begin):
    model = reload(saved / "base")
    flat = model.model.layers[2].mlp.gate_proj.weight.data.view(-1)
    start = int(begin * flat.numel())
    flat[start : start + flat.numel() // 10] += 0.01
    with pytest.raises(CheckpointError, match="another base of the same shape"):
        load(saved / "adapter", language_model=model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'silu', this base has 'gelu'"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type",
        ),
    ],
)
def test_settings_that_change_the_function_count(saved, changes, named):
    path = saved / "base/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=named):
        load(saved / "adapter")


def test_settings_that_change_nothing_do_not_count(saved):
    path = saved / "base/config.json"
    changes = {"transformers_version": "5.17.0", "use_cache": False, "eos_token_id": 5,
               "initializer_range": 0.5, "attention_dropout": 0.0, "a_newer_setting": 3,
               "max_position_embeddings": 99}  # fmt: skip
    content = {**json.loads(path.read_text()), **changes}
    del content["architectures"]
    path.write_text(json.dumps(content))
    load(saved / "adapter")


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "vocab_size": 50}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, num_key_value_heads=2),
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16),
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4),
    ],
    ids=lambda config: config.model_type,
)
def test_settings_are_the_same_before_and_after_saving(config, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    described = describe_model(model)
    model.save_pretrained(tmp_path / "model")
    check_reference(reload(tmp_path / "model"), described, what="base", directory=Path("x"))


def test_a_large_base_is_sampled(base):
    """Sixty-four values of a tensor, however many it has."""
    with torch.device("meta"):
        assert fingerprints(base()) is None
    found = fingerprints(base())
    assert found["all"].keys() == {"float32", "bfloat16", "float16"}
    assert found["dtype"] == "float32"


def test_directories_of_version_0_1_keep_their_rule(saved):
    path = saved / "adapter/adapter_config.json"
    content = json.loads(path.read_text())
    for name in ("base", "vision"):
        assert "every tensor" in describe_rule(content[name])
        del content[name]["weights"], content[name]["config"]
    path.write_text(json.dumps(content))
    assert "as version 0.1 did" in describe_rule(content["base"])
    load(saved / "adapter")
    model = reload(saved / "base")
    model.model.embed_tokens.weight.data.mul_(1.1)
    with pytest.raises(CheckpointError, match="another base of the same shape"):
        load(saved / "adapter", language_model=model)
