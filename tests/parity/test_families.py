"""Every supported family on a tiny model of its real class; the others are refused by name."""

from __future__ import annotations

import pytest
import torch
from benchmarks import families
from benchmarks.families import FAMILIES, WITHOUT_SDPA, implementations
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_adapter import LlamaAdapterForConditionalGeneration, UnsupportedModelError
from llama_adapter.model import answer_mask
from llama_adapter.model.attention_registry import IMPLEMENTATIONS, PREFIX

ROUTES = [(family, name) for family in FAMILIES for name in implementations(family)]
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(("family", "implementation"), ROUTES)
def test_a_fresh_adapter_is_exactly_nothing(family, implementation):
    assert families.noop_difference(family, implementation) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_projected_as_the_family_would(family):
    assert families.oracle(family) <= 1e-6


@pytest.mark.parametrize(("family", "implementation"), ROUTES)
def test_cached_is_uncached(family, implementation):
    assert families.cache_difference(family, implementation) < 1e-5


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_SDPA])
def test_implementations_agree(family):
    ids, pictures = families.inputs()
    logits = []
    for name in implementations(family):
        model = families.make_adapted(families.make_base(family, implementation=name))
        families.stir(model)
        with torch.no_grad():
            logits.append(model(ids, pixel_values=pictures).logits)
    assert_close(logits[0], logits[1], **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_learns_and_a_picture_is_seen(family):
    model = families.make_adapted(families.make_base(family))
    families.stir(model)
    ids, pictures = families.inputs()
    seen = model(ids, pixel_values=pictures, labels=ids)
    seen.loss.backward()
    for name, parameter in model.adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert (seen.logits - model(ids, pixel_values=pictures.flip(0)).logits).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_where_labels_stand_give_the_gradients_of_all(family):
    ids, pictures = families.inputs()
    model = families.make_adapted(families.make_base(family)).train()
    families.stir(model)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] // 2, -100)
    labels[0, -1] = -100
    gradients = []
    for kept in (0, answer_mask(labels)):
        inputs = {"pixel_values": pictures, "labels": labels}
        model(ids, logits_to_keep=kept, **inputs).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.adapter.named_parameters()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_and_padded_on_the_left(family):
    model = families.make_adapted(families.make_base(family))
    families.stir(model)
    ids, pictures = families.inputs()
    with torch.no_grad():
        learned = model(ids, pixel_values=pictures).logits
        model.prepare_for_inference()
        assert_close(model(ids, pixel_values=pictures).logits, learned, **EXACT)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False}
    batch = model.generate(
        input_ids=torch.where(mask.bool(), ids, 0),
        attention_mask=mask,
        pixel_values=pictures,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    alone = model.generate(
        input_ids=ids[:1, 3:],
        attention_mask=mask[:1, 3:],
        pixel_values=pictures[:1],
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert torch.equal(batch.sequences[0, 10:], alone.sequences[0, 7:])
    for ours, theirs in zip(batch.logits, alone.logits, strict=True):
        assert_close(ours[:1], theirs, **EXACT)


def _kinds(model, ending):
    names = [name for name, _ in model.adapter.named_parameters() if name.endswith(ending)]
    return {name.split(".", 2)[-1].removesuffix(ending) for name in names}


def test_every_linear_and_norm_of_a_dense_family_is_adapted():
    model = families.make_adapted(families.make_base("qwen3"))
    assert _kinds(model, ".scale") == {
        *(f"attention.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    assert {"attention.q_norm", "attention.k_norm", "input_layernorm"} <= _kinds(model, ".weight")
    phi3 = families.make_adapted(families.make_base("phi3"))
    assert _kinds(phi3, ".scale") == {
        "attention.qkv_proj",
        "attention.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_and_routers_are_left_alone(family):
    model = families.make_adapted(families.make_base(family))
    assert _kinds(model, ".scale") == {f"attention.{part}_proj" for part in "qkvo"}
    assert {"input_layernorm", "post_attention_layernorm"} <= _kinds(model, ".weight")


REFUSED = {
    "falcon": {},
    "bloom": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "mamba": {},
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family):
    common = {k: v for k, v in families.COMMON.items() if k != "num_key_value_heads"}
    settings = {"vocab_size": common["vocab_size"]} if REFUSED[family] else common
    config = AutoConfig.for_model(family, **{**settings, **REFUSED[family]})
    base = AutoModelForCausalLM.from_config(config).eval()
    ids, _ = families.inputs()
    with torch.no_grad():
        expected = base(ids).logits
    with pytest.raises(UnsupportedModelError, match=rf"^{family} \(\w+\) cannot be adapted"):
        families.make_adapted(base)
    with torch.no_grad():  # and are left as they were
        assert_close(base(ids).logits, expected)


def test_every_implementation_is_registered_with_its_mask():
    """A name without a mask entry would run with no mask at all."""
    families.make_adapted(families.make_base("llama"))
    assert "flash_attention_2" in IMPLEMENTATIONS
    for name in IMPLEMENTATIONS:
        assert ALL_ATTENTION_FUNCTIONS[PREFIX + name].__name__ == PREFIX + name
        mask = ALL_MASK_ATTENTION_FUNCTIONS[PREFIX + name]
        assert mask is ALL_MASK_ATTENTION_FUNCTIONS[name]


def test_an_unknown_implementation_is_refused():
    base = families.make_base("llama")
    base.config._attn_implementation_internal = "paged|eager"
    with pytest.raises(UnsupportedModelError, match=r"'paged\|eager' cannot carry prompts"):
        LlamaAdapterForConditionalGeneration.from_base(base)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_flex_attention(family):
    """Its kernel, not compiled: what reaches it and what is added are ours."""
    with torch.compiler.set_stance("force_eager"):
        assert families.noop_difference(family, "flex_attention") == 0.0
        assert families.cache_difference(family, "flex_attention") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", families.COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_forward_and_decode_are_one_graph(family):
    """Captured whole; `python -m benchmarks.families` also compiles the graphs."""
    assert families.compile_difference(family, backend="eager") < 1e-5
