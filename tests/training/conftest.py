"""A small workshop on disk: a random base and tower of real classes, data, and a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any) -> Path:
    """Folders `base`, `vision` and `data` (alpaca.json, captions.tsv and their pictures)."""
    root = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(toy_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=0.1,  # so that randomness matters in training
            pad_token_id=toy_tokenizer.pad_token_id,
            bos_token_id=toy_tokenizer.bos_token_id,
            eos_token_id=toy_tokenizer.eos_token_id,
        )
    ).save_pretrained(root / "base")
    toy_tokenizer.save_pretrained(root / "base")
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    ).save_pretrained(root / "vision")
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "vision")
    data = root / "data"
    data.mkdir()
    records = [
        {"instruction": f"repeat the number {n}", "input": "", "output": f"the number is {n} ."}
        for n in range(30)
    ]
    (data / "alpaca.json").write_text(json.dumps(records))
    lines = []
    for number in range(24):
        name, colour = list(COLOURS.items())[number % 3]
        Image.new("RGB", (16, 16), tuple(max(0, c - number) for c in colour)).save(
            data / f"{number}.png"
        )
        lines.append(f"{number}.png\ta {name} picture , number {number}")
    (data / "captions.tsv").write_text("url\tcaption\n" + "\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def still_base(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base without dropout."""
    copy = tmp_path_factory.mktemp("still") / "base"
    shutil.copytree(workshop / "base", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    return copy


@pytest.fixture
def recipe_file(workshop: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe with changes by dotted key; `out` is a fresh folder."""
    pairs = {
        "type": "pairs",
        "path": f"{workshop}/data/captions.tsv",
        "images": str(workshop / "data"),
    }
    values = {
        "out": str(tmp_path / "run"),
        "steps": 6,
        "checkpoint_every": 2,
        "base": {"model": f"{workshop}/base"},
        "vision": {"model": f"{workshop}/vision"},
        "adapter": {
            "preset": "v2",
            "prompt_length": 3,
            "visual_prompt_length": 3,
            "projector": "linear",
        },
        "prompt": {"template": "toy"},
        "captions": {"rows": 2, "row_length": 64, "sources": [pairs]},
        "instructions": {
            "rows": 2,
            "row_length": 64,
            "sources": [{"type": "alpaca", "path": f"{workshop}/data/alpaca.json"}],
        },
        "data": {"workers": 0},
        "optimizer": {"warmup_steps": 1, "weight_decay": 0.01, "gate_lr": 0.1},
        "logging": {"every": 2},
    }

    def write(**changes: Any) -> Path:
        changed = json.loads(json.dumps(values))
        for key, value in changes.items():
            inner = changed
            *parents, last = key.split("__")
            for name in parents:
                inner = inner.setdefault(name, {})
            inner[last] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(changed))
        return path

    return write


@pytest.fixture
def losses() -> Callable[[Path], list[dict[str, Any]]]:
    """What a run measured, without what a clock measured."""

    def read(run: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if k not in ("seconds", "waited")} for r in rows]

    return read
