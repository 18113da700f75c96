"""A quantised base by `quantization_config`: nothing of it changes, and adapters learn on it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import BitsAndBytesConfig

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration

pytest.importorskip("bitsandbytes", reason="pip install 'llama-adapter[quantization]'")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

QUANTISATIONS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_quantised_base(base, tower, stir, tmp_path, ids, pictures, kind):
    base(intermediate_size=128).save_pretrained(tmp_path / "base")
    tower().save_pretrained(tmp_path / "tower")
    options = {
        "quantization_config": QUANTISATIONS[kind],
        "device_map": "cpu",
        "dtype": torch.float32,
    }
    config = LlamaAdapterConfig.preset(
        "v2", prompt_length=5, visual_prompt_length=6, projector="linear"
    )
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(tmp_path / "base"), str(tmp_path / "tower"), config, seed=0, **options
    )
    with torch.no_grad():
        with model.adapters_disabled():
            expected = model(ids).logits
        assert_close(model(ids, pixel_values=pictures).logits, expected, rtol=0, atol=0)

    stir(model)
    output = model.train()(ids, pixel_values=pictures, labels=ids)
    output.loss.backward()
    for name, parameter in model.adapter.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name

    with torch.no_grad():
        learned = model.eval()(ids, pixel_values=pictures).logits
        model.prepare_for_inference()
        # its linears stay wrapped: there is no plain weight to merge into
        assert_close(model(ids, pixel_values=pictures).logits, learned, rtol=1e-4, atol=1e-4)
    tokens = model.generate(input_ids=ids, pixel_values=pictures, max_new_tokens=3)
    assert tokens.shape == (3, 10)

    model.save_pretrained(tmp_path / "mine")
    again = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "mine", **options)
    with torch.no_grad():
        assert_close(again(ids, pixel_values=pictures).logits, learned, rtol=1e-4, atol=1e-4)
