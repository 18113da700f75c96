"""A dozen types of the sweep over all of transformers, and what it must find wrong."""

from __future__ import annotations

import pytest
from benchmarks.family_sweep import adapted, check_type
from benchmarks.tiny_models import tiny_base

from llama_adapter import UnsupportedModelError
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
    with pytest.raises(UnsupportedModelError, match="would get no gradient, such as layers.1.mlp"):
        adapted(base)
