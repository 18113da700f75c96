"""A dozen types of the sweep over all of transformers, and what it must find wrong."""

from __future__ import annotations

import pytest
import torch
from benchmarks.family_sweep import adapted, check_type, randomize
from benchmarks.tiny_models import tiny_base
from torch.testing import assert_close

from llama_adapter import (
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    UnsupportedModelError,
)
from llama_adapter.checkpoints.merging import merge_into_base
from llama_adapter.families import discovery

ACCEPTED = (
    "qwen3_5_text",
    "ministral3",
    "llama4_text",
    "gpt_oss",
    "gemma3n_text",
    "gemma4_text",
    "deepseek_v3",
    "lfm2",
    "granitemoehybrid",
    "gpt2",
    "stablelm",
    "doge",
)


@pytest.mark.parametrize("model_type", ACCEPTED)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_type_is_adapted_exactly(model_type):
    row = check_type(model_type)
    assert row["status"] == "accepted", row.get("reason")
    assert row["noop"] == 0.0
    assert row["cached"] < 2e-4
    assert row["padded"] < 1e-5


def test_layers_without_softmax_attention_get_no_prompts():
    model = adapted(tiny_base("qwen3_5_text"))
    assert [prompt.layer_index for _, prompt in model.adapter.prompts()] == [1, 3]
    assert "layers.0.linear_attn.out_proj.scale" in model.adapter.state_dict()


def test_a_layer_that_reuses_keys_gets_no_prompts():
    model = adapted(tiny_base("gemma3n_text", num_kv_shared_layers=2))
    assert len(model.adapter.structure.reusing) == 2
    assert [prompt.layer_index for _, prompt in model.adapter.prompts()] == [0, 1]


@pytest.mark.parametrize("model_type", ["gpt2", "deepseek_v3", "qwen3_5_text", "gemma4_text"])
def test_prepared_and_merged_are_as_learned(model_type):
    base = tiny_base(model_type)
    config = LlamaAdapterConfig.preset("v2-chat", prompt_length=0, bias_targets="none")
    model = LlamaAdapterForConditionalGeneration.from_base(base, None, config, seed=0)
    randomize(model)
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        learned = model(input_ids=ids, use_cache=False).logits
        model.prepare_for_inference()
        assert_close(model(input_ids=ids, use_cache=False).logits, learned, rtol=1e-4, atol=1e-5)
        model.prepare_for_training()
        merge_into_base(model)
        assert_close(base(input_ids=ids, use_cache=False).logits, learned, rtol=1e-4, atol=1e-5)


def test_linears_that_share_a_weight_are_not_merged():
    model = adapted(tiny_base("zamba"))
    with pytest.raises(UnsupportedModelError, match="share a weight of the base"):
        merge_into_base(model)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("mamba", "no softmax attention"), ("recurrent_gemma", "keeps its state in itself")],
)
def test_what_cannot_carry_prompts_is_refused_by_name(model_type, reason):
    with pytest.raises(UnsupportedModelError, match=rf"^{model_type} .*{reason}"):
        adapted(tiny_base(model_type))


def test_a_trainable_without_a_gradient_is_seen_when_it_is_attached(monkeypatch):
    """As doge was: a linear whose output ends where no gradient passes."""
    base = tiny_base("llama")
    project = base.model.layers[1].mlp.up_proj
    plain = type(project).forward
    monkeypatch.setattr(project, "forward", lambda x: plain(project, x).detach())
    model = adapted(base)
    assert "layers.1.mlp.up_proj.scale" in model.adapter.state_dict()  # scaled behind it

    base = tiny_base("llama")
    whole = discovery.discover

    def then_one_ends(language_model):
        found = whole(language_model)
        language_model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: out.detach())
        return found

    monkeypatch.setattr("llama_adapter.model.adapter.discover", then_one_ends)
    with pytest.raises(UnsupportedModelError, match=r"no gradient, such as layers\.1\.mlp"):
        adapted(base)
