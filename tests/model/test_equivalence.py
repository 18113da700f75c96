"""An adapter trained on dequantized weights, on the weights before they were quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_adapter import CheckpointError, LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.model.equivalence import EQUIVALENCE_NAME, declare_equivalence


def four_bits(values: Tensor) -> Tensor:
    """Blocks of 32 rounded to 16 steps from the least to the largest, as Q4_1 does."""
    blocks = values.reshape(-1, 32)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-12)
    return (((blocks - low) / step).round() * step + low).reshape(values.shape)


def original(seed: int = 0) -> LlamaForCausalLM:
    """A base with norms as after training."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim == 1:
                values.add_(torch.linspace(-0.1, 0.1, len(values)))
    return model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter that was trained on the dequantized base."""
    base = original()
    with torch.no_grad():
        for values in base.parameters():
            if values.ndim == 2:
                values.copy_(four_bits(values))
    config = LlamaAdapterConfig(preset="v2-chat")
    model = LlamaAdapterForConditionalGeneration.from_base(base, config=config)
    model.save_pretrained(tmp_path)
    with model.adapters_disabled():
        declare_equivalence(tmp_path, base, declared="before Q4_1", bound=0.15)
    return tmp_path


def load(directory: Path, base: LlamaForCausalLM) -> LlamaAdapterForConditionalGeneration:
    return LlamaAdapterForConditionalGeneration.from_pretrained(directory, language_model=base)


def test_the_original_weights_are_taken_and_that_is_said(directory: Path) -> None:
    with pytest.warns(UserWarning, match=r"equivalent to it as declared \(before Q4_1\)"):
        load(directory, original())
    with pytest.warns(UserWarning, match="equivalent"):
        load(directory, original().to(torch.bfloat16))


def test_without_a_declaration_they_are_another_base(directory: Path) -> None:
    (directory / EQUIVALENCE_NAME).unlink()
    with pytest.raises(CheckpointError, match="saved for another base of the same shape"):
        load(directory, original())


def test_other_weights_are_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"at most 0\.15 is declared"):
        load(directory, original(seed=1))
    base = original()
    with torch.no_grad():
        base.model.norm.weight[-1] += 0.1
    with pytest.raises(CheckpointError, match=r"norm\.weight is inf of its size away"):
        load(directory, base)


@pytest.mark.parametrize("change", ["cut", "no bound"])
def test_a_damaged_declaration_is_named(directory: Path, change: str) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / EQUIVALENCE_NAME
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        save_file(load_file(path), path, metadata={"declared": "x"})
    with pytest.raises(CheckpointError, match=EQUIVALENCE_NAME):
        load(directory, original())
