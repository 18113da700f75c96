"""What leaves us runs without us."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints.chat_adapters import SMALL, chat_adapter
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from llama_adapter import (
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
)
from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.merging import export_merged
from llama_adapter.checkpoints.settings import Overrides
from llama_adapter.conversation import Conversation
from llama_adapter.errors import CheckpointError
from llama_adapter.processing.processor import PROCESSOR_FILE

PLAIN = """
import sys
sys.modules["llama_adapter"] = None  # importing it would fail
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

given = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(given["input_ids"]).logits
tokens = model.generate(given["input_ids"], max_new_tokens=8, do_sample=False)
save_file({"logits": logits, "tokens": tokens}, sys.argv[3])
"""


def plain_transformers(directory: Path, tokens: torch.Tensor, tmp_path: Path) -> dict[str, Any]:
    """Logits and a greedy continuation of a checkpoint in a process without our package."""
    save_file({"input_ids": tokens}, tmp_path / "given.safetensors")
    where = [str(directory), str(tmp_path / "given.safetensors"), str(tmp_path / "found")]
    subprocess.run([sys.executable, "-c", PLAIN, *where], check=True, capture_output=True)
    return load_file(tmp_path / "found")


def bring_in(world: Any, kind: str, out: Path) -> LlamaAdapterForConditionalGeneration:
    is_visual = "multimodal" in kind
    import_released(
        world.save_released(kind),
        base=world.base(),
        vision=world.save_clip() if is_visual else None,
        out=out,
        overrides=Overrides(prompt_length=3, projector_heads=4),
    )
    return LlamaAdapterForConditionalGeneration.from_pretrained(out)


def given_for(world: Any, kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    given = {"input_ids": torch.randint(3, world.vocab, (2, 7), generator=generator)}
    if "multimodal" in kind:
        given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return given


def test_chat_becomes_a_stock_checkpoint(
    world: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    model = bring_in(world, "v2-chat", tmp_path / "chat")
    tokens = given_for(world, "v2-chat")["input_ids"]
    done = cli("export", tmp_path / "chat", "--out", tmp_path / "merged", "--json")
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["kept"] == []
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True
    found = plain_transformers(tmp_path / "merged", tokens, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-5)
    generated = model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(found["tokens"], generated)
    with torch.no_grad(), model.adapters_disabled():
        assert (model(input_ids=tokens).logits - expected).abs().max() > 0.1


def test_a_stock_checkpoint_writes_the_adapters_prompts(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    chat_adapter(tmp_path, LlamaConfig(**SMALL))
    done = cli("export", tmp_path / "adapter", "--out", tmp_path / "merged", "--json")
    assert done.status == 0, done.stderr
    processor = LlamaAdapterProcessor.from_pretrained(tmp_path / "adapter")
    result = json.loads(done.stdout)
    assert (result["stop"], result["problem"]) == (list(processor.stop_strings), None)
    talk = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A tree."},
        {"role": "user", "content": "Where?"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    written = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    conversation = Conversation.from_messages(talk)
    assert written == str(processor.render(conversation))
    (tmp_path / "adapter" / PROCESSOR_FILE).unlink()
    said = cli("export", tmp_path / "adapter", "--out", tmp_path / "again")
    assert said.status == 0, said.stderr
    assert "the chat template is the base's" in said.stdout


KINDS = ("v1-text", "v2-multimodal-bias", "v2-multimodal-lora-bias", "v2-chat-adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_merged_is_named(kind: str, world: Any, tmp_path: Path) -> None:
    bring_in(world, kind, tmp_path / "in")
    with pytest.raises(CheckpointError, match="static prompts of the last 4 layers") as refused:
        export_merged(tmp_path / "in", out=tmp_path / "out")
    assert "--partial" in str(refused.value)
    assert ("visual prompts" in str(refused.value)) == ("multimodal" in kind)
    assert ("LoRA" in str(refused.value)) == ("lora" in kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_partial_keeps_prompts_as_a_smaller_adapter(kind: str, world: Any, tmp_path: Path) -> None:
    model = bring_in(world, kind, tmp_path / "in")
    given = given_for(world, kind)
    report = export_merged(tmp_path / "in", out=tmp_path / "out", partial=True)
    assert report.kept
    smaller = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(**given).logits, model(**given).logits, rtol=1e-5, atol=1e-5
        )
        # a row without a picture goes through the same base, too
        alone = {"input_ids": given["input_ids"]}
        torch.testing.assert_close(
            smaller(**alone).logits, model(**alone).logits, rtol=1e-5, atol=1e-5
        )
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert not any(n.endswith((".scale", "norm.weight")) and "visual" not in n for n in names)
    learned = {n.split(".")[-2] for n in names if n.endswith("lora_up")}
    assert learned == ({"k_proj", "v_proj"} if "lora" in kind else set())
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "in").rename(tmp_path / "gone")
    again = LlamaAdapterForConditionalGeneration.from_pretrained(moved)
    with torch.no_grad():
        assert torch.equal(again(**given).logits, smaller(**given).logits)


def test_our_own_scale_bias_and_lora_merge_too(world: Any, tmp_path: Path) -> None:
    world.base()
    import_released(world.save_released("v2-chat"), base=world.root / "base", out=tmp_path / "chat")
    config = LlamaAdapterConfig.preset("v2-chat", prompt_length=0, lora_rank=2)
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(tmp_path / "chat" / "base"), config=config, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.group_parameters("language"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path / "ours")
    export_merged(tmp_path / "ours", out=tmp_path / "merged")
    tokens = given_for(world, "v2-chat")["input_ids"]
    found = plain_transformers(tmp_path / "merged", tokens, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", ["all", "none"])
def test_a_family_without_bias_flags(bias: str, tmp_path: Path) -> None:
    base = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
        )
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    config = LlamaAdapterConfig.preset("v2-chat", prompt_length=0, bias_targets=bias)
    model = LlamaAdapterForConditionalGeneration.from_base(str(tmp_path / "base"), config=config)
    with torch.no_grad():
        for parameter in model.group_parameters("language"):
            parameter.add_(0.05)
    model.save_pretrained(tmp_path / "ours")
    if bias == "all":
        with pytest.raises(CheckpointError, match=r"gemma2 configuration has no flag for 6 .*mlp"):
            export_merged(tmp_path / "ours", out=tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        report = export_merged(tmp_path / "ours", out=tmp_path / "part", partial=True)
        assert report.kept == ("the biases, for which the base's configuration has no flag",)
        smaller = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "part")
        tokens = torch.tensor([[1, 5, 9, 20]])
        with torch.no_grad():
            found, expected = (m(input_ids=tokens).logits for m in (smaller, model))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        return
    export_merged(tmp_path / "ours", out=tmp_path / "merged")
    tokens = torch.tensor([[1, 5, 9, 20]])
    found = plain_transformers(tmp_path / "merged", tokens, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-5)


def test_released_format_of_settings_that_never_were_released(
    world: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    bring_in(world, "v2-chat", tmp_path / "chat")
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(tmp_path / "chat" / "base"), config=LlamaAdapterConfig.preset("v2-chat")
    )
    model.save_pretrained(tmp_path / "ours")
    call = ("export", tmp_path / "ours", "--out", tmp_path / "out", "--format", "released")
    done = cli(*call)
    assert done.status == 2
    assert "scale_side is 'output'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--format", "onnx"),
            "one of merged, vllm, gguf, peft, released, got 'onnx'",
        ),
        (("--format", "released", "--partial"), "--partial belongs to --format merged"),
    ],
)
def test_bad_usage(
    options: tuple[str, ...], says: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    done = cli("export", tmp_path, "--out", tmp_path / "out", *options)
    assert done.status == 2
    assert says in done.stderr
    assert (
        "is not an adapter directory" in cli("export", tmp_path, "--out", tmp_path / "out").stderr
    )


@pytest.mark.parametrize("how", ["merged", "released"])
def test_overwriting_spares_the_base_and_other_programs_models(
    how: str, world: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    bring_in(world, "v2-chat", tmp_path / "first")
    base = (tmp_path / "first" / "base").rename(tmp_path / "models")
    import_released(world.root / "v2-chat.pth", base=base, out=tmp_path / "chat")
    before = sorted(path.name for path in base.iterdir())
    call = ("export", tmp_path / "chat", "--format", how, "--overwrite", "--out")
    done = cli(*call, base)
    assert done.status == 2
    assert f"{base} is inside the output directory" in done.stderr
    other = tmp_path / "other"
    shutil.copytree(base, other)
    done = cli(*call, other)
    assert done.status == 2
    assert "it is not overwritten" in done.stderr
    for directory in (base, other):
        assert sorted(path.name for path in directory.iterdir()) == before
    for _ in range(2):
        assert cli(*call, tmp_path / "out").status == 0
