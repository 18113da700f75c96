"""Samples that share a row are apart in every family, or the family is refused by name."""

from __future__ import annotations

import pytest
import torch
from benchmarks import families
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from llama_adapter import ConfigError, UnsupportedModelError
from llama_adapter.families.compatibility import check_packing

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MORE = {
    "gemma": {"head_dim": 16},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "olmo3": {},
    "exaone4": {},
    "helium": {"head_dim": 16},
    "phi": {},
    "cohere2": {"sliding_window": 6},
    "starcoder2": {},
}
"""Further families that are adapted and keep samples apart."""
MIXING = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "biogpt": {},
    "afmoe": {"head_dim": 16, "num_dense_layers": 1, "sliding_window": 16, **_EXPERTS},
}
"""Families that are adapted and mix the samples of a row."""
SIZES = (6, 3, 11)


def _base(family, dtype=torch.float32):
    if family in families.FAMILIES:
        return families.make_base(family).to(dtype)
    settings = {**families.COMMON, **MORE.get(family, {}), **MIXING.get(family, {})}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def _adapted(family):
    model = families.make_adapted(_base(family))
    families.stir(model)
    return model


def _samples():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (1, size), generator=generator) for size in SIZES]


def _packed(model, **options):
    """Three samples in a row, the first and the last with an image of their own."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    index = torch.tensor([0] * SIZES[0] + [-1] * SIZES[1] + [1] * SIZES[2])[None]
    return model(
        torch.cat(_samples(), dim=1),
        position_ids=torch.cat([torch.arange(size) for size in SIZES])[None],
        pixel_values=images,
        image_index=index,
        **options,
    ).logits, images


@pytest.mark.parametrize("family", [*families.FAMILIES, *MORE])
def test_packed_samples_are_as_if_alone(family):
    model = _adapted(family)
    with torch.no_grad():
        found, images = _packed(model)
        first, second, third = _samples()
        alone = [
            model(first, pixel_values=images[:1]).logits,
            model(second).logits,
            model(third, pixel_values=images[1:]).logits,
        ]
    assert_close(found, torch.cat(alone, dim=1), rtol=1e-4, atol=2e-5)


def test_packed_rows_are_not_cached():
    """transformers tells samples apart without a cache alone, and makes one unasked."""
    model = _adapted("llama")
    for options in ({"use_cache": True}, {"cache": DynamicCache()}):
        with pytest.raises(ConfigError, match="cannot be cached"):
            _packed(model, **options)
    with torch.no_grad():
        assert_close(_packed(model)[0], _packed(model, use_cache=False)[0], rtol=0, atol=0)


@pytest.mark.parametrize("family", MIXING)
def test_a_family_that_mixes_samples_is_refused_by_name(family):
    model = _adapted(family)
    with pytest.raises(UnsupportedModelError, match=rf"^{family} .* cannot share a row"):
        _packed(model)
    # a sample a row is its own matter
    sample = _samples()[0]
    position = torch.arange(SIZES[0])[None]
    with torch.no_grad():
        assert_close(model(sample, position_ids=position).logits, model(sample).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", *MIXING])
def test_the_check_holds_in_half_types_and_leaves_the_mode(family):
    base = _base(family, torch.bfloat16).train()
    base.get_decoder().eval()
    modes = [module.training for module in base.modules()]
    if family in MIXING:
        with pytest.raises(UnsupportedModelError, match="cannot share a row"):
            check_packing(base)
    else:
        check_packing(base)
    assert [module.training for module in base.modules()] == modes


@pytest.mark.parametrize("family", [*families.FAMILIES, *MORE, *MIXING])
def test_a_left_padded_row_is_as_if_alone(family):
    model = _adapted(family)
    ids, images = families.inputs()
    with torch.no_grad():
        expected = model(ids, pixel_values=images).logits
        padded = torch.nn.functional.pad(ids, (5, 0))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
        found = model(padded, attention_mask=mask, pixel_values=images).logits
    assert_close(found[:, 5:], expected, rtol=1e-4, atol=2e-5)
