"""Tiny real models and records on disk, and the scripts of `examples/` run on them."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llama_adapter import (
    Conversation,
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
)
from llama_adapter.processing.image_processors import load_image_processor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COLORS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Any) -> Path:
    """A base, a vision encoder, and six records of which two have no image."""
    root = tmp_path_factory.mktemp("examples")
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    special = {
        "eos_token_id": bytes_tokenizer.eos_token_id,
        "pad_token_id": bytes_tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = LlamaConfig(vocab_size=len(bytes_tokenizer), **small, **special)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    bytes_tokenizer.save_pretrained(root / "base")
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **small))
    tower.save_pretrained(root / "vision")
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(root / "vision")
    for color in COLORS:
        Image.new("RGB", (20, 30), color).save(root / f"{color}.png")
    rows = [{"question": "What?", "answer": color, "image": f"{color}.png"} for color in COLORS]
    (root / "seen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows[4:]:
        del row["image"]
    (root / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture
def run(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, torch.Tensor]]:
    """Run a script on these models; the tensors of the adapter that it saves."""
    monkeypatch.setenv("CI", "1")  # TRL reports its use to no one
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def run(name: str, data: str, out: str, *options: object) -> dict[str, torch.Tensor]:
        script = EXAMPLES / name
        places = [stored / "base", stored / "vision", stored / data, tmp_path / out]
        arguments = [script, *places, "--batch-size", 2, *options]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        runpy.run_path(str(script), run_name="__main__")
        return load_file(tmp_path / out / "adapter_model.safetensors")

    return run


class Fresh:
    """A new adapter on these models, as the scripts make it."""

    def __init__(self, root: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(root / "base")
        images = load_image_processor(str(root / "vision"))
        self.root = root
        self.processor = LlamaAdapterProcessor(images, tokenizer, template="chat")
        self.model = LlamaAdapterForConditionalGeneration.from_base(
            str(root / "base"), str(root / "vision"), LlamaAdapterConfig.preset("v2"), seed=0
        )

    def talks(self, data: str) -> list[Conversation]:
        rows = [json.loads(line) for line in (self.root / data).read_text().splitlines()]
        return [
            Conversation.ask(
                row["question"],
                images=[self.root / row["image"]] if "image" in row else [],
                answer=row["answer"],
            )
            for row in rows
        ]

    @torch.no_grad()
    def loss(self, data: str) -> float:
        """What the answers cost, by our own processor and loss."""
        return float(self.model(**self.processor(self.talks(data), labels=True)).loss)


@pytest.fixture
def fresh(stored: Path) -> Fresh:
    return Fresh(stored)
