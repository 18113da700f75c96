"""What the model inherits from transformers works with the adapter on, or is refused."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers.generation.continuous_batching import continuous_api

from llama_adapter import UnsupportedModelError


def test_continuous_batching_is_refused(build, ids):
    model = build()
    entries = {name for name in vars(continuous_api.ContinuousMixin) if not name.startswith("_")}
    assert entries == {
        "init_continuous_batching",
        "continuous_batching_context_manager",
        "generate_batch",
        "destroy_cached_continuous_batching_manager",
    }
    prompts = ids.tolist()
    for call in (
        lambda: model.generate_batch(prompts, max_new_tokens=2),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager(),
        lambda: model.generate(ids, cache_implementation="paged", max_new_tokens=2),
    ):
        with pytest.raises(UnsupportedModelError, match="continuous batching"):
            call()
    model.destroy_cached_continuous_batching_manager()  # there is none
    assert model.generate(ids, max_new_tokens=2).shape == (3, 9)


def test_attention_itself_refuses_paged_requests(build, ids):
    """Whoever makes transformers' manager by hand, around the model or around its base."""
    model = build()
    for part in (model, model.language_model):
        with pytest.raises(UnsupportedModelError, match="continuous batching"):
            part(ids, read_index=[], block_table=None)


@pytest.mark.parametrize("name", ["eager", "sdpa", "llama_adapter_eager"])
def test_another_attention_keeps_the_prompts(build, ids, pictures, name):
    model = build()
    with torch.no_grad():
        expected = model(ids, pixel_values=pictures).logits
        model.set_attn_implementation(name)
        assert_close(model(ids, pixel_values=pictures).logits, expected, rtol=1e-4, atol=1e-4)
        model.disable_adapters()
        model.set_attn_implementation("sdpa")
        alone = model(ids).logits
        model.enable_adapters()
        assert_close(model(ids, pixel_values=pictures).logits, expected, rtol=1e-4, atol=1e-4)
    assert (alone - expected).abs().max() > 0.1


def test_an_attention_without_prompts_is_refused(build, ids):
    model = build()
    for name in ("paged|eager", "nonsense", {"": "sdpa"}):
        with pytest.raises(UnsupportedModelError):
            model.set_attn_implementation(name)
    model.language_model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match="set to 'sdpa', which carries no prompts"):
        model(ids)
    model.set_attn_implementation("sdpa")
    assert torch.isfinite(model(ids).logits).all()
