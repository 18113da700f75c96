"""Static prompts and LoRA in peft's own format compute what ours do; what differs is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.checkpoints.peft_format import export_peft, import_peft
from llama_adapter.errors import CheckpointError

# peft asks transformers by a name of older releases
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.tensor([[1, 5, 9, 20, 33]])
CONFIGS = {"llama": LlamaConfig(**SMALL), "mistral": MistralConfig(**SMALL)}


def adapter(
    out: Path, config: Any, *, preset: str = "v1", same_gates: bool = True, **settings: Any
) -> LlamaAdapterForConditionalGeneration:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out / "base")
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(out / "base"), config=LlamaAdapterConfig.preset(preset, **settings)
    )
    with torch.no_grad():
        for parameter in model.group_parameters("language"):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        for _, prompt in model.adapter.prompts():
            prompt.gate.copy_(torch.full((4,), 0.7) if same_gates else torch.arange(4) / 4)
    model.save_pretrained(out / "adapter")
    return model


def in_peft(base: Path, directory: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def ours(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_go_to_peft_and_back(family: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    model = adapter(tmp_path, CONFIGS[family], prompt_length=3, prompt_layers=2)
    expected = ours(model)
    with torch.no_grad(), model.adapters_disabled():
        assert (ours(model) - expected).abs().max() > 1e-2
    done = cli("export", tmp_path / "adapter", "--out", tmp_path / "peft", "--format", "peft")
    assert done.status == 0, done.stderr
    assert "ADAPTION_PROMPT" in done.stdout
    torch.testing.assert_close(in_peft(tmp_path / "base", tmp_path / "peft"), expected)
    call = ("import", tmp_path / "peft", "--base", tmp_path / "base", "--out", tmp_path / "back")
    done = cli(*call, "--json")
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == 2
    again = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(ours(again), expected)
    assert again.adapter_config.gate == "raw"


def test_lora_goes_to_peft(tmp_path: Path) -> None:
    settings = {"prompt_length": 0, "lora_rank": 2, "lora_targets": ("q_proj", "down_proj")}
    model = adapter(tmp_path, CONFIGS["llama"], **settings)
    assert export_peft(tmp_path / "adapter", out=tmp_path / "peft") == "LORA"
    torch.testing.assert_close(in_peft(tmp_path / "base", tmp_path / "peft"), ours(model))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"same_gates": False}, r"layer 0 has gates from 0 to 0.6\d+, peft has one"),
        ({"preset": "v2-chat"}, "has biases, which no adapter of peft holds"),
        ({"scale_targets": "all"}, "has scales"),
        ({"train_norms": True}, "has norms"),
        ({"lora_rank": 2}, "has LoRA that its prompts bypass"),
        ({"config": LlamaConfig(**SMALL, attention_bias=True)}, "o_proj has a bias"),
        (
            {"config": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)},
            "family 'gpt2'; peft computes static prompts as we do on llama and mistral",
        ),
    ],
)
def test_what_peft_lacks_is_named(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    adapter(tmp_path, **{"config": CONFIGS["llama"], **options})
    with pytest.raises(CheckpointError, match=says):
        export_peft(tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_and_damaged_adapters_of_peft_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path, CONFIGS["llama"], prompt_length=3, prompt_layers=2)
    source = tmp_path / "peft"
    export_peft(tmp_path / "adapter", out=source)
    weights, config = source / "adapter_model.safetensors", source / "adapter_config.json"
    tensors, said = load_file(weights), json.loads(config.read_text())

    def refused() -> str:
        with pytest.raises(CheckpointError) as caught:
            import_peft(source, base=tmp_path / "base", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    first = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != first}, weights)
    assert "does not hold adaption_prompt [1, 3, 32] and adaption_gate [1]" in refused()
    save_file({**tensors, "base_model.model.other": torch.zeros(1)}, weights)
    assert "has tensor base_model.model.other" in refused()
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights) in refused()
    config.write_text(json.dumps({**said, "peft_type": "LORA"}))
    assert "has peft_type 'LORA', expected 'ADAPTION_PROMPT'" in refused()
