"""A real adapter directory on a tiny base, and a way to run the program on it."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Finished:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run the program in this process; `stdin` is what the user types."""
    from llama_adapter.cli import main

    def run(*arguments: object, stdin: str = "") -> Finished:
        monkeypatch.setattr(sys, "argv", ["llama-adapter", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as error:
                status = int(error.code or 0)
        return Finished(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def adapter_dir(
    tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any, image_processor: Any
) -> Path:
    """A fresh V2 adapter on a random two-layer Llama and a random CLIP tower."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from llama_adapter import (
        LlamaAdapterConfig,
        LlamaAdapterForConditionalGeneration,
        LlamaAdapterProcessor,
    )

    root = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(toy_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=toy_tokenizer.pad_token_id,
            bos_token_id=toy_tokenizer.bos_token_id,
            eos_token_id=toy_tokenizer.eos_token_id,
        )
    )
    llama.save_pretrained(root / "base")
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    )
    clip.save_pretrained(root / "vision")
    config = LlamaAdapterConfig.preset(
        "v2", prompt_length=2, visual_prompt_length=2, projector="linear"
    )
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(root / "base"), vision=str(root / "vision"), config=config, seed=0
    )
    model.save_pretrained(root / "mine")
    processor = LlamaAdapterProcessor(image_processor, toy_tokenizer, template="toy")
    processor.save_pretrained(root / "mine")
    return root / "mine"
