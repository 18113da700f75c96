"""Adapter directories saved by version 0.1 load and give the logits that they gave then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor

SAVED = Path(__file__).parents[1] / "saved/adapters"
KINDS = ("v2", "v1", "chat", "late", "own")


@pytest.fixture
def saved(tmp_path):
    """A copy, since loading must also work where nothing lies but these files."""
    return Path(shutil.copytree(SAVED, tmp_path / "adapters"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_its_logits(kind, saved):
    given = load_file(saved / kind / "expected.safetensors")
    expected = given.pop("logits")
    model = LlamaAdapterForConditionalGeneration.from_pretrained(saved / kind)
    stored = load_file(saved / kind / "adapter_model.safetensors")
    for name, tensor in model.adapter.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    with torch.no_grad():
        # other machines add in another order; a wrong tensor moves the logits by far more
        assert_close(model(**given).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_saved_again(kind, saved, tmp_path):
    given = load_file(saved / kind / "expected.safetensors")
    expected = given.pop("logits")
    LlamaAdapterForConditionalGeneration.from_pretrained(saved / kind).save_pretrained(
        saved / "again"
    )
    LlamaAdapterProcessor.from_pretrained(saved / kind).save_pretrained(saved / "again")
    again = LlamaAdapterForConditionalGeneration.from_pretrained(saved / "again")
    with torch.no_grad():
        assert_close(again(**given).logits, expected, rtol=0, atol=2e-5)
    assert LlamaAdapterProcessor.from_pretrained(saved / "again").tokenizer is not None
