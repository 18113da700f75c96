"""What a user does with an adapter, on a tiny random base of a type: train, chat and export.

`python -m benchmarks.families --train` runs it with the commands themselves, on the captions and
instructions of the miniature world. Rows are packed where the type keeps their samples apart.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from transformers import AutoTokenizer

import llama_adapter.miniature
from benchmarks.tiny_models import tiny_base

TYPES = (
    "qwen3_5_text",
    "ministral3",
    "llama4_text",
    "gpt_oss",
    "gemma4_text",
    "deepseek_v3",
    "lfm2",
    "granitemoehybrid",
    "gpt2",
)
STEPS = 50
DECODER = Path(llama_adapter.miniature.__file__).parent / "bases" / "decoder"
RECIPE = Path(__file__).parent.parent / "recipes" / "toy.yaml"


def train_type(model_type: str, folder: Path) -> dict[str, Any]:
    """Losses of the first and last ten steps, and whether rows were packed, chat and export ran."""
    _write_base(model_type, folder / "base")
    row: dict[str, Any] = {"type": model_type, "padding": "packed"}
    result = _train(folder, padding="packed")
    if result.returncode and "cannot share a row" in result.stderr:
        row["padding"] = "padded"
        result = _train(folder, padding="padded")
    if result.returncode:
        return row | {"error": result.stderr.strip().splitlines()[-1]}
    losses = [
        entry["loss/caption"]
        for entry in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        if "loss/caption" in entry
    ]
    row |= {"first": sum(losses[:10]) / 10, "last": sum(losses[-10:]) / 10}
    adapter = str(folder / "run" / "adapter")
    Image.new("RGB", (64, 64), "red").save(folder / "image.png")
    asked = ["--image", str(folder / "image.png"), "--prompt", "What is it?", "--json"]
    answer = _command("chat", adapter, *asked, "--max-new-tokens", "8")
    row["chat"] = "answers" if not answer.returncode else _last_line(answer)
    exported = _command("export", adapter, "--partial", "--out", str(folder / "merged"))
    row["export"] = "merged" if not exported.returncode else _last_line(exported)
    return row


def _write_base(model_type: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DECODER)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
               for name in ("bos", "eos", "pad")}  # fmt: skip
    sizes = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), len(tokenizer))
    base = tiny_base(model_type, max_position_embeddings=1024, **sizes, **special)
    base.save_pretrained(folder)
    for path in DECODER.glob("tokenizer*"):
        shutil.copy(path, folder)


def _train(folder: Path, *, padding: str) -> subprocess.CompletedProcess[str]:
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe |= {"out": str(folder / "run"), "steps": STEPS, "checkpoint_every": STEPS}
    recipe["base"] = {"model": str(folder / "base"), "dtype": "float32"}
    recipe["adapter"] = {
        "preset": "v2", "prompt_length": 8, "visual_prompt_length": 16, "projector": "linear"
    }  # fmt: skip
    recipe["prompt"] = {"template": "toy"}
    recipe["data"]["padding"] = padding
    for part in ("captions", "instructions"):
        recipe[part] |= {"rows": 1, "row_length": 160}
        for source in recipe[part]["sources"]:
            source |= {"count": 400, "held_out": 4}
    shutil.rmtree(folder / "run", ignore_errors=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return _command("train", str(path))


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_adapter.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stderr.strip() or "no message").splitlines()[-1]


def training_table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        f"| type | rows | caption loss, first and last 10 of {STEPS} steps | chat | export |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['type']} | {row['padding']} | {row['error']} | – | – |")
            continue
        losses = f"{row['first']:.3f} → {row['last']:.3f}"
        lines.append(
            f"| {row['type']} | {row['padding']} | {losses} | {row['chat']} | {row['export']} |"
        )
    return "\n".join(lines)
