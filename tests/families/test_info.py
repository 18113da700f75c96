"""What is said of layers that have no prompts of their own."""

from __future__ import annotations

import pytest
from benchmarks.tiny_models import tiny_base

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.checkpoints.description import describe_directory


@pytest.mark.parametrize(
    ("model_type", "changes", "static", "without"),
    [
        ("gemma4_text", {"num_kv_shared_layers": 2}, [0, 1], "2, 3"),
        ("granitemoehybrid", {}, [1, 3], "0, 2"),
        ("llama", {}, [0, 1, 2, 3], None),
    ],
)
def test_layers_without_keys_of_their_own(tmp_path, model_type, changes, static, without):
    base = tiny_base(model_type, **changes)
    config = LlamaAdapterConfig.preset("v2-chat", prompt_length=4)
    LlamaAdapterForConditionalGeneration.from_base(base, config=config).save_pretrained(tmp_path)
    described = describe_directory(tmp_path)
    assert described["layers"] == {"base": 4, "static": static, "visual": []}
    found = [note for note in described["notes"] if "no prompts" in note]
    assert [note.partition(" have ")[0] for note in found] == (
        [] if without is None else [f"layers {without}"]
    )
